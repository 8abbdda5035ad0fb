"""Reads files again when they have changed: policies, users, certificates.

A file is checked twice a second, and read when two checks found it the same: then no program is
still writing it. A bad file changes nothing, and is reported once in the log and in `/statusz`.
SIGHUP means "check now" (`look_now`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.errors import TrustError

LOOK_SECONDS: Final = 0.5


@dataclass(eq=False, slots=True)
class Watched:
    """A value that is read from one file, or from several that belong together.

    `load` runs on a worker thread and raises TrustError. `put` gets its result in trio's thread,
    and returns fields for the log.
    """

    what: str
    paths: Sequence[Path]
    load: Callable[[], Any]
    put: Callable[[Any], Awaitable[dict[str, object]]]
    rejected: str = ""
    _seen: tuple[int, ...] = ()  # how it looked when it was read
    _changing: tuple[int, ...] | None = None  # how it looked the last time

    def __post_init__(self) -> None:
        """Mark the present contents of the files as known."""
        self._seen = self.look()

    @property
    def file(self) -> str:
        """Return the files' names for display."""
        return ", ".join(map(str, self.paths))

    def look(self) -> tuple[int, ...]:
        """Return a value that differs when the contents may differ. A missing file adds nothing."""
        seen: list[int] = []
        for path in self.paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            seen += (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        return tuple(seen)

    async def check(self, log: FilteringBoundLogger, *, at_once: bool = False) -> None:
        """Check the files once, and read them when they have changed.

        `at_once`: they are complete.
        """
        look = await trio.to_thread.run_sync(self.look)
        if look == self._seen or (look != self._changing and not at_once):
            # The file may be half written: read it when it has not changed by the next check.
            self._changing = look
            return
        self._seen = look
        try:
            said = await self.put(await trio.to_thread.run_sync(self.load))
        # TrustError says all; but whatever a file does, the process goes on.
        except Exception as error:
            self.rejected = str(error) if isinstance(error, TrustError) else f"{type(error).__name__}: {error}"
            hint = "what was in force stays in force"
            log.error(f"{self.what}_rejected", file=self.file, reason=self.rejected, hint=hint)
            return
        self.rejected = ""
        log.info(f"{self.what}_loaded", file=self.file, **said)


#: Events of the tasks that watch files of this process.
_asked: set[trio.Event] = set()


def look_now() -> None:
    """Check all watched files of this process, and read changed ones. In trio's thread."""
    for asked in _asked:
        asked.set()


async def watch(files: Sequence[Watched], log: FilteringBoundLogger) -> None:
    """Check the files twice a second until cancelled."""
    asked = trio.Event()
    try:
        while True:
            _asked.add(asked)
            with trio.move_on_after(LOOK_SECONDS):
                await asked.wait()
            at_once = asked.is_set()
            if at_once:  # a request during the check is for the next one
                _asked.discard(asked)
                asked = trio.Event()
                _asked.add(asked)
            for file in files:
                await file.check(log, at_once=at_once)
    finally:
        _asked.discard(asked)
