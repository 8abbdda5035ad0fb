"""The log lines of one node, from the relay's thread."""

from __future__ import annotations

from typing import Final

from structlog.typing import FilteringBoundLogger

from rtunnel.logs import Throttle, debugging
from rtunnel.relay.loop import Loop

#: Lines in ten seconds about peers that have proved nothing, for each event and cause: enough to see what is wrong.
STRANGERS_LINES: Final = 32


class NodeLog:
    """Writes lines that carry the node's name, and keeps those few that a stranger can cause."""

    __slots__ = ("_log", "_loop", "_throttle", "debugging")

    def __init__(self, log: FilteringBoundLogger, node: str, loop: Loop) -> None:
        self._log = log.bind(node=node)
        self._loop = loop
        self._throttle = Throttle()
        self.debugging = debugging()  # `trace` writes lines

    def info(self, event: str, **fields: object) -> None:
        """Write a line."""
        self._log.info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write a line of level warning."""
        self._log.warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Write a line of level error."""
        self._log.error(event, **fields)

    def trace(self, event: str, **fields: object) -> None:
        """Write a line of level debug: one for each stream."""
        self._log.debug(event, **fields)

    def report(self, event: str, fields: dict[str, object]) -> None:
        """Write a line of level error: what the relay itself reports is never good news."""
        self._log.error(event, **fields)

    def stranger(self, event: str, kind: str, **fields: object) -> None:
        """Write a line about a peer that has proved nothing: few lines for each event and kind, the others counted."""
        others = self._throttle.others(f"{event} {kind}", self._loop.now, STRANGERS_LINES)
        if others is not None:
            self.info(event, **fields, **({"others_since": others} if others else {}))

    def warn(self, event: str, **fields: object) -> None:
        """Write a warning that may be repeated without end: one line of it in ten seconds."""
        others = self._throttle.others(event, self._loop.now)
        if others is not None:
            self._log.warning(event, **fields, others_since=others)
