"""The port allocator: plain cases, then a state machine against a model with restarts, foreign programs and outages."""

from __future__ import annotations

import errno
import random
import time
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import COUNTER_BITS, NodeRecord, PortLease, Registration
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.ports import AVOID, PortAllocator, PortsExhausted, PortTaken
from support.effort import times

TTL, QUARANTINE = 15.0, 60.0
IP, NODE = "10.0.0.1", "n1"


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Source(MemoryRegistry):
    """A memory registry that can be out of reach, and counts what it is asked."""

    away = False
    asked = 0

    def lease_port(self, lease: PortLease) -> bool:
        self._ask()
        return super().lease_port(lease)

    def release_port(self, lease: PortLease) -> None:
        self._ask()
        super().release_port(lease)

    def last_port(self, node: str, owner: str) -> int | None:
        self._ask()
        return super().last_port(node, owner)

    def _ask(self) -> None:
        self.asked += 1
        if self.away:
            raise RegistryUnavailable("away")


@dataclass(frozen=True)
class Sock:
    """A socket that holds a port until it is closed."""

    port: int
    bound: set[int]

    def close(self) -> None:
        self.bound.remove(self.port)


class Host:
    """A machine: the registry, its sockets, and one broker's allocator. `beside`: another node on the same machine."""

    def __init__(
        self, first: int = 100, last: int = 104, *, node: str = NODE, own: tuple[int, int] | None = None,
        beside: Host | None = None,
    ) -> None:  # fmt: skip
        self.clock: Clock = beside.clock if beside else Clock()
        self.registry: Source = beside.registry if beside else Source(TTL, QUARANTINE, self.clock)
        self.bound: set[int] = beside.bound if beside else set()
        self.foreign: set[int] = set()
        self.range = (first, last)
        self.node = node
        self.own = own
        self.restart()

    def restart(self) -> None:
        """The broker starts (again): its sockets are closed, its memory is gone."""
        self.bound.clear()
        record = NodeRecord(node=self.node, host="h", ip=IP, incarnation=0)
        self.incarnation = self.registry.start_node(record)
        self.counter = 0
        self.ports = PortAllocator(
            self.registry, IP, *self.range, QUARANTINE, self.clock, own=self.own, rng=random.Random(1)
        )

    def epoch(self) -> int:
        self.counter += 1
        return self.incarnation << COUNTER_BITS | self.counter

    def bind(self, port: int) -> Sock:
        if port in self.foreign or port in self.bound:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        self.bound.add(port)
        return Sock(port, self.bound)

    def allocate(self, owner: str) -> PortLease:
        port, bound, lease = self.ports.allocate(owner, self.epoch(), self.node, self.bind)
        assert (lease.port, bound.port) == (port, port)
        return lease

    def allocate_fixed(self, port: int, owner: str) -> PortLease:
        return self.ports.allocate_fixed(port, owner, self.epoch(), self.node, self.bind)[2]

    def release(self, lease: PortLease) -> None:
        self.bound.remove(lease.port)
        self.ports.release(lease)


@pytest.fixture
def host() -> Host:
    return Host()


def test_every_port_is_given_out_once_and_then_the_reason_is_told(host: Host) -> None:
    host.foreign = {102}
    leases = [host.allocate(f"default/{n}") for n in range(3)]
    host.release(leases[0])
    host.allocate("default/3")
    with pytest.raises(PortsExhausted) as caught:
        host.allocate("default/4")
    assert str(caught.value) == (
        "no port of 10.0.0.1 in 100-104 is free: 3 in use, 1 in quarantine, 1 taken by other programs; "
        "widen the port range, or wait for the quarantine to end"
    )


def test_same_owner_gets_its_port_back_during_and_after_quarantine(host: Host) -> None:
    lease = host.allocate("default/a")
    host.release(lease)
    again = host.allocate("default/a")
    assert again.port == lease.port
    host.release(again)
    host.clock.now += QUARANTINE
    assert host.allocate("default/a").port == lease.port


def test_same_owner_gets_its_port_back_after_a_restart(host: Host) -> None:
    ports = {owner: host.allocate(owner).port for owner in ("default/a", "default/b", "default/c")}
    host.restart()
    assert {owner: host.allocate(owner).port for owner in reversed(ports)} == ports


def test_quarantine_ends(host: Host) -> None:
    for lease in [host.allocate(f"default/{n}") for n in range(5)]:
        host.release(lease)
    host.clock.now += QUARANTINE - 1
    with pytest.raises(PortsExhausted, match="5 in quarantine"):
        host.allocate("default/z")
    host.clock.now += 1
    host.allocate("default/z")


def test_fixed_port_is_had_or_the_reason_is_told(host: Host) -> None:
    lease = host.allocate_fixed(103, "default/a")
    with pytest.raises(PortTaken, match="in use for default/a"):
        host.allocate_fixed(103, "default/b")
    host.release(lease)
    with pytest.raises(PortTaken, match="in quarantine after default/a"):
        host.allocate_fixed(103, "default/b")
    host.release(host.allocate_fixed(103, "default/a"))
    with pytest.raises(PortTaken, match="outside of 100-104"):
        host.allocate_fixed(99, "default/a")
    host.foreign.add(101)
    with pytest.raises(PortTaken, match="taken by another program"):
        host.allocate_fixed(101, "default/a")
    host.foreign.clear()
    host.clock.now += QUARANTINE
    host.allocate_fixed(101, "default/a")
    host.restart()
    with pytest.raises(PortTaken, match="in the registry for another agent"):
        host.allocate_fixed(101, "default/b")


