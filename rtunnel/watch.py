"""Files that are read again when they have changed: policies, users, certificates.

A file is looked at twice a second, and read when it has looked the same in two looks: then nobody is writing it any
more. A bad one changes nothing and is told, once, in the log and in `/statusz`. SIGHUP means "look now" (`look_now`).
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
    """One thing that is read from one file, or from several that belong together (a certificate and its key).

    `load` runs on a worker thread and raises TrustError; `put` gets what it returned, in trio's thread, and returns
    what the log shall say of it.
    """

    what: str
    paths: Sequence[Path]
    load: Callable[[], Any]
    put: Callable[[Any], Awaitable[dict[str, object]]]
    rejected: str = ""
    _seen: tuple[int, ...] = ()  # how it looked when it was read
    _changing: tuple[int, ...] | None = None  # how it looked the last time

    def __post_init__(self) -> None:
        """From now on: what is in the files at this moment is known."""
        self._seen = self.look()

    @property
    def file(self) -> str:
        """For people."""
        return ", ".join(map(str, self.paths))

    def look(self) -> tuple[int, ...]:
        """Another look is another content. A file that is not there gives nothing."""
        seen: list[int] = []
        for path in self.paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            seen += (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        return tuple(seen)

    async def check(self, log: FilteringBoundLogger, *, at_once: bool = False) -> None:
        """One look; read and put when it has changed. `at_once`: somebody says that it is whole."""
        look = await trio.to_thread.run_sync(self.look)
        if look == self._seen or (look != self._changing and not at_once):
            self._changing = look  # perhaps it is being written: see whether it stays as it is
            return
        self._seen = look
        try:
            said = await self.put(await trio.to_thread.run_sync(self.load))
        except Exception as error:  # TrustError says all; but whatever a file does, the process goes on
            self.rejected = str(error) if isinstance(error, TrustError) else f"{type(error).__name__}: {error}"
            hint = "what was in force stays in force"
            log.error(f"{self.what}_rejected", file=self.file, reason=self.rejected, hint=hint)
            return
        self.rejected = ""
        log.info(f"{self.what}_loaded", file=self.file, **said)


#: What the tasks wait for that watch files of this process.
_asked: set[trio.Event] = set()


def look_now() -> None:
    """Look at all watched files of this process, and read what has changed. In trio's thread."""
    for asked in _asked:
        asked.set()


async def watch(files: Sequence[Watched], log: FilteringBoundLogger) -> None:
    """Look at them until cancelled."""
    asked = trio.Event()
    try:
        while True:
            _asked.add(asked)
            with trio.move_on_after(LOOK_SECONDS):
                await asked.wait()
            at_once = asked.is_set()
            if at_once:  # a request that comes during the look is for the next one
                _asked.discard(asked)
                asked = trio.Event()
                _asked.add(asked)
            for file in files:
                await file.check(log, at_once=at_once)
    finally:
        _asked.discard(asked)
