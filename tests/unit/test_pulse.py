"""Signs of life: none while the relay's thread hangs; what systemd hears."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import trio

from rtunnel import admin, pulse
from rtunnel.bridge import Bridge
from rtunnel.pulse import Systemd
from support.plumbing import TestRelay, kept, running_relay


class Role:
    """A role with a relay of its own."""

    def __init__(self, relay: TestRelay) -> None:
        self.bridge = Bridge(relay)
        self.missing: list[str] = []

    def reasons(self) -> list[str]:
        return self.missing

    async def answered(self) -> None:
        await self.bridge.answered()


class Counter:
    """Who is told, as fast as it goes."""

    every = 0.0

    def __init__(self) -> None:
        self.signs = 0

    def started(self) -> None:
        pass

    def alive(self, status: str) -> None:
        self.signs += 1

    def stopping(self) -> None:
        pass

    async def until(self, signs: int) -> None:
        with trio.fail_after(10):
            while self.signs < signs:
                await trio.lowlevel.checkpoint()


async def test_there_is_no_sign_of_life_while_the_relay_hangs() -> None:
    """And there are again when it goes on; `/livez` says the same."""
    held, release = threading.Event(), threading.Event()

    def hang() -> None:
        held.set()
        release.wait(10)

    counter = Counter()
    with running_relay() as relay:
        role = Role(relay)
        live = admin.health_routes(role.reasons, dict, role.answered)["/livez"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pulse.pulse, counter, [role])
            await counter.until(5)
            relay.call(hang)
            await trio.to_thread.run_sync(held.wait)
            before = counter.signs
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert counter.signs <= before + 1, "one was under way"
            answer = live()
            assert not isinstance(answer, tuple)
            assert (await answer)[0] == 503
            release.set()
            await counter.until(before + 5)
            nursery.cancel_scope.cancel()


@pytest.fixture(params=["a path", "an abstract name"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, socket.socket]:
    """The address that systemd would give, and its end."""
    sock = kept(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.settimeout(10)
    name = f"{tmp_path}/notify"
    if request.param == "a path":
        sock.bind(name)
        return name, sock
    sock.bind(f"\0{name}")
    return f"@{name}", sock


def heard(sock: socket.socket) -> list[str]:
    return sock.recv(4096).decode().split("\n")


def test_what_systemd_hears(systemd: tuple[str, socket.socket]) -> None:
    """More time until it serves; the status when it changes, in one line; nothing more than once."""
    address, sock = systemd
    told = pulse.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"})
    assert isinstance(told, Systemd) and told.every == 10.0
    told.alive("starting")
    assert heard(sock) == ["WATCHDOG=1", "STATUS=starting", "EXTEND_TIMEOUT_USEC=60000000"]
    told.started()
    assert heard(sock) == ["READY=1"]
    told.alive("not ready: two\nlines")
    assert heard(sock) == ["WATCHDOG=1", "STATUS=not ready: two lines"]
    told.alive("not ready: two\nlines")
    assert heard(sock) == ["WATCHDOG=1"]
    told.stopping()
    assert heard(sock) == ["STOPPING=1"]


def test_a_socket_that_is_full_or_gone_stops_nothing(systemd: tuple[str, socket.socket]) -> None:
    address, sock = systemd
    told = Systemd(address, 1.0)
    for _ in range(10_000):
        told.alive("x")
    sock.close()
    told.alive("y")


def test_who_is_watched() -> None:
    """Nobody without systemd; another process's watchdog is not ours."""
    assert pulse.from_environment({}) is None
    assert pulse.from_environment({"NOTIFY_SOCKET": "relative"}) is None
    watchdog = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000"}
    for pid, every in ((os.getpid(), 1.0), (1, pulse.STATUS_EVERY)):
        told = pulse.from_environment({**watchdog, "WATCHDOG_PID": str(pid)})
        assert told is not None and told.every == every
    told = pulse.from_environment({**watchdog, "WATCHDOG_USEC": "soon"})
    assert told is not None and told.every == pulse.STATUS_EVERY
