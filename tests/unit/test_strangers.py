"""Who makes room among connections that have proved nothing: a source cannot keep the others out."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from rtunnel.strangers import SILENT_GRACE, STALLED_GRACE, Place, Strangers

DEADLINE = 10.0


@dataclass(eq=False)
class Peer:
    """A connection; `spoke`: the peer has sent something."""

    spoke: bool = False
    place: Place[Peer] | None = None
    refused: bool = False


@dataclass
class Port:
    """A port as brokers have them: it refuses a newcomer, or ends whoever is the weakest."""

    strangers: Strangers[Peer]
    ended: list[Peer] = field(default_factory=list)

    def connect(self, source: str, now: float, *, spoke: bool = False) -> Peer:
        """One more; `refused` when it found no place."""
        peer = Peer(spoke)
        if not self.strangers.has_room(source):
            weakest = self.strangers.weakest(source, now)
            if weakest is None:
                peer.refused = True
                return peer
            self.end(weakest)
        peer.place = self.strangers.enter(source, peer, now)
        return peer

    def end(self, peer: Peer) -> None:
        """It is over, or proved."""
        assert peer.place is not None
        peer.place.release()
        peer.place = None
        self.ended.append(peer)

    def expire(self, now: float) -> None:
        """Deadlines."""
        for place in list(self.strangers):
            if now - place.since >= DEADLINE:
                self.end(place.entry)


def port(most: int = 1024, share: int = 256) -> Port:
    """An empty one."""
    return Port(Strangers(most, share, lambda peer: not peer.spoke))


def test_twenty_flooding_sources_keep_no_agent_out() -> None:
    """160 connections a second from 20 addresses, which say nothing or stall: each of 60 agents gets in, and stays."""
    here = port()
    for spoke in (False, True):
        for tick in range(600):
            now = tick / 10 + (1000.0 if spoke else 0.0)
            here.expire(now)
            for number in range(16):
                here.connect(f"10.0.0.{(tick * 16 + number) % 20}", now, spoke=spoke)
            if tick % 10 == 0:
                agent = here.connect("10.1.0.7", now)
                assert not agent.refused
                agent.spoke = True
            elif tick % 10 == 9:  # its proof comes after a slow handshake
                assert agent not in here.ended
                here.end(agent)


def test_one_source_has_its_share() -> None:
    """It fills its own share; more of it are refused, or end its own silent ones. Others find places."""
    here = port(8, 4)
    first = [here.connect("a", 0.0) for _ in range(4)]
    assert here.connect("a", SILENT_GRACE / 2).refused
    other = here.connect("b", SILENT_GRACE / 2)
    assert not other.refused
    assert not here.connect("a", SILENT_GRACE + 0.01).refused
    assert here.ended == [first[0]]


def test_who_has_said_something_has_more_time() -> None:
    """A silent one ends before an older one that speaks; one that stalls ends later; others never."""
    here = port(3, 3)
    older, silent = here.connect("a", 0.0, spoke=True), here.connect("a", 0.0)
    here.connect("a", 0.0, spoke=True)
    assert here.connect("b", SILENT_GRACE / 2).refused
    assert not here.connect("b", SILENT_GRACE + 0.01).refused
    assert here.ended == [silent]
    assert here.connect("b", STALLED_GRACE - 0.01).refused
    assert not here.connect("b", STALLED_GRACE + 0.01).refused
    assert here.ended == [silent, older]


def test_without_a_share_a_source_may_have_everything() -> None:
    """A share of 0 is for a VIP that hides the sources."""
    here = port(8, 0)
    assert not any(here.connect("vip", 0.0).refused for _ in range(8))
    assert here.connect("vip", 0.0).refused


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.floats(0, 1)), max_size=80), st.integers(1, 6))
def test_places_are_counted_right(steps: list[tuple[int, bool, float]], most: int) -> None:
    """Whatever comes and goes: never more than `most`, nor than a share; the largest source is who makes room."""
    here, now = port(most, max(1, most // 2)), 0.0
    alive: list[Peer] = []
    for source, spoke, pause in steps:
        now += pause
        before = {place.entry: place.source for place in here.strangers}
        peer = here.connect(str(source), now, spoke=spoke)
        alive = [other for other in [*alive, peer] if other.place is not None]
        sources = [other.place.source for other in alive if other.place is not None]
        assert len(here.strangers) == len(alive) <= most
        assert all(sources.count(word) <= here.strangers.share for word in sources)
        for gone in before.keys() - {place.entry for place in here.strangers}:
            count = list(before.values()).count(before[gone])
            assert before[gone] == str(source) or count == max(map(list(before.values()).count, before.values()))
        assert {id(p) for p in here.strangers.silent(now)} <= {id(p) for p in alive if not p.spoke}
