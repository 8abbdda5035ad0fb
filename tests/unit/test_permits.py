"""Permits are given back exactly once, whatever happens: a model counts beside them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from rtunnel.config import LimitsConfig
from rtunnel.counts import StreamCounts, StreamPermit
from rtunnel.relay.join import NO_OWNER, Account, Ending, Pair
from rtunnel.strangers import Strangers
from rtunnel.wire.refusal import Refused
from rtunnel_socks.client import ClientPermit
from rtunnel_socks.limits import Limits


@dataclass
class Carrier:
    """A session as its streams see it."""

    streams: int = 0


@dataclass
class Clients:
    """The counts of a gateway as its clients see them."""

    clients: int = 0


#: Which permit, and what happens to it.
STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["join", "release", "ended"])), max_size=40)


@given(STEPS, st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_stream_is_counted_once_and_given_back_once(steps: list[tuple[int, str]], joined: list[bool]) -> None:
    """Join, release and the pair's end, in any order and any number of times."""
    counts, carrier = StreamCounts(), Carrier()
    permits = [StreamPermit(counts, carrier, joined=is_joined) for is_joined in joined]
    states = ["pair" if is_joined else "waits" for is_joined in joined]
    endings = 0
    for which, step in steps:
        permit = permits[which]
        if step == "join":
            permit.join()
            states[which] = "pair" if states[which] == "waits" else states[which]
        elif step == "release":
            permit.release()
            states[which] = "over"
        else:
            permit.release(Account(0.0, up=1, down=2, ending=Ending.IDLE))
            endings += states[which] == "pair"
            states[which] = "over"
        assert carrier.streams == sum(state != "over" for state in states)
        assert counts.streams == states.count("pair")
        assert (counts.bytes_up, counts.bytes_down) == (endings, 2 * endings)
        assert counts.endings == ({"idle": endings} if endings else {})
    for permit in permits:
        permit.release()
    assert (carrier.streams, counts.streams) == (0, 0)


def test_a_gateways_stream_has_no_carrier() -> None:
    """It counts from the join to the end."""
    counts = StreamCounts()
    permit = StreamPermit(counts)
    assert (counts.streams, counts.accepted) == (1, 1)
    permit.release(Account(0.0))
    permit.release(Account(0.0))
    assert (counts.streams, counts.accepted, counts.endings) == (0, 1, {"closed": 1})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=40))
def test_a_place_is_given_back_once(steps: list[tuple[str, bool]]) -> None:
    """Whoever gives it back, and however often."""
    strangers: Strangers[object] = Strangers(100, 100, lambda _: True)
    held: list[Any] = []
    gone: list[Any] = []
    for source, comes in steps:
        if comes:
            held.append(strangers.enter(source, object(), 0.0))
        elif held:
            gone.append(held.pop(0))
        for place in gone:
            place.release()
        assert len(strangers) == len(held)
        assert set(strangers) == set(held)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["client", "stream", "release"]),
            st.sampled_from(["10.0.0.1", "10.0.0.2"]),
            st.sampled_from([None, "alice"]),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_limits_are_kept_and_return_to_nothing(steps: list[tuple[str, str, str | None, int]]) -> None:
    """Never more than allowed, never less than held; nothing is known any more in the end."""
    limits = Limits(LimitsConfig(source_handshakes=2, source_streams=3, user_streams=2))
    counts = Clients()
    clients: list[tuple[str, ClientPermit]] = []
    streams: list[tuple[str, str | None, Any]] = []
    for step, peer, user, which in steps:
        if step == "client":
            fits = sum(p == peer for p, _ in clients) < 2
            try:
                clients.append((peer, ClientPermit(counts, limits.acquire_client(peer, 0.0))))
            except Refused:
                assert not fits
            else:
                assert fits
        elif step == "stream":
            fits = sum(p == peer for p, _, _ in streams) < 3
            fits = fits and (user is None or sum(u == user for _, u, _ in streams) < 2)
            try:
                streams.append((peer, user, limits.acquire_stream(peer, user, 0.0)))
            except Refused:
                assert not fits
            else:
                assert fits
        else:
            over: list[Any] = [held.pop(which % len(held))[-1] for held in (clients, streams) if held]
            for permit in [*over, *over]:
                permit.release(0.0)
        assert counts.clients == len(clients)
    for permit in [*(entry[-1] for entry in clients), *(entry[-1] for entry in streams)]:
        permit.release(0.0)
    assert (counts.clients, limits.known) == (0, 0)


def test_bytes_of_live_streams_count_and_never_fall() -> None:
    """A pair that is no longer live and not yet counted hides its bytes for a moment only."""
    counts = StreamCounts(bytes_up=10)
    account = Account(0.0, up=5, down=-9)  # its first words are not sent yet
    pair = Pair(cast(Any, SimpleNamespace(now=0.0)), set(), 0.0, NO_OWNER)
    pair.account = account
    assert counts.moved({pair}) == (15, 0)
    account.up, account.down = 7, 3
    assert counts.moved({pair}) == (17, 3)
    assert counts.moved(set()) == (17, 3)
    StreamPermit(counts).release(account)
    assert counts.moved(set()) == (17, 3)
    assert counts.status(set())["bytes_up"] == 17
