"""Signs of life: a process tells whoever watches it (systemd, the supervisor) that both of its planes answer.

A process whose relay thread hangs, or whose control plane does, gives no sign, and is killed and replaced by the
watcher. Nothing here runs in a process that nobody watches.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import trio

from rtunnel import logs

#: Seconds between two signs of a worker.
WORKER_EVERY: Final = 1.0
#: Seconds between two signs where systemd has no WatchdogSec: only the status line needs them then.
STATUS_EVERY: Final = 5.0
#: Signs in systemd's WatchdogSec: one may be lost, another late.
SIGNS_A_WATCHDOG: Final = 3
#: A start may take this much longer (seconds) from each sign on: a broker waits for its registry, however long.
START_EXTENSION: Final = 60.0

#: What systemd tells a service about notifications, and this process alone.
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

#: What a worker writes into its supervisor's pipe: it lives; it has started.
ALIVE: Final = b"."
STARTED: Final = b"+"

log = logs.get_logger("runner")


class Part(Protocol):
    """A running role."""

    def reasons(self) -> list[str]:
        """Why it is not ready; empty when it is."""

    async def answered(self) -> None:
        """Return when the role's own thread has answered; never while it hangs."""


class Watcher(Protocol):
    """Who is told. No method blocks or raises."""

    every: float  # seconds between two signs

    def started(self) -> None:
        """All roles serve."""

    def alive(self, status: str) -> None:
        """Both planes have answered; `status` is one line for people."""

    def stopping(self) -> None:
        """The process was told to stop."""


async def pulse(watcher: Watcher, parts: Sequence[Part]) -> None:
    """Give signs of life until cancelled. `parts` may grow meanwhile: a role is asked from its start on."""
    while True:
        for part in list(parts):
            await part.answered()
        watcher.alive(status_line(parts))
        await trio.sleep(watcher.every)


def status_line(parts: Sequence[Part]) -> str:
    """One line about these roles."""
    if not parts:
        return "starting"
    reasons = [reason for part in parts for reason in part.reasons()]
    return f"not ready: {'; '.join(reasons)}" if reasons else "ready"


class Systemd:
    """sd_notify(3): datagrams to the socket of $NOTIFY_SOCKET."""

    def __init__(self, address: str, every: float) -> None:
        self.every = every
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # abstract names
        self._status = ""
        self._has_started = False
        self._failed = False

    def started(self) -> None:
        """See Watcher."""
        self._has_started = True
        self._say("READY=1")

    def alive(self, status: str) -> None:
        """See Watcher."""
        words = ["WATCHDOG=1"]
        if status != self._status:
            self._status = status
            words.append(f"STATUS={' '.join(status.split())}")
        if not self._has_started:
            words.append(f"EXTEND_TIMEOUT_USEC={int(START_EXTENSION * 1e6)}")
        self._say(*words)

    def stopping(self) -> None:
        """See Watcher."""
        self._say("STOPPING=1")

    def _say(self, *words: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(words).encode(), self._address)
        except BlockingIOError:
            pass  # systemd has not read the last ones: those count
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("notify_failed", reason=str(error), hint="systemd hears nothing: see NOTIFY_SOCKET")


def from_environment(environ: Mapping[str, str]) -> Watcher | None:
    """The init system, if it wants to be notified."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    return Systemd(address, _watchdog_every(environ))


def _watchdog_every(environ: Mapping[str, str]) -> float:
    """Seconds between two signs; $WATCHDOG_USEC is only meant for the process of $WATCHDOG_PID."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or not int(text) or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return STATUS_EVERY
    return int(text) / 1e6 / SIGNS_A_WATCHDOG


class Supervised:
    """A worker's pipe to its supervisor."""

    every = WORKER_EVERY

    def __init__(self, pipe: int) -> None:
        """`pipe`: the writing end, a descriptor."""
        self._pipe = pipe
        os.set_blocking(pipe, False)
        os.set_inheritable(pipe, False)

    def started(self) -> None:
        """See Watcher."""
        self._write(STARTED)

    def alive(self, status: str) -> None:
        """See Watcher."""
        self._write(ALIVE)

    def stopping(self) -> None:
        """See Watcher: the supervisor knows, it said so."""

    def _write(self, sign: bytes) -> None:
        try:
            os.write(self._pipe, sign)
        except OSError:
            pass  # it does not read, or is gone: its end of stdin tells more
