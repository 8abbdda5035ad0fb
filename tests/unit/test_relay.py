"""The data plane with real sockets: joins, links, half-close, resets, back-pressure, leaks."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rtunnel.relay.ends import HANDLER_READ_BYTES, READS_A_TURN, SocketEnd
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.link import FIRST_PINGS, FRAMES_A_TURN, PING_PATIENCE, UNPROVEN_FRAMES_A_TURN, Link
from rtunnel.relay.loop import SLOW_A_TURN, Loop
from rtunnel.relay.lost import closed
from rtunnel.relay.memory import START_WINDOW
from rtunnel.relay.relay import WATCH_SECONDS
from rtunnel.relay.streampair import StreamPair
from rtunnel.relay.windows import LEAST_RTT, MAX_STREAM_WINDOW
from rtunnel.trust import pki
from rtunnel.trust.tls import client_context, server_context
from rtunnel.wire.refusal import Refusal
from rtunnel.wire.yamux import INITIAL_WINDOW
from support.owners import Recorder
from support.plumbing import (
    PATIENCE,
    Quiet,
    TestRelay,
    Tunnel,
    dial,
    kept,
    listener,
    read_all,
    read_exactly,
    reset,
    running_relay,
)
from support.polling import until

Through = Callable[[], tuple[socket.socket, socket.socket]]


class SocketHop:
    """client -> relay -> target, two sockets joined."""

    def __init__(self, relay: TestRelay) -> None:
        self.relay = relay
        self.accounts: list[Account] = []
        self.target = listener()
        self.entry = listener()
        self.address: tuple[str, int] = self.entry.getsockname()
        relay.do(lambda: relay.listen(self.entry, self._accept))

    def _accept(self, sock: socket.socket, peer: str) -> None:
        client = self.relay.end(sock, peer)
        client.set_handler(Quiet())
        client.pause()

        def connected(end: SocketEnd | None, *_: object) -> None:
            if end is None:  # reset before the relay looked
                client.abort()
                self.accounts.append(Account(0.0, ending=Ending.TARGET_RESET))
            else:
                self.relay.join(client, end, owner=Recorder(self.accounts))

        host, port = self.target.getsockname()
        self.relay.connect(host, port, PATIENCE, connected)

    def through(self) -> tuple[socket.socket, socket.socket]:
        client = dial(self.address)
        self.target.settimeout(PATIENCE)
        served = kept(self.target.accept()[0])
        served.settimeout(PATIENCE)
        return client, served


Hop = SocketHop | Tunnel


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object]:
    directory: Path = tmp_path_factory.mktemp("pki") / "pki"
    pki.init(directory, names=[])
    return server_context(directory / "broker.pem", directory / "broker.key"), client_context(directory / "ca.pem")


@pytest.fixture(params=["sockets", "plain link", "TLS link"])
def hop(request: pytest.FixtureRequest) -> Iterator[Hop]:
    """The three ways through a relay: every test below holds for each."""
    with running_relay() as near, running_relay() as far:
        if request.param == "sockets":
            yield SocketHop(near)
        else:
            tls = request.getfixturevalue("tls") if request.param == "TLS link" else None
            yield Tunnel(near, far, tls=tls)


def relay_of(hop: Hop) -> TestRelay:
    return hop.relay if isinstance(hop, SocketHop) else hop.near


def wait_for_end(hop: Hop, count: int = 1) -> Account:
    relay_of(hop).settle(lambda: len(hop.accounts) >= count)
    return hop.accounts[-1]


def test_bytes_pass_both_ways_and_are_counted(hop: Hop) -> None:
    """A small exchange arrives unchanged; the account has its bytes and says closed."""
    client, served = hop.through()
    client.sendall(b"question")
    assert read_exactly(served, 8) == b"question"
    served.sendall(b"an answer")
    assert read_exactly(client, 9) == b"an answer"
    client.close()
    served.close()
    account = wait_for_end(hop)
    assert (account.up, account.down, account.ending) == (8, 9, Ending.CLOSED)
    assert account.seconds >= 0


def test_urgent_data_stays_in_its_place(hop: Hop) -> None:
    """A byte sent by MSG_OOB arrives in line, where it was sent, in both directions."""
    client, served = hop.through()
    for sender, receiver in ((client, served), (served, client)):
        sender.sendall(b"AB")
        sender.send(b"U", socket.MSG_OOB)
        sender.sendall(b"CD")
        assert read_exactly(receiver, 5) == b"ABUCD"


def test_urgent_data_stops_no_bulk_stream(hop: Hop) -> None:
    """Reads stop in front of urgent data, and splice never gets past it: the stream goes on all the same."""
    client, served = hop.through()
    block = os.urandom(4 << 20)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_all(served)))
    reader.start()
    for _ in range(3):
        client.sendall(block)
        client.send(b"!", socket.MSG_OOB)
    client.shutdown(socket.SHUT_WR)
    reader.join(PATIENCE)
    assert received == [(block + b"!") * 3]


def test_half_close_is_kept(hop: Hop) -> None:
    """A client that shuts its sending side still gets the whole answer, however late it comes."""
    client, served = hop.through()
    client.sendall(b"all of it")
    client.shutdown(socket.SHUT_WR)
    assert read_all(served) == b"all of it"
    for piece in (b"the ", b"whole ", b"answer"):
        served.sendall(piece)
    served.close()
    assert read_all(client) == b"the whole answer"
    client.close()
    assert wait_for_end(hop).ending is Ending.CLOSED


@pytest.mark.parametrize("answer", [b"", b"an answer"])
def test_the_targets_first_byte_is_noted(answer: bytes) -> None:
    """Of two sockets: not the bytes that the handler of the client wrote, and none if the target sent none."""
    with running_relay() as relay, listener() as meeting:
        client, target = (dial(meeting.getsockname()) for _ in range(2))
        inner = [meeting.accept()[0] for _ in range(2)]
        for sock in inner:
            sock.setblocking(False)
        accounts: list[Account] = []

        def connect() -> None:
            end = relay.end(inner[0], "")
            end.write(b"connected")
            relay.join(end, relay.end(inner[1], ""), owner=Recorder(accounts))

        relay.do(connect)
        assert client.recv(9) == b"connected"
        client.sendall(b"a question")
        assert target.recv(10) == b"a question"
        target.sendall(answer)
        target.close()
        assert read_all(client) == answer
        client.close()
        relay.settle(lambda: bool(accounts))
        account = accounts[0]
        assert account.down == len(answer)
        assert account.started <= account.first <= account.ended if answer else account.first == 0


def test_half_close_by_the_target_is_kept(hop: Hop) -> None:
    """A target that is done speaking still hears the client."""
    client, served = hop.through()
    served.sendall(b"bye")
    served.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"bye"
    client.sendall(b"but wait")
    client.close()
    assert read_all(served) == b"but wait"
    served.close()
    assert wait_for_end(hop).ending is Ending.CLOSED


def test_a_fin_beside_the_first_bytes_is_not_lost(hop: Hop) -> None:
    """A target that answers and ends before the relay has looked once: the edge of its FIN is the connection's own."""
    relay = relay_of(hop) if isinstance(hop, SocketHop) else hop.far
    for _ in range(30):
        held, release = threading.Event(), threading.Event()

        def hold(held: threading.Event = held, release: threading.Event = release) -> None:
            held.set()
            release.wait(PATIENCE)

        relay.call(hold)
        assert held.wait(PATIENCE)
        client = dial(hop.address)
        release.set()
        served = kept(hop.target.accept()[0])
        served.sendall(b"bye")
        served.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"
        client.close()


