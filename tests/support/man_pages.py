"""Man pages of all commands, from the texts of `--help`: `python -m support.man_pages DIRECTORY` (`make man`).

click-man 0.6 makes such pages, but leaves out what stands behind the options (examples, exit codes), fills blocks
that click is told to keep as they are, and does not see commands that a group finds on demand, which the roles are.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

import rtunnel
from rtunnel.cli import cli

#: click's mark of a paragraph that is not to be filled.
KEPT: Final = "\b"


def commands(command: click.Command = cli, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Yield a context for each command that is not hidden, groups before their commands."""
    context = click.Context(command, info_name=command.name if parent else "rtunnel", parent=parent)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from commands(found, context)


def name_of(context: click.Context) -> str:
    """Return the name of the command's page: "rtunnel-pki-init"."""
    return context.command_path.replace(" ", "-")


def page(context: click.Context) -> str:
    """Return the man page of a command, as man(7) macros."""
    command = context.command
    name = name_of(context)
    lines = [
        f'.TH "{quoted(name.upper())}" "1" "" "rtunnel {quoted(rtunnel.__version__)}" "rtunnel"',
        ".SH NAME",
        rf"{quoted(name)} \- {quoted(command.get_short_help_str(limit=200).rstrip('.'))}",
        ".SH SYNOPSIS",
        rf"\fB{quoted(context.command_path)}\fR {quoted(' '.join(command.collect_usage_pieces(context)))}",
        ".SH DESCRIPTION",
        *_paragraphs(command.help or ""),
    ]
    options = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    if options:
        lines.append(".SH OPTIONS")
        for words, text in options:
            lines += [".TP", rf"\fB{quoted(words)}\fR", quoted(text)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for name, found in _commands_of(command, context):
            lines += [".TP", rf"\fB{quoted(name)}\fR", quoted(found.get_short_help_str(limit=200))]
    lines += _sections(command.epilog or "")
    lines += [".SH SEE ALSO", ", ".join(rf"\fB{quoted(other)}\fR(1)" for other in _related(context))]
    return "\n".join(lines) + "\n"


def _commands_of(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if found is not None and not found.hidden:
            yield name, found


def _related(context: click.Context) -> list[str]:
    """Return the pages of the command's group and of its own commands."""
    own = context.command
    below = (
        [f"{name_of(context)}-{name}" for name, _ in _commands_of(own, context)] if isinstance(own, click.Group) else []
    )
    return [name_of(context.parent), *below] if context.parent is not None else below


def _sections(epilog: str) -> Iterator[str]:
    """Yield the lines behind the options. A paragraph that begins with "Word:" becomes a section."""
    for block in _blocks(epilog):
        kept, text = block.startswith(KEPT), block.removeprefix(KEPT).strip("\n")
        title, colon, rest = text.partition(":")
        if colon and re.fullmatch(r"[A-Z][a-z ]+", title):
            yield f".SH {title.upper()}"
            text = rest.strip("\n ") if not kept else rest.strip("\n")
        yield from _block(text, kept)


def _paragraphs(text: str) -> Iterator[str]:
    for block in _blocks(text):
        yield from _block(block.removeprefix(KEPT).strip("\n"), block.startswith(KEPT))


def _blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in re.split(r"\n{2,}", inspect.cleandoc(text)) if block.strip("\n ")]


def _block(text: str, kept: bool) -> Iterator[str]:
    yield ".PP"
    if kept:
        yield ".nf"
    yield from (quoted(line) for line in text.splitlines())
    if kept:
        yield ".fi"


def quoted(text: str) -> str:
    """Return a text that roff prints as it is: no escape, no macro, and hyphens that can be copied."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace('"', r"\(dq")
    return rf"\&{text}" if text.startswith((".", r"\(aq")) else text


def write(directory: Path) -> list[Path]:
    """Write all pages below `directory`, and return their files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for context in commands():
        path = directory / f"{name_of(context)}.1"
        path.write_text(page(context), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    print(f"{len(write(Path(sys.argv[1])))} pages in {sys.argv[1]}")