def test_bind_failure_that_is_ours_is_told_and_leaks_nothing(host: Host) -> None:
    def full(port: int) -> Sock:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        host.ports.allocate("default/a", host.epoch(), NODE, full)
    counts = host.ports.counts()
    assert (counts.in_use, counts.free + counts.quarantined) == (0, 5)
    host.allocate("default/a")


def test_port_taken_by_another_program_is_tried_again_later(host: Host) -> None:
    host.foreign = set(range(100, 105))
    with pytest.raises(PortsExhausted, match="5 taken by other programs"):
        host.allocate("default/a")
    asked = host.registry.asked
    with pytest.raises(PortsExhausted):
        host.allocate("default/a")
    assert host.registry.asked - asked <= 3
    host.foreign.clear()
    host.clock.now += max(AVOID, QUARANTINE)
    host.allocate("default/b")


def test_release_works_without_the_registry_and_the_owner_gets_its_port_back(host: Host) -> None:
    lease = host.allocate("default/a")
    host.registry.away = True
    host.release(lease)
    assert host.ports.counts().quarantined == 1
    assert host.allocate("default/a").port == lease.port
    with pytest.raises(RegistryUnavailable):
        host.allocate("default/b")
    counts = host.ports.counts()
    assert (counts.in_use, counts.free) == (1, 4)


def test_releasing_twice_or_late_does_nothing(host: Host) -> None:
    lease = host.allocate("default/a")
    host.release(lease)
    again = host.allocate("default/a")
    host.ports.release(lease)
    assert not host.ports.rest(lease)
    assert host.ports.counts().in_use == 1
    host.release(again)


@pytest.fixture
def two() -> tuple[Host, Host]:
    """Two nodes on one machine and IP, which share a range: each gives out its part at random."""
    one = Host(100, 109, node="n.1", own=(100, 104))
    return one, Host(100, 109, node="n.2", own=(105, 109), beside=one)


def test_nodes_of_one_ip_give_out_their_own_part_and_any_fixed_port(two: tuple[Host, Host]) -> None:
    one, other = two
    assert {one.allocate(f"default/{n}").port for n in range(4)} <= set(range(100, 105))
    lease = one.allocate_fixed(107, "default/f")
    assert {other.allocate(f"default/{n}").port for n in range(4, 8)} == {105, 106, 108, 109}
    with pytest.raises(PortsExhausted, match=r"in 105-109 is free: 4 in use"):
        other.allocate("default/8")
    one.release(lease)
    one.clock.now += QUARANTINE
    assert (one.ports.counts().free, one.allocate("default/9").port in range(100, 105)) == (1, True)
    with pytest.raises(PortsExhausted, match=r"in 100-104 is free: 5 in use"):
        one.allocate("default/10")  # not even 107, which it had before


def test_a_port_is_remembered_for_each_node_of_one_ip(two: tuple[Host, Host]) -> None:
    one, other = two
    ports = [host.allocate("default/a").port for host in two]
    for host in two:
        host.restart()
    assert [host.allocate("default/a").port for host in (other, one)] == ports[::-1]


def test_a_fixed_port_stays_with_the_node_that_has_it_and_moves_when_that_is_gone(two: tuple[Host, Host]) -> None:
    """Both sessions of one agent may be on one machine and ask for the same: the registry keeps telling who has it."""
    one, other = two
    lease = one.allocate_fixed(107, "default/a")
    with pytest.raises(PortTaken, match="taken by another program"):
        other.allocate_fixed(107, "default/a")
    thief = msgspec.structs.replace(lease, owner="default/b")
    assert not one.registry.lease_port(thief)
    one.bound.clear()  # kill -9; its lease stands
    other.clock.now += AVOID
    assert other.allocate_fixed(107, "default/a").node == "n.2"
    one.ports.release(lease)  # a late word of the dead
    other.clock.now += QUARANTINE
    assert not one.registry.lease_port(msgspec.structs.replace(thief, node="n.2"))


def test_a_refused_lease_closes_the_socket(two: tuple[Host, Host]) -> None:
    one, other = two
    one.release(one.allocate_fixed(107, "default/a"))
    with pytest.raises(PortTaken, match="in the registry for another agent"):
        other.allocate_fixed(107, "default/b")
    other.registry.away = True
    with pytest.raises(RegistryUnavailable):
        other.allocate("default/b")
    assert not one.bound


def test_bad_range_is_refused() -> None:
    for first, last in ((0, 10), (10, 9), (1, 65536)):
        with pytest.raises(ValueError, match="port range"):
            PortAllocator(MemoryRegistry(), IP, first, last, QUARANTINE)