@pytest.mark.parametrize("who", ["client", "target"])
def test_a_reset_is_a_reset_on_the_other_side(hop: Hop, who: str) -> None:
    """An abort is never taken for an orderly end."""
    client, served = hop.through()
    client.sendall(b"x")
    assert served.recv(1) == b"x"
    reset(client if who == "client" else served)
    with pytest.raises(ConnectionResetError):
        (served if who == "client" else client).recv(1)
    assert wait_for_end(hop).ending is (Ending.CLIENT_RESET if who == "client" else Ending.TARGET_RESET)


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_bulk_arrives_whole(hop: Hop, direction: str) -> None:
    """32 MiB with a checksum, past every buffer, pipe and window."""
    size, block = 32 << 20, os.urandom(1 << 20)
    client, served = hop.through()
    wanted = hashlib.sha256(block * (size // len(block))).hexdigest()
    pairs = {"up": [(client, served)], "down": [(served, client)], "both": [(client, served), (served, client)]}

    def send(sock: socket.socket) -> None:
        for _ in range(size // len(block)):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    digests: list[str] = []

    def receive(sock: socket.socket) -> None:
        digest = hashlib.sha256()
        while piece := sock.recv(1 << 18):
            digest.update(piece)
        digests.append(digest.hexdigest())

    threads = [threading.Thread(target=send, args=(a,)) for a, _ in pairs[direction]]
    threads += [threading.Thread(target=receive, args=(b,)) for _, b in pairs[direction]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert digests == [wanted] * len(pairs[direction])
    client.close()
    served.close()
    account = wait_for_end(hop)
    assert account.up == (0 if direction == "down" else size)
    assert account.down == (0 if direction == "up" else size)


def test_a_slow_reader_stops_only_its_own_stream(hop: Hop) -> None:
    """A stream whose reader sleeps holds a bounded amount, and others go on beside it."""
    stalled, stalled_target = hop.through()
    stalled_target.setblocking(False)
    sent = 0
    chunk = bytes(1 << 16)
    while select.select([], [stalled_target], [], 0.3)[1]:
        try:
            sent += stalled_target.send(chunk)
        except BlockingIOError:
            pass
    assert sent < 64 << 20, "nothing stops the sender"
    client, served = hop.through()
    for number in range(50):
        client.sendall(b"%04d" % number)
        assert read_exactly(served, 4) == b"%04d" % number
        served.sendall(b"ok")
        assert read_exactly(client, 2) == b"ok"
    stalled_target.setblocking(True)
    stalled_target.shutdown(socket.SHUT_WR)
    assert len(read_all(stalled)) == sent


def test_many_streams_at_once_keep_their_bytes_apart(hop: Hop) -> None:
    """64 streams with their own bytes, interleaved."""
    ends = [hop.through() for _ in range(64)]
    for number, (client, _) in enumerate(ends):
        client.sendall(b"%d:" % number + bytes([number]) * 5000)
        client.shutdown(socket.SHUT_WR)
    got = sorted(read_all(served) for _, served in ends)
    assert got == sorted(b"%d:" % n + bytes([n]) * 5000 for n in range(64))


def test_nothing_is_left_behind(hop: Hop) -> None:
    """After a mix of orderly ends and resets no pair, stream, descriptor or pipe is left."""
    warm = hop.through()
    for sock in warm:
        sock.close()
    wait_for_end(hop)
    before = descriptors()
    for number in range(60):
        client, served = hop.through()
        client.sendall(bytes(200_000 if number % 7 == 0 else 10))
        if number % 3 == 0:
            reset(client)
            served.close()
        elif number % 3 == 1:
            reset(served)
            client.close()
        else:
            read_exactly(served, 10)
            client.close()
            served.close()
    relay = relay_of(hop)
    relay.settle(lambda: len(hop.accounts) == 61 and not relay.pairs)
    if isinstance(hop, Tunnel):
        hop.far.settle(lambda: not hop.far.pairs and not hop.far_link.streams)
        relay.settle(lambda: not hop.near_link.streams)
    relay.settle(lambda: descriptors() <= before)


def descriptors() -> int:
    """How many this process has, without the sockets of the test itself that are still being collected."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_refused_connect_has_its_own_code() -> None:
    """Nobody listens: TARGET_REFUSED, with the address in the text."""
    with listener() as sock:
        host, port = sock.getsockname()
    with running_relay() as relay:
        outcome: list[tuple[object, Refusal, str]] = []
        relay.do(lambda: relay.connect(host, port, 5.0, lambda *o: outcome.append(o)))
        relay.settle(lambda: bool(outcome))
        assert outcome[0][:2] == (None, Refusal.TARGET_REFUSED)
        assert f"{host}:{port}" in outcome[0][2]


class _SourcePort(socket.socket):
    """A socket whose connect leaves from the port `source`: the choice that the kernel makes once in many times."""

    source = ("127.0.0.1", 0)

    def connect_ex(self, address: Any, /) -> int:
        """Bind before the first call."""
        if not self.getsockname()[1]:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(self.source)
        return super().connect_ex(address)


def _outcome_of_connect(
    monkeypatch: pytest.MonkeyPatch, source: tuple[str, int], target: tuple[str, int]
) -> tuple[object, Refusal, str]:
    """What a connect of the relay from this source port comes to."""
    monkeypatch.setattr(_SourcePort, "source", source)
    monkeypatch.setattr(socket, "socket", _SourcePort)
    outcome: list[tuple[object, Refusal, str]] = []
    with running_relay() as relay:
        relay.do(lambda: relay.connect(*target, 5.0, lambda *o: outcome.append(o)))
        relay.settle(lambda: bool(outcome))
    return outcome[0]


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_a_connect_that_meets_itself_is_refused(ip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel chose the silent target's port as source port: TARGET_REFUSED, and the real service gets its port."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((ip, 0))  # not listening: it only keeps the port from others
        address = probe.getsockname()[:2]
        end, code, why = _outcome_of_connect(monkeypatch, address, address)
        assert (end, code) == (None, Refusal.TARGET_REFUSED)
        assert "ECONNREFUSED" in why
    with socket.socket(family) as service:
        service.bind((ip, address[1]))  # without SO_REUSEADDR: a TIME_WAIT would refuse it
        service.listen()


def test_used_up_source_ports_are_an_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    """EADDRNOTAVAIL of a connect is this host's want of source ports, and no fault of the target or its route."""
    with listener() as target, _SourcePort() as first:
        assert first.connect_ex(target.getsockname()) == 0  # the only connection that this source port is good for
        end, code, why = _outcome_of_connect(monkeypatch, first.getsockname(), target.getsockname())
    assert (end, code) == (None, Refusal.OVERLOADED)
    assert "no free source port towards" in why and "ip_local_port_range" in why


def test_a_host_without_a_source_address_has_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """EADDRNOTAVAIL also means that IPv6 is off: that is no want of ports."""

    class NoIpv6(socket.socket):
        def connect_ex(self, address: Any, /) -> int:
            return errno.EADDRNOTAVAIL

        def connect(self, address: Any, /) -> None:
            raise OSError(errno.EADDRNOTAVAIL, "")

    monkeypatch.setattr(socket, "socket", NoIpv6)
    outcome: list[tuple[object, Refusal, str]] = []
    with running_relay() as relay:
        relay.do(lambda: relay.connect("2001:db8::1", 1, 5.0, lambda *o: outcome.append(o)))
        relay.settle(lambda: bool(outcome))
    assert outcome[0][:2] == (None, Refusal.TARGET_UNREACHABLE)
    assert "no source address" in outcome[0][2]


def test_a_connect_from_an_address() -> None:
    """It leaves from the source that is asked for."""
    with running_relay() as relay, listener() as target:
        host, port = target.getsockname()
        outcome: list[tuple[SocketEnd | None, Refusal, str]] = []
        relay.do(lambda: relay.connect(host, port, 5.0, lambda *o: outcome.append(o), source="127.9.9.9"))
        relay.settle(lambda: bool(outcome))
        served, (peer, _) = target.accept()
        served.close()
        assert peer == "127.9.9.9"
        end = outcome[0][0]
        assert end is not None
        relay.do(end.abort)


@pytest.mark.parametrize("source", ["192.0.2.7", "2001:db8::7"])
def test_a_connect_from_a_lost_address_is_stale(source: str) -> None:
    """An address that this host does not have is STALE_TARGET, and nothing is sent to whoever has it now."""
    with running_relay() as relay:
        outcome: list[tuple[object, Refusal, str]] = []
        relay.do(lambda: relay.connect(source, 80, 5.0, lambda *o: outcome.append(o), source=source))
        relay.settle(lambda: bool(outcome))
    assert outcome[0][:2] == (None, Refusal.STALE_TARGET)
    assert f"{source} is not an address of this host any more" in outcome[0][2]


def test_a_silent_target_times_out() -> None:
    """A full backlog swallows SYNs: TARGET_TIMEOUT after the deadline."""
    with socket.socket() as silent, running_relay() as relay:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        host, port = silent.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((host, port))
            fillers.append(filler)
        outcome: list[tuple[object, Refusal, str]] = []
        relay.do(lambda: relay.connect(host, port, 0.2, lambda *o: outcome.append(o)))
        relay.settle(lambda: bool(outcome))
        assert outcome[0][:2] == (None, Refusal.TARGET_TIMEOUT)
        for filler in fillers:
            filler.close()


def test_a_dead_link_resets_its_streams(tls: tuple[object, object]) -> None:
    """When the link dies, clients get a reset and the account says link_lost."""
    with running_relay() as near, running_relay() as far:
        tunnel = Tunnel(near, far, tls=tls)
        client, served = tunnel.through()
        far.do(lambda: tunnel.far_link.abort(closed("test")))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionResetError):
            served.recv(1)
        near.settle(lambda: bool(tunnel.accounts))
        assert tunnel.accounts[0].ending is Ending.LINK_LOST
        assert not near.links and not far.links


def test_an_idle_pair_ends_at_its_timeout() -> None:
    """idle: both sides are reset and the account says so; a pair that moves lives on."""
    with running_relay() as relay, listener() as meeting:
        ends, accounts = [], list[Account]()
        for _ in range(2):
            a = dial(meeting.getsockname())
            b, _ = meeting.accept()
            b.setblocking(False)
            ends.append((a, b))
        relay.do(
            lambda: relay.join(relay.end(ends[0][1], ""), relay.end(ends[1][1], ""), idle=0.1, owner=Recorder(accounts))
        )
        with pytest.raises(ConnectionResetError):
            ends[0][0].recv(1)
        relay.settle(lambda: bool(accounts))
        assert accounts[0].ending is Ending.IDLE


def join(relay: TestRelay, client: socket.socket, target: socket.socket, owner: Recorder) -> None:
    """Join two sockets."""
    relay.join(relay.end(client, ""), relay.end(target, ""), owner=owner)


def test_a_review_ends_the_pairs_that_their_owners_no_longer_allow() -> None:
    """Each owner answers for its own pair; the others go on."""
    with running_relay() as relay, listener() as meeting:
        ends, owners = [], [Recorder([]), Recorder([])]
        for owner in owners:
            a, c = dial(meeting.getsockname()), dial(meeting.getsockname())
            b, d = meeting.accept()[0], meeting.accept()[0]
            b.setblocking(False)
            d.setblocking(False)
            ends.append((a, c))
            relay.do(partial(join, relay, b, d, owner))
        owners[0].verdict = Ending.NOT_ALLOWED
        relay.do(relay.review)
        with pytest.raises(ConnectionResetError):
            ends[0][0].recv(1)
        assert [account.ending for account in owners[0].accounts] == [Ending.NOT_ALLOWED]
        ends[1][0].sendall(b"x")
        assert ends[1][1].recv(1) == b"x" and not owners[1].accounts


def test_running_out_of_descriptors_pauses_accepting() -> None:
    """EMFILE on accept: said once, accepting goes on when there are descriptors again."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running_relay() as relay, listener() as sock:
        accepted: list[socket.socket] = []
        relay.do(lambda: relay.listen(sock.dup(), lambda s, _peer: accepted.append(s)))
        client = socket.socket()
        client.settimeout(PATIENCE)
        top = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        fillers = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
        try:
            try:
                while True:
                    fillers.append(os.dup(0))
            except OSError:
                pass
            client.connect(sock.getsockname())
            relay.settle(lambda: any(event == "accept_paused" for event, _ in relay.reports))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fillers:
                os.close(fd)
        relay.settle(lambda: len(accepted) == 1)
        assert [event for event, _ in relay.reports].count("accept_paused") <= 3
        client.close()
        accepted[0].close()


class TestTalking:
    """Ends that talk."""

    def test_a_peer_that_talks_and_talks_leaves_others_their_turn(self) -> None:
        """A quarter of a megabyte is there at once; what stands in line meanwhile comes in between."""
        size = 16 * HANDLER_READ_BYTES
        heard: list[int] = []
        at: list[int] = []

        class Listens(Quiet):
            def received(self, data: bytes) -> None:
                if not heard:
                    relay.loop.soon(lambda: at.append(len(heard)))
                heard.append(len(data))

        with listener() as listening, dial(listening.getsockname()) as theirs, running_relay() as relay:
            ours, _ = listening.accept()
            ours.setblocking(False)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * size)
            theirs.settimeout(5)
            theirs.sendall(bytes(size // 2))
            relay.do(lambda: relay.end(ours, "peer").set_handler(Listens()))
            theirs.sendall(bytes(size // 2))
            relay.settle(lambda: sum(heard) == size)
            assert at and at[0] <= READS_A_TURN


class TestLoop:
    """Timers and calls."""

    def test_timers_run_in_order_and_cancelled_ones_do_not(self) -> None:
        """By time, not by the order of their making."""
        with running_relay() as relay:
            ran: list[str] = []

            def arm() -> None:
                relay.loop.after(0.03, lambda: ran.append("third"))
                relay.loop.after(0.01, lambda: ran.append("first"))
                relay.loop.after(0.02, lambda: ran.append("cancelled")).cancel()
                relay.loop.after(0.02, lambda: ran.append("second"))

            relay.do(arm)
            relay.settle(lambda: len(ran) == 3)
            assert ran == ["first", "second", "third"]

    def test_cancelled_timers_do_not_pile_up(self) -> None:
        """100,000 armed and cancelled leave a small heap."""
        with running_relay() as relay:

            def arm() -> int:
                for _ in range(100_000):
                    relay.loop.after(3600, lambda: None).cancel()
                return len(relay.loop._timers)

            assert relay.do(arm) < 2000

    def test_a_timer_that_cancels_thousands_keeps_the_count(self) -> None:
        """All are due in one turn: the first cancels most, the heap is replaced under way, the others run once each."""
        with running_relay() as relay:
            ran: list[int] = []

            def arm() -> None:
                def first() -> None:
                    for timer in timers[1000:]:
                        timer.cancel()

                relay.loop.after(0, first)
                timers = [relay.loop.after(0, lambda number=number: ran.append(number)) for number in range(4000)]  # type: ignore[misc]

            relay.do(arm)
            relay.settle(lambda: len(ran) == 1000)
            assert ran == list(range(1000))
            assert relay.do(lambda: relay.loop._cancelled) == 0

    def test_a_crash_in_a_handler_is_reported_and_the_loop_goes_on(self) -> None:
        """One bad call is one log line."""
        relay = TestRelay()
        relay.start()
        relay.call(lambda: 1 // 0)  # type: ignore[arg-type]
        assert relay.do(lambda: 7) == 7
        relay.stop()
        assert [event for event, _ in relay.reports] == ["relay_crashed"]


def pretend_rtt(link: Link, seconds: float) -> None:
    """Let a link take its path for one of this round trip; pongs under way tell it nothing any more."""
    link._pings = FIRST_PINGS + 1
    link._least_rtt = 0.0
    link.measured(seconds)


class TestUnproven:
    """A peer that has not proved itself gets few frames in a turn, and so many bytes in all."""

    PING = b"\0\2\0\1\0\0\0\0\0\0\0\1"

    def test_few_frames_are_looked_at_in_a_turn(self) -> None:
        """Each ping has an answer, so the answers in one turn are the frames of one turn."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            near.settle(lambda: tunnel.near_link.rtt > 0)

            def answered(allowance: int | None) -> int:
                link = tunnel.near_link
                link.allowance = allowance
                link._flush()
                link._take(memoryview(self.PING * 1000))
                link._unread = b""
                return len(link._out) // len(self.PING)

            assert near.do(lambda: answered(1 << 20)) == UNPROVEN_FRAMES_A_TURN
            assert near.do(lambda: answered(None)) == FRAMES_A_TURN

    @pytest.mark.parametrize("turns", [1, 10])
    def test_so_many_bytes_are_taken_in_all(self, turns: int) -> None:
        """However they are spread over turns; with the next byte the link ends."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            near.settle(lambda: tunnel.near_link.rtt > 0)  # the far end has nothing more to send
            pings = len(self.PING) * UNPROVEN_FRAMES_A_TURN * turns

            def take() -> None:  # in one call: pings of the far end must not come between
                link = tunnel.near_link
                link.allowance = pings
                for _ in range(turns):
                    link._take(memoryview(self.PING * UNPROVEN_FRAMES_A_TURN))
                assert link.allowance == 0
                assert not tunnel.downs
                link._take(memoryview(b"\0"))

            near.do(take)
            assert tunnel.downs[:1] == ["protocol error: too many bytes before the peer proved itself"]


class TestMemory:
    """What stalls is counted, for as long as it waits, and stays within the budget."""

    @staticmethod
    def fill(client: socket.socket, most: int = 1 << 26) -> int:
        """Send until nothing moves any more; how many bytes went in."""
        client.setblocking(False)
        sent = 0
        while sent < most and select.select([], [client], [], 0.2)[1]:
            try:
                sent += client.send(bytes(1 << 16))
            except BlockingIOError:
                pass
        client.setblocking(True)
        return sent

    def test_what_is_held_is_counted_and_released(self, hop: Hop) -> None:
        """A reader that sleeps: bytes are held. It wakes up, or resets: none are."""
        relay = relay_of(hop)
        relays = [hop.near, hop.far] if isinstance(hop, Tunnel) else [relay]

        def held() -> int:
            return sum(each.memory.held for each in relays)

        (client, served), (other, silent) = hop.through(), hop.through()
        sent = self.fill(client), self.fill(other)
        assert all(sent)
        assert held() > 0 or isinstance(hop, SocketHop)  # a bulk flow between sockets waits in the kernel
        assert len(read_exactly(served, sent[0])) == sent[0]
        reset(silent)
        relay.settle(lambda: held() == 0)
        client.close()

    @pytest.mark.parametrize("far_away", [True, False])
    def test_a_small_start_is_widened_out_of_the_budget(self, far_away: bool) -> None:
        """Streams of a link that begins small may send 256 KiB while there is budget, and 16 KiB when there is none.

        On a far path they may from the first words on, on a near one as soon as they have moved a half of 16 KiB.
        """
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            for relay, link in ((near, tunnel.near_link), (far, tunnel.far_link)):
                relay.settle(lambda link=link: link.rtt > 0)  # type: ignore[misc]
                relay.do(partial(pretend_rtt, link, 0.05 if far_away else 0.0001))
                relay.do(partial(setattr, link, "start_window", START_WINDOW))
            budget = near.memory.left

            def window() -> int:
                return list(tunnel.near_link.streams.values())[-1].receive_window

            def receive(sock: socket.socket, peer: socket.socket, size: int) -> None:
                peer.sendall(bytes(size))
                assert len(read_exactly(sock, size)) == size

            client, served = tunnel.through()
            receive(client, served, 1)
            assert near.do(window) == (INITIAL_WINDOW if far_away else START_WINDOW)
            receive(client, served, START_WINDOW // 2)
            near.settle(lambda: window() == INITIAL_WINDOW)
            assert near.memory.left == budget - (INITIAL_WINDOW - START_WINDOW)
            near.do(lambda: setattr(near.memory, "left", 0))
            poor, rich = tunnel.through()
            receive(poor, rich, START_WINDOW // 2)
            assert near.do(window) == START_WINDOW
            receive(poor, rich, 1 << 20)  # and bytes go on
            for sock in (client, served, poor, rich):
                sock.close()
            near.settle(lambda: near.memory.left == INITIAL_WINDOW - START_WINDOW)  # what the first one had

    def test_stalled_streams_hold_no_more_than_the_budget_allows(self) -> None:
        """Uploads whose targets read nothing: the far end holds the budget, and 16 KiB for each, at most."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            near.do(lambda: setattr(tunnel.near_link, "start_window", START_WINDOW))
            far.do(lambda: setattr(tunnel.far_link, "start_window", START_WINDOW))
            budget, streams = 128 << 10, 6
            far.memory.budget = far.memory.left = budget
            tunnel.target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients = [tunnel.through() for _ in range(streams)]
            for client, served in clients:
                served.sendall(b"!")
                assert read_exactly(client, 1) == b"!"
            for client, _ in clients:
                self.fill(client)
            held = far.do(lambda: far.memory.held)
            assert streams * START_WINDOW // 2 <= held <= budget + streams * START_WINDOW
            for client, served in clients:
                reset(client)
                served.close()
            far.settle(lambda: far.memory.held == 0 and far.memory.left == budget)


class TestWindows:
    """Windows grow for those who use them, from one budget."""

    @staticmethod
    def long_way(near: TestRelay, far: TestRelay) -> Tunnel:
        """A tunnel whose far end takes the path for one of 50 ms."""
        tunnel = Tunnel(near, far)
        far.settle(lambda: tunnel.far_link.rtt > 0)
        far.do(lambda: pretend_rtt(tunnel.far_link, 0.05))
        return tunnel

    @staticmethod
    def push(client: socket.socket, served: socket.socket, size: int) -> None:
        """So many bytes upwards, read as they come."""
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        assert len(read_exactly(served, size)) == size
        sender.join(PATIENCE)

    def test_a_fast_stream_gets_more_and_gives_it_back(self) -> None:
        """64 MiB through a link: the window has grown; when the stream is gone the budget is whole again."""
        with running_relay() as near, running_relay() as far:
            tunnel = self.long_way(near, far)
            budget = far.memory.left
            client, served = tunnel.through()
            self.push(client, served, 64 << 20)
            (stream,) = far.do(lambda: list(tunnel.far_link.streams.values()))
            assert INITIAL_WINDOW < stream.receive_window <= MAX_STREAM_WINDOW
            assert far.memory.left == budget - (stream.receive_window - INITIAL_WINDOW)
            client.close()
            served.close()
            far.settle(lambda: far.memory.left == budget)

    def test_a_used_up_budget_stops_growth_and_nothing_else(self) -> None:
        """With nothing left every window stays as it began, and bytes go on."""
        with running_relay() as near, running_relay() as far:
            tunnel = self.long_way(near, far)
            far.memory.left = 100_000
            client, served = tunnel.through()
            self.push(client, served, 32 << 20)
            (stream,) = far.do(lambda: list(tunnel.far_link.streams.values()))
            assert stream.receive_window == INITIAL_WINDOW + 100_000
            assert far.memory.left == 0

    def test_a_dead_link_gives_its_budget_back(self) -> None:
        """Grown windows of streams that die with their link are free again."""
        with running_relay() as near, running_relay() as far:
            tunnel = self.long_way(near, far)
            budget = far.memory.left
            client, served = tunnel.through()
            self.push(client, served, 32 << 20)
            assert far.memory.left < budget
            far.do(lambda: tunnel.far_link.abort(closed("test")))
            assert far.memory.left == budget

    def test_a_short_path_needs_no_window(self) -> None:
        """Over a path of microseconds a window of 16 MiB would only fill buffers: it keeps to what the path needs."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            client, served = tunnel.through()
            self.push(client, served, 64 << 20)
            (stream,) = far.do(lambda: list(tunnel.far_link.streams.values()))
            least = max(tunnel.far_link._least_rtt, LEAST_RTT)
            assert stream.receive_window <= max(INITIAL_WINDOW, 2 * 5e9 * least)

    @pytest.mark.parametrize(
        ("round_trips", "pings"),
        [
            ([0.0001], 1),  # the first one tells
            ([0.002, 0.0001], 2),  # the processes were asleep
            ([0.002] * 5, 5),  # a path of 2 ms: five tries
            ([0.05], 1),  # a far path, or a storm: not now
            ([0.05, 0.002, 0.0001], 3),  # the second one at a look of the heartbeat
        ],
    )
    def test_pings_follow_each_other_until_one_met_no_sleeper(self, round_trips: list[float], pings: int) -> None:
        """A near link whose first pings were slow is measured as a near one; a far link costs five pings."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            far.settle(lambda: tunnel.far_link.rtt > 0)

            def measure() -> tuple[int, float]:
                link = tunnel.far_link
                link._pings, link._least_rtt = 0, 0.0
                answered = 0
                for round_trip in round_trips:
                    if link._pings == answered:  # the pong asked for no other ping: a look of the heartbeat does
                        assert link._measures_on()
                        link._measure()
                    answered = link._pings
                    link._ping_sent = link.loop.now - round_trip
                    link.on_pong(answered)
                return link._pings, link._least_rtt

            sent, least = far.do(measure)
            assert sent == pings
            assert least == pytest.approx(min(round_trips))

    @pytest.mark.parametrize(("waited", "lost"), [(PING_PATIENCE + 1, 1), (PING_PATIENCE - 1, 0)])
    def test_a_ping_without_an_answer_is_counted_once(self, waited: float, lost: int) -> None:
        """The next ping, or the link's end, finds that it waits for too long; a late answer is one after all."""
        with running_relay() as near, running_relay() as far:
            tunnel = Tunnel(near, far)
            far.settle(lambda: tunnel.far_link.rtt > 0)

            def measure() -> tuple[int, int, int]:
                link, live = tunnel.far_link, far.links
                link._pings = FIRST_PINGS + 1
                before, answers = live.pings, sum(live.round_trips.counts)
                link._ping_sent = link.loop.now - waited
                link._measure()
                link.on_pong(link._pings)
                link.on_pong(link._pings)  # the same answer twice counts once
                link._ping_sent = link.loop.now - waited
                link.close(closed("over"))
                return live.pings - before, live.pings_lost, sum(live.round_trips.counts) - answers

            assert far.do(measure) == (1, 2 * lost, 1)

    def test_a_neighbour_makes_a_grown_window_small_again(self) -> None:
        """On a near path a window that grew while its stream was alone shrinks when another one speaks as well."""
        with running_relay() as near, running_relay() as far:
            tunnel = self.long_way(near, far)
            budget = far.memory.left
            client, served = tunnel.through()
            self.push(client, served, 32 << 20)
            (stream,) = far.do(lambda: list(tunnel.far_link.streams.values()))
            assert stream.receive_window > INITIAL_WINDOW
            far.do(lambda: pretend_rtt(tunnel.far_link, 0.0001))
            neighbour, met = tunnel.through()
            for _ in range(200):
                neighbour.sendall(b"ping")
                assert read_exactly(met, 4) == b"ping"
                self.push(client, served, 1 << 20)
                if stream.receive_window == INITIAL_WINDOW:
                    break
            assert stream.receive_window == INITIAL_WINDOW
            assert far.memory.left == budget
            self.push(client, served, 8 << 20)  # and bytes go on

    def test_a_stalled_stream_holds_no_more_than_its_window(self) -> None:
        """What a reader that sleeps leaves in this process is at most its window, grown or not."""
        with running_relay() as near, running_relay() as far:
            tunnel = self.long_way(near, far)
            client, served = tunnel.through()
            self.push(client, served, 32 << 20)
            client.setblocking(False)
            while select.select([], [client], [], 0.3)[1]:
                try:
                    client.send(bytes(1 << 16))
                except BlockingIOError:
                    pass
            (stream,) = far.do(lambda: list(tunnel.far_link.streams.values()))
            (pair,) = far.pairs
            assert isinstance(pair, StreamPair)
            assert len(pair._held) <= stream.receive_window


def test_pairs_that_come_to_stay_get_keep_alive() -> None:
    """On every socket of a pair, sockets and streams alike; and not before."""
    with running_relay() as near, running_relay() as far:
        Tunnel(near, far).through()
        until(lambda: far.do(lambda: len(far.pairs)) == 1)  # the target hears of it before the relay does
        (pair,) = far.do(lambda: list(far.pairs))

        def probed() -> list[int]:
            return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for sock in pair.sockets]

        far.do(far._renew_settings)
        assert probed() == [0]
        pair.account.started -= WATCH_SECONDS
        far.do(far._renew_settings)
        assert probed() == [1]


def test_a_connect_that_is_done_as_the_relay_stops_is_dropped() -> None:
    """Nothing would end the connection any more: it is closed, and nobody is told."""
    told: list[object] = []
    with running_relay() as relay, listener() as meeting:

        def connect_and_stop() -> None:
            host, port = meeting.getsockname()
            relay.connect(host, port, 5.0, lambda *outcome: told.append(outcome))
            relay._end_all()

        relay.call(connect_and_stop)
        met = kept(meeting.accept()[0])
        met.settimeout(PATIENCE)
        assert met.recv(1) == b""
    assert not told


def test_an_end_that_broke_while_it_was_told_is_not_joined() -> None:
    """The client is reset while the reply to it is sent: the join that follows at once ends both sides, and says so."""
    with running_relay() as relay, listener() as meeting:
        client, target = dial(meeting.getsockname()), None
        accepted = [meeting.accept()[0]]
        target = dial(meeting.getsockname())
        accepted.append(meeting.accept()[0])
        for sock in accepted:
            sock.setblocking(False)
        ends = relay.do(lambda: [relay.end(sock, "") for sock in accepted])
        quiet = Quiet()
        relay.do(lambda: ends[0].set_handler(quiet))
        relay.do(ends[0].pause)
        accounts: list[Account] = []

        def tell_and_join() -> None:
            reset(client)
            while not ends[0].broken:  # the first words after the reset fail
                ends[0].write(b"connected")
            relay.join(ends[0], ends[1], owner=Recorder(accounts))

        relay.do(tell_and_join)
        with pytest.raises(ConnectionResetError):
            target.recv(1)
        relay.settle(lambda: not relay.pairs and accepted[0].fileno() == accepted[1].fileno() == -1)
        assert [account.ending for account in accounts] == [Ending.CLIENT_RESET]


def test_what_takes_long_stands_in_line() -> None:
    """Between two pieces of it at most a few others of it are done before everybody else has a turn."""
    loop = Loop(on_crash=lambda crash: None)
    done: list[str] = []
    for _ in range(20):
        loop.enqueue_slow(lambda: done.append("long"))

    def other() -> None:
        done.append("other")
        if done.count("long") < 20:
            loop.soon(other)
        else:
            loop.stop()

    loop.soon(other)
    loop.run()
    runs = "".join("l" if word == "long" else " " for word in done).split()
    assert done.count("long") == 20
    assert max(map(len, runs)) <= SLOW_A_TURN


def test_a_listener_that_finishes_serves_its_queue_first() -> None:
    """Clients that the kernel has taken, some of which have said nothing yet, are accepted, and not reset."""
    with running_relay() as relay:
        entry = kept(listener())
        accepted: list[socket.socket] = []
        waiting = relay.do(lambda: relay.listen(entry, lambda sock, _: accepted.append(kept(sock)), client_speaks=True))
        address: tuple[str, int] = entry.getsockname()
        relay.do(waiting.hold)
        relay.do(waiting.accept_silent)
        clients = [dial(address) for _ in range(150)]  # more than one turn takes
        for client in clients[::2]:
            client.sendall(b"x")
        relay.do(lambda: relay.unlisten(waiting, serve_queue=True))
        assert len(accepted) == len(clients)
        for sock in accepted:
            sock.close()
        assert [read_all(client) for client in clients[1::2]] == [b""] * 75, "an end, not a reset"
        with pytest.raises(ConnectionRefusedError):
            dial(address)
        assert waiting.bound == address, "a gateway that drains still reports where it listened"
