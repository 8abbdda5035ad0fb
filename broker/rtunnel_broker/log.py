"""The log lines of one node, from the relay's thread."""

from __future__ import annotations

from typing import Final

from structlog.typing import FilteringBoundLogger

from rtunnel.logs import Throttle, debugging
from rtunnel.relay.loop import Loop

#: Log lines in ten seconds about unproven peers, for each event and cause.
STRANGERS_LINES: Final = 32


class NodeLog:
    """Writes log lines with the node's name, and bounds those that unproven peers can cause."""

    __slots__ = ("_log", "_loop", "_throttle", "debugging")

    def __init__(self, log: FilteringBoundLogger, node: str, loop: Loop) -> None:
        self._log = log.bind(node=node)
        self._loop = loop
        self._throttle = Throttle()
        self.debugging = debugging()  # `trace` writes lines

    def info(self, event: str, **fields: object) -> None:
        """Write a line of level info."""
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
        """Write a line of level error: the relay reports only faults."""
        self._log.error(event, **fields)

    def stranger(self, event: str, kind: str, **fields: object) -> None:
        """Write a line about an unproven peer: STRANGERS_LINES for each event and kind, the others
        are counted.
        """
        others = self._throttle.others(f"{event} {kind}", self._loop.now, STRANGERS_LINES)
        if others is not None:
            self.info(event, **fields, **({"others_since": others} if others else {}))

    def warn(self, event: str, **fields: object) -> None:
        """Write a warning that may be repeated without a bound: one line of it in ten seconds."""
        others = self._throttle.others(event, self._loop.now)
        if others is not None:
            self._log.warning(event, **fields, others_since=others)
