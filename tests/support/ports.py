"""Ports for which a test run must know the number beforehand, leased from the machine.

Most sockets of the tests take a port of the kernel's choice. Some need a range of their own: a
broker's guarded and open ports, and a service that is started anew on its old port. Two test
processes on one machine (`pytest -n 2`, or `make test` in two clones) must not use the same ones. So
the ports below the kernel's own range are cut into blocks, and a process holds a block as long as it
lives.

The lock of a block is a TCP socket that is bound to its first port, without listening. The kernel
gives it to one process at a time, frees it with the process, whoever the user is, and keeps it apart
in each network namespace, exactly as the ports themselves.
"""

from __future__ import annotations

import random
import socket
import time
from functools import cache
from pathlib import Path
from typing import Final

#: Ports of a block. A test process takes one.
BLOCK: Final = 2048
#: Where the first block begins: below are ports that services of the machine use.
FIRST: Final = 10_240
#: Where blocks end when the kernel's own range leaves no room below it.
USUAL_END: Final = 32_768
#: `rtunnel demo` has fixed ranges in here; a single block stays outside.
DEMO: Final = range(20_000, 24_000)
#: Seconds to wait until another process gives a block back. Less than a test's time limit.
PATIENCE: Final = 40.0
#: Seconds between two looks meanwhile.
PAUSE: Final = 0.2

#: Guarded ports of one broker of a test, and brokers that have such a range. The rest of a block is
#: for `loose_ports`.
GUARDED: Final = 100
BROKERS: Final = 10

#: The locks: they must live as long as the process.
_held: list[socket.socket] = []


class NoBlock(AssertionError):
    """Other test processes hold all blocks."""


def lease(count: int = BLOCK - 1, patience: float = PATIENCE) -> range:
    """Return `count` ports in a row that no other process leases while this one lives.

    When they fill several blocks the locks of all but the first are among them. Raises NoBlock when
    there are none within `patience` seconds.
    """
    blocks = -(-(count + 1) // BLOCK)
    deadline = time.monotonic() + patience
    while True:
        for first in _candidates(blocks):
            if _hold(range(first, first + blocks * BLOCK, BLOCK)):
                return range(first + 1, first + 1 + count)
        if time.monotonic() >= deadline:
            raise NoBlock(
                f"no {count} ports in a row are free for a test run: other processes hold blocks of"
                f" {BLOCK} ports between {FIRST} and {_end() - 1}."
                " Wait until another test run ends, or run fewer at once."
            )
        time.sleep(PAUSE)


def _candidates(blocks: int) -> list[int]:
    """First ports of so many blocks in a row, in no order: other processes look at the same time."""
    size = blocks * BLOCK
    starts = range(FIRST, _end() - size + 1, BLOCK)
    found = [n for n in starts if blocks > 1 or not _overlap(range(n, n + size), DEMO)]
    random.shuffle(found)
    return found


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _end() -> int:
    """The first port behind all blocks."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return USUAL_END
    return min(lowest, USUAL_END) if lowest >= FIRST + BLOCK else USUAL_END


def _hold(locks: range) -> bool:
    """Take all of these locks, or none."""
    taken: list[socket.socket] = []
    try:
        for port in locks:
            taken.append(socket.socket())
            taken[-1].bind(("", port))
    except OSError:
        for sock in taken:
            sock.close()
        return False
    _held.extend(taken)
    return True


@cache
def own_ports() -> range:
    """This process's block, without its lock."""
    return lease()


def guarded_ports(number: int) -> range:
    """Guarded ports of a test's broker of this number, from 0; after BROKERS they begin anew."""
    first = own_ports().start + GUARDED * (number % BROKERS)
    return range(first, first + GUARDED)


def loose_ports() -> range:
    """Ports of this process that are no broker's."""
    return own_ports()[GUARDED * BROKERS :]


def as_text(ports: range) -> str:
    """Return the range as configurations have it."""
    return f"{ports[0]}-{ports[-1]}"