def test_fifty_thousand_ports_are_given_out_in_constant_time() -> None:
    """No call looks through the range: the last ten thousand cost about as much as the first."""
    ports = PortAllocator(MemoryRegistry(), IP, 10_000, 59_999, QUARANTINE)
    times = []
    for n in range(50_000):
        if n % 10_000 == 0:
            times.append(time.process_time())
        ports.allocate(f"default/{n}", n, NODE, lambda port: Sock(port, set()))
    times.append(time.process_time())
    assert ports.counts().in_use == 50_000
    assert times[5] - times[4] < 5 * (times[1] - times[0]) + 0.5


class Allocation(RuleBasedStateMachine):
    """No port twice; quarantine holds for all but the last owner; that owner gets its port back."""

    OWNERS = st.sampled_from([f"default/{name}" for name in "abcdefg"])
    PORTS = st.integers(100, 104)

    @initialize()
    def begin(self) -> None:
        self.host = Host()
        self.held: dict[int, PortLease] = {}
        self.freed: dict[int, tuple[str, float]] = {}  # port -> last owner, when
        self.untold: set[int] = set()  # of these, what only the broker knows
        self.last: dict[str, int] = {}  # owner -> the port that it asked for or got last

    def resting(self, port: int) -> str | None:
        """Who alone may have this port now, by the model."""
        owner, when = self.freed.get(port, ("", -1e9))
        return owner if self.host.clock.now - when < QUARANTINE else None

    def took(self, lease: PortLease) -> None:
        assert lease.port not in self.held
        assert lease.port in self.host.bound
        assert lease.port not in self.host.foreign
        assert self.resting(lease.port) in (None, lease.owner)
        self.held[lease.port] = lease
        self.freed.pop(lease.port, None)
        self.last[lease.owner] = lease.port

    def must_have_back(self, owner: str) -> int | None:
        """The port that this owner had last, if it rests for it and is the only one that does."""
        resting = [port for port in self.freed if self.resting(port) == owner]
        return resting[0] if resting == [self.last.get(owner)] and resting[0] not in self.host.foreign else None

    @rule(owner=OWNERS)
    def allocate(self, owner: str) -> None:
        back = self.must_have_back(owner)
        open_to_all = {
            port
            for port in range(100, 105)
            if port not in self.held and port not in self.host.foreign and self.resting(port) is None
        }
        try:
            lease = self.host.allocate(owner)
        except PortsExhausted:
            # What foreign programs or the registry kept us from a moment ago is not tried again at once.
            assert back is None
            assert not open_to_all or self.host.ports.counts().foreign or self.host.ports.counts().quarantined
            self.last.pop(owner, None)
        except RegistryUnavailable:
            assert self.host.registry.away
        else:
            assert back in (None, lease.port), "the owner's own port was free for it"
            self.took(lease)

    @rule(owner=OWNERS, port=PORTS)
    def allocate_fixed(self, owner: str, port: int) -> None:
        free = port not in self.held and port not in self.host.foreign and self.resting(port) in (None, owner)
        try:
            lease = self.host.allocate_fixed(port, owner)
        except PortTaken as error:
            assert not free or "registry" in str(error) or "quarantine" in str(error)
            self.last[owner] = port
        except RegistryUnavailable:
            assert self.host.registry.away
        else:
            assert free
            self.took(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        self.host.release(lease)
        self.freed[lease.port] = (lease.owner, self.host.clock.now)
        if self.host.registry.away:
            self.untold.add(lease.port)
        else:
            self.untold.discard(lease.port)

    @rule(seconds=st.sampled_from([1.0, 14.0, AVOID, QUARANTINE - 1, QUARANTINE]))
    def wait(self, seconds: float) -> None:
        """Time passes, in beats while the registry is there."""
        end = self.host.clock.now + seconds
        while self.host.clock.now < end:
            self.host.clock.now = min(end, self.host.clock.now + 5)
            self.beat()

    def beat(self) -> None:
        if not self.host.registry.away:
            record = NodeRecord(node=NODE, host="h", ip=IP, incarnation=self.host.incarnation)
            leases = tuple(self.held.values())
            self.host.registry.beat(record, [Registration(lease.epoch, (), (lease,)) for lease in leases])

    @rule(port=PORTS)
    def another_program_comes_or_goes(self, port: int) -> None:
        if port in self.host.foreign:
            self.host.foreign.remove(port)
        elif port not in self.held:
            self.host.foreign.add(port)

    @rule()
    def registry_comes_or_goes(self) -> None:
        self.host.registry.away = not self.host.registry.away

    @precondition(lambda self: not self.host.registry.away)
    @rule()
    def broker_restarts(self) -> None:
        self.beat()
        for port in self.untold & self.freed.keys():  # nobody knows of these any more: docs/registry.md, "trouble"
            del self.freed[port]
        for port, lease in self.held.items():
            self.freed[port] = (lease.owner, self.host.clock.now)
        self.held.clear()
        self.host.restart()

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "host"):
            counts = self.host.ports.counts()
            assert counts.in_use == len(self.held)
            assert counts.free + counts.in_use + counts.quarantined + counts.foreign == 5
            assert self.host.bound == set(self.held)


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=times(80), stateful_step_count=40, deadline=None)
