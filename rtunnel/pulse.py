"""Signs of life: a process tells its watcher (systemd, the supervisor) that both planes answer.

A process whose relay thread or control plane hangs gives no sign, so that the watcher kills and
replaces it. Without a watcher nothing here runs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import trio

from rtunnel import logs
from rtunnel.compat import override

#: Seconds between two signs of a worker.
WORKER_EVERY: Final = 1.0
#: Seconds between two signs where systemd has no WatchdogSec, and they only renew the status line.
STATUS_EVERY: Final = 5.0
#: Signs in one WatchdogSec of systemd: one may be lost, and another late.
SIGNS_A_WATCHDOG: Final = 3
#: Seconds by which each sign extends a start: a broker waits for its registry without a limit.
START_EXTENSION: Final = 60.0

#: Variables with which systemd tells only this process about notifications.
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

#: Bytes that a worker writes into its supervisor's pipe: it is alive; it has started.
ALIVE: Final = b"."
STARTED: Final = b"+"

log = logs.get_logger("runner")


class Part(Protocol):
    """A running role, as the signs of life see it."""

    def reasons(self) -> list[str]:
        """Return why the role is not ready; empty when it is ready."""

    async def answered(self) -> None:
        """Return when the role's own thread has answered; never while it hangs."""


class Watcher(Protocol):
    """A receiver of signs of life. No method blocks or raises."""

    every: float  # seconds between two signs

    def started(self) -> None:
        """Report that all roles serve."""

    def alive(self, status: str) -> None:
        """Report that both planes have answered; `status` is one line for display."""

    def stopping(self) -> None:
        """Report that the process was told to stop."""


async def pulse(watcher: Watcher, parts: Sequence[Part]) -> None:
    """Give signs of life until cancelled.

    `parts` may grow meanwhile: a role is asked from its start on.
    """
    while True:
        for part in list(parts):
            await part.answered()
        watcher.alive(status_line(parts))
        await trio.sleep(watcher.every)


def status_line(parts: Sequence[Part]) -> str:
    """Return one line about these roles."""
    if not parts:
        return "starting"
    reasons = [reason for part in parts for reason in part.reasons()]
    return f"not ready: {'; '.join(reasons)}" if reasons else "ready"


class Systemd(Watcher):
    """Notifies systemd as sd_notify(3) does: by datagrams to the socket of $NOTIFY_SOCKET."""

    def __init__(self, address: str, every: float) -> None:
        self.every = every
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # abstract names
        self._status = ""
        self._has_started = False
        self._failed = False

    @override
    def started(self) -> None:
        self._has_started = True
        self._say("READY=1")

    @override
    def alive(self, status: str) -> None:
        words = ["WATCHDOG=1"]
        if status != self._status:
            self._status = status
            words.append(f"STATUS={' '.join(status.split())}")
        if not self._has_started:
            words.append(f"EXTEND_TIMEOUT_USEC={int(START_EXTENSION * 1e6)}")
        self._say(*words)

    @override
    def stopping(self) -> None:
        self._say("STOPPING=1")

    def _say(self, *words: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(words).encode(), self._address)
        except BlockingIOError:
            pass  # systemd has not read the last signs, which still count
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("notify_failed", reason=str(error), hint="systemd hears nothing: see NOTIFY_SOCKET")


def from_environment(environ: Mapping[str, str]) -> Watcher | None:
    """Return the watcher for the init system, or None if it wants no notifications."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    return Systemd(address, _watchdog_every(environ))


def _watchdog_every(environ: Mapping[str, str]) -> float:
    """Return the seconds between two signs, from the variables of this process.

    $WATCHDOG_USEC counts only for the process of $WATCHDOG_PID.
    """
    text = environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or not int(text) or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return STATUS_EVERY
    return int(text) / 1e6 / SIGNS_A_WATCHDOG


class Supervised(Watcher):
    """Notifies the supervisor of a worker by a pipe."""

    every = WORKER_EVERY

    def __init__(self, pipe: int) -> None:
        """Write to `pipe`, the descriptor of the writing end."""
        self._pipe = pipe
        os.set_blocking(pipe, False)
        os.set_inheritable(pipe, False)

    @override
    def started(self) -> None:
        self._write(STARTED)

    @override
    def alive(self, status: str) -> None:
        self._write(ALIVE)

    @override
    def stopping(self) -> None:
        pass  # the supervisor gave the order, so it knows

    def _write(self, sign: bytes) -> None:
        try:
            os.write(self._pipe, sign)
        except OSError:
            pass  # the supervisor does not read, or has ended: the end of stdin tells
