"""The output of commands: tables, JSON, and messages for failures that need no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtunnel.config import ConfigError
from rtunnel.errors import EXIT_FAILED, EXIT_USAGE, RegistryUnavailable, RoleMissing, TrustError
from rtunnel.logs import printable


class Failure(click.ClickException):
    """A failure of a command: a message for display, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click says ClassVar, and reads it from the instance

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"rtunnel: {printable(line)}", err=True)


#: Options that several commands have.
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    envvar="RTUNNEL_CONFIG",
    help="Configuration file (TOML); also $RTUNNEL_CONFIG.",
)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn errors of the block that need no traceback into `Failure`s, with their exit codes."""
    try:
        yield
    except (ConfigError, TrustError, RoleMissing) as error:
        raise Failure(str(error), EXIT_USAGE) from None
    except RegistryUnavailable as error:
        raise Failure(f"registry: {error}", EXIT_FAILED) from None


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def plural(count: int, noun: str) -> str:
    """Return the count with its noun, whose plural ends in s: "1 agent", "2 agents"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], keep: Sequence[str] = ()) -> None:
    """Print a table to stdout. Nothing is ever cut off.

    On a terminal, cells of the columns in `keep` stay on one line, because they are arguments of
    the next command; longer cells of other columns are folded. Elsewhere each row is one line.
    Values come from peers: they are escaped.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():  # rich would say yes for a pipe with FORCE_COLOR
        _print_folded(columns, cells, keep)
        return
    lines = [[column.upper() for column in columns], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


#: The least width of a column that may fold, so that headings of one word stay whole. A table that
#: needs more than the terminal's width is printed wider, and the terminal wraps it.
_FOLDED_WIDTH = 10


def _print_folded(columns: Sequence[str], cells: Sequence[Sequence[str]], keep: Sequence[str]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    least = 0
    for index, column in enumerate(columns):
        width = max(cell_len(text) for text in (column, *(row[index] for row in cells)))
        whole = column in keep
        table.add_column(column.upper(), no_wrap=whole, overflow="fold", min_width=width if whole else None)
        least += 2 + (width if whole else min(width, _FOLDED_WIDTH))  # two spaces between columns
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    console.width = max(console.width, least)
    console.print(table)
