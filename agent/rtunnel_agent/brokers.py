"""Chooses the broker address that the agent dials next.

`AddressQueue` is pure; `Brokers` asks the resolver, in trio's thread.
"""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.config import format_endpoint, parse_endpoint

Address = tuple[str, int]

#: Addresses of one name that are used. A DNS answer over UDP holds fewer.
MAX_ADDRESSES: Final = 64
#: Seconds that a dial waits for the resolver while an older answer is known.
RESOLVER_PATIENCE: Final = 1.0
#: Seconds that a dial waits for the resolver when no address is known at all.
RESOLVER_DEADLINE: Final = 30.0


class AddressQueue:
    """The known broker addresses, in the order in which they are to be dialled.

    The least recently dialled address comes first; a new one joins at the end. An address that
    stays known is therefore dialled at least once in as many dials as there are addresses, in
    whatever order the resolver names them.
    """

    def __init__(self, rng: random.Random) -> None:
        """`rng` orders addresses that were never dialled: agents must not all begin
        with the same.
        """
        self._rng = rng
        self._answers: dict[Address, tuple[Address, ...]] = {}  # by entry
        self._ranks: dict[Address, tuple[int, float]] = {}
        self._dials = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, entry: Address, found: Iterable[Address]) -> None:
        """Replace the addresses of one entry. An empty answer changes nothing."""
        answer = tuple(dict.fromkeys(found))[:MAX_ADDRESSES]
        if answer:
            self._answers[entry] = answer
            known = dict.fromkeys(address for answer in self._answers.values() for address in answer)
            self._ranks = {address: self._ranks.get(address) or self._newest() for address in known}

    def take(self) -> Address | None:
        """Return the address to dial now, and move it to the end; None when none is known."""
        if not self._ranks:
            return None
        address = min(self._ranks, key=self._ranks.__getitem__)
        self._dials += 1
        self._ranks[address] = self._dials, 1.0
        return address

    def _newest(self) -> tuple[int, float]:
        """Return the rank of a new address: behind all others but the one that was dialled last."""
        return self._dials, self._rng.random()


def look_up(host: str, port: int) -> list[Address]:
    """Ask the system's resolver for the addresses of a name. Blocks. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(address[0]), port) for *_, address in found]


@dataclass(eq=False, slots=True)
class _Name:
    """One entry of `agent.brokers` that is a name."""

    host: str
    port: int
    asked: float = -math.inf  # when the present lookup began (trio's clock)
    pending: bool = False
    failure: str = ""  # of the last lookup that ended


class Brokers:
    """The broker addresses of one agent. Names are looked up for each dial, because a VIP may move.

    Each name has one lookup at a time. While the resolver is silent or fails, its last answer
    counts.
    """

    def __init__(
        self,
        entries: Sequence[str],
        log: FilteringBoundLogger,
        lookup: Callable[[str, int], list[Address]] | None = None,
    ) -> None:
        self._queue = AddressQueue(random.Random())  # noqa: S311
        self._names: list[_Name] = []
        self._log = log
        self._lookup = lookup or look_up
        # a stuck resolver takes no other's threads
        self._limiter = trio.CapacityLimiter(max(1, len(entries)))
        self._news = trio.Event()  # set when a lookup ends
        self._nursery: trio.Nursery | None = None
        for host, port in map(parse_endpoint, entries):
            if _is_address(host):
                self._queue.put((host, port), [(host, port)])
            else:
                self._names.append(_Name(host, port))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the nursery of the lookups, which may outlast the dials that began them."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def next(self) -> Address:
        """Return the address to dial now. Raises OSError, with a sentence, when none is known."""
        self._ask()
        with trio.move_on_after(RESOLVER_PATIENCE):
            while any(name.pending and self._is_fresh(name) for name in self._names):
                await self._news.wait()
        with trio.move_on_after(RESOLVER_DEADLINE - RESOLVER_PATIENCE):
            while not self._queue and any(name.pending for name in self._names):
                await self._news.wait()
        address = self._queue.take()
        if address is None:
            raise OSError("; ".join(map(_fault_of, self._names)))
        return address

    def _is_fresh(self, name: _Name) -> bool:
        """Return whether the present lookup began lately: dials do not wait for a stuck one."""
        return trio.current_time() < name.asked + RESOLVER_PATIENCE

    def _ask(self) -> None:
        assert self._nursery is not None, "Brokers.run runs beside `next`"
        for name in self._names:
            if not name.pending:
                name.pending, name.asked = True, trio.current_time()
                self._nursery.start_soon(self._ask_for, name)

    async def _ask_for(self, name: _Name) -> None:
        failure = ""
        try:
            found = await trio.to_thread.run_sync(
                self._lookup, name.host, name.port, limiter=self._limiter, abandon_on_cancel=True
            )
        except OSError as error:
            failure = error.strerror or str(error)
        else:
            self._queue.put((name.host, name.port), found)
        if failure and failure != name.failure and self._queue:
            self._log.warning(
                "broker_lookup_failed", broker=format_endpoint(name.host, name.port), reason=failure,
                hint="the agent goes on with the addresses that it knows",
            )  # fmt: skip
        name.failure = failure
        name.pending = False
        news, self._news = self._news, trio.Event()
        news.set()


def _fault_of(name: _Name) -> str:
    why = f"the resolver has not answered for {RESOLVER_DEADLINE:g} s" if name.pending else name.failure
    return f"can't resolve broker {name.host}: {why or 'no address'}"


def _is_address(host: str) -> bool:
    """Return whether a host of `parse_endpoint` is an IP address: its last label is a number."""
    return ":" in host or host.rpartition(".")[2].isdigit()
