"""The shell lines of pages, and whether their rtunnel commands are commands of this version."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from rtunnel.cli import cli


def shell_lines(page: str) -> Iterator[list[str]]:
    """Yield the words of each line in the page's blocks of the kind `sh`, without here-documents."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL):
        text = re.sub(r"<<(\w+)\n.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in text.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def here_documents(page: str) -> dict[str, str]:
    """Return what the page's shell blocks write by `cat > NAME <<END`, by name."""
    found = re.findall(r"^cat > (\S+) <<END\n(.*?)^END$", page, re.MULTILINE | re.DOTALL)
    return dict(found)


def command_of(words: list[str]) -> click.Command:
    """The rtunnel command that these arguments run, with every option known. Asserts that there is one."""
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words)
    while isinstance(command, click.Group):
        found = command.get_command(context, rest[0])
        assert found is not None, words
        command = found
        rest.pop(0)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known, words
    return command
