"""What commands say: tables, JSON, and failures that need no traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtunnel.config import ConfigError
from rtunnel.logs import printable
from rtunnel.registry import RegistryUnavailable
from rtunnel.roles import EXIT_FAILED, EXIT_USAGE, RoleMissing
from rtunnel.trust.keys import TrustError


class Failure(click.ClickException):
    """A message for people, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click says ClassVar, and reads it from the instance

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"rtunnel: {printable(line)}", err=True)


@contextmanager
def told() -> Iterator[None]:
    """Failures that need no traceback become messages."""
    try:
        yield
    except (ConfigError, TrustError, RoleMissing) as fault:
        raise Failure(str(fault), EXIT_USAGE) from None
    except RegistryUnavailable as fault:
        raise Failure(f"registry: {fault}", EXIT_FAILED) from None


def print_json(value: object) -> None:
    """For programs."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Any) -> None:
    """A table on a terminal; plain aligned columns, never cut, into a pipe. Values come from peers: escaped."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column.upper())
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    lines = [[column.upper() for column in columns], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
