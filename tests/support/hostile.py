"""Worlds on the simulated kernel: clients, a way through relays, targets, and an oracle for what came out.

`play(tape)` builds the world that the first bytes of the tape describe, lets the rest of the tape decide what happens
(who runs, how much moves, who resets), then lets everything run to its end without hostility, and looks:

- what a peer has read is a prefix of what the other one has sent;
- a peer that sees FIN has read everything, and the other one has sent FIN: no reset looks like an orderly end;
- nothing is stuck: what can move has moved, and both peers of a broken way were told;
- after an orderly end the account has the bytes that the peers saw; after any other end no byte that was not sent;
- no socket, pair or pipe is left.
"""

from __future__ import annotations

import _ssl
import ctypes
import random
import ssl
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from rtunnel.relay import link as link_module
from rtunnel.relay.ends import End, EndHandler, SocketEnd
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.link import Handshake, Link
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Relay
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire.messages import DIAL_ALPN
from support.kernel import Choices, Kernel, Side, SimEpoll
from support.owners import Recorder

#: What peers send: a piece of this at an offset of their own, so that a byte in the wrong place shows.
_BLOCK: Final = random.Random(7).randbytes(1 << 21)
_SIZES: Final = (0, 1, 3, 50, 700, 4100, 5000, 20_000, 140_000, 300_000)
_CAPACITIES: Final = (7, 300, 4096, 70_000, 1 << 20)
#: Rounds of the last phase without any movement, after which the world is at rest.
_STILL: Final = 4
#: What a relay says itself is short: a reply, a page for people.
_MOST_WORDS: Final = 5000
#: Rounds after which a world that still moves is a loop.
_MOST_ROUNDS: Final = 400_000


_OPENSSL: Final = ctypes.CDLL(_ssl.__file__)
#: Frames of a link's turn: as it is, and so few that they often wait for the next one.
_FRAMES: Final = (link_module.FRAMES_A_TURN, link_module.FRAMES_A_TURN, 2)
_SSL_AT: Final = 24  # in CPython's PySSLSocket: behind its head, and a reference to the socket


class Will(Enum):
    """How a peer ends when it has written all."""

    FIN = 0
    STAY = 1  # it keeps its side open until the end
    RESET = 2
    CLOSE = 3  # both directions at once, whatever is still on its way to it


@cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server's and client's. Ed25519: its signatures have one length, so that a tape gives the same run each time."""
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(7).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    certificate = builder.sign(key, None)
    pem = serialization.Encoding.PEM
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "both.pem"
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file.write_bytes(secret + certificate.public_bytes(pem))
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(file)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols([DIAL_ALPN])
    return server, client


@dataclass
class Peer:
    """A program at one end of a way."""

    side: Side
    content: bytes
    will: Will
    urgent: bool = False
    written: int = 0
    read: bytearray = field(default_factory=bytearray)
    saw_fin: bool = False
    saw_reset: bool = False
    ended: bool = False  # its will is done

    def write(self, most: int) -> bool:
        """Write up to `most` bytes, then do its will; False when nothing moved."""
        side = self.side
        if self.ended or side.dead:
            return False
        if self.written == len(self.content):
            return self.end()
        size = min(most, side.capacity - len(side.sent), len(self.content) - self.written)
        if size <= 0:
            return False
        data = self.content[self.written : self.written + size]
        if self.urgent and side.urgent_sent < 0:
            calm = side.kernel.choices.below(size)
            self.urgent = False
            side.sent += data[:calm]
            side.send_urgent(data[calm : calm + 1])
            data = data[calm + 1 :]
        side.sent += data
        self.written += size
        return True

    def end(self) -> bool:
        """Do its will."""
        if self.ended or self.will is Will.STAY:
            return False
        self.ended = True
        if self.will is Will.FIN:
            self.side.shut()
        elif self.will is Will.RESET:
            self.abort()
        else:
            self.side.close()
        return True

    def abort(self) -> None:
        """Reset the connection, and leave."""
        self.ended = True
        self.side.reset()
        self.side.closed = True

    def take(self, most: int) -> bool:
        """Read up to `most` bytes; False when nothing came."""
        if self.side.closed or self.saw_fin or self.saw_reset:
            return False
        try:
            data = self.side.recv(most)
        except BlockingIOError:
            return False
        except OSError:
            self.saw_reset = True
            return True
        if data:
            self.read += data
        elif self.side.dead:
            self.saw_reset = True
        else:
            self.saw_fin = True
        return True

    @property
    def left(self) -> bool:
        """It takes no notice any more."""
        return self.side.closed


@dataclass(eq=False)
class Way:
    """A client, a target, and what the pairs between them counted."""

    number: int
    client: Peer
    target: Peer
    target_side: Side  # the relay's end of the target's connection
    pairs: int = 0
    accounts: list[Account] = field(default_factory=list)
    reached: bool = False  # the target
    refused: bool = False  # the last relay says the target's content itself, and closes; the target hears nothing

    def refuse(self, words: bytes) -> None:
        """Make it a way that ends at the last relay, which has these last words."""
        self.refused = True
        self.target.content, self.target.written = words, len(words)
        self.target.will, self.target.ended = Will.FIN, True


class Waits(EndHandler):
    """A paused end: only its loss is heard."""

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost

    def received(self, data: bytes) -> None:
        raise AssertionError("it was paused")

    def finished(self) -> None:
        raise AssertionError("it was paused")

    def lost(self, lost: Lost) -> None:
        self._lost()


class Hears(EndHandler):
    """Collects the first `wanted` bytes, and gives them and what came behind them."""

    def __init__(self, wanted: int, heard: Callable[[bytes, bytes], None], lost: Callable[[], None]) -> None:
        self._wanted = wanted
        self._heard = heard
        self._lost = lost
        self._data = b""

    def received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= self._wanted:
            self._heard(self._data[: self._wanted], self._data[self._wanted :])

    def finished(self) -> None:
        raise AssertionError("an orderly end in front of the first words")

    def lost(self, lost: Lost) -> None:
        self._lost()


class SimRelay(Relay):
    """A relay whose turns are the test's."""

    def __init__(self, kernel: Kernel) -> None:
        self.poller = SimEpoll(kernel)
        self.reports: list[dict[str, object]] = []
        super().__init__(lambda event, fields: self.reports.append({"event": event, **fields}), "sim", self.poller)
        self.loop.now = 0.0

    @property
    def busy(self) -> bool:
        """It has something to do without waiting."""
        return bool(self.poller.edges or self.loop._ready or self.loop._slow)

    def turn(self, now: float) -> None:
        """One turn of its loop at this time, in which it reports no fault."""
        self.loop.turn(self.poller.poll(), now)
        assert not self.reports, self.reports


def take_turns(relays: Iterable[SimRelay], now: float) -> bool:
    """A turn of each relay that has something to do; False when none has."""
    busy = [relay for relay in relays if relay.busy]
    for relay in busy:
        relay.turn(now)
    return bool(busy)


@dataclass(frozen=True)
class TcpHop:
    """On to another relay by a connection of its own: a gateway and a broker's guarded port."""

    relay: SimRelay


@dataclass(frozen=True)
class LinkHop:
    """On to another relay by a stream of this link: a broker and an agent."""

    link: Link
    relay: SimRelay


Hop = TcpHop | LinkHop


class World:
    """One tape's world."""

    def __init__(self, tape: bytes) -> None:
        self.choices = Choices(tape)
        self.kernel = Kernel(self.choices)
        self.relays: list[SimRelay] = []
        self.ways: list[Way] = []
        self.links: list[Link] = []
        self.cut = False  # a link was
        self.now = 0.0
        self._tls_sides: list[Side] = []  # of connections on which a FIN alone is no end

    # Building.

    def build(self) -> None:
        """Decide on a shape, and make it."""
        below = self.choices.below
        shape = below(5)
        self._tls_hop, self._tls_link = below(3) == 1, below(3) == 1
        self._capacity = _CAPACITIES[below(len(_CAPACITIES))]
        # A handshake of seven bytes at a time takes all day.
        self._hop_capacity = _CAPACITIES[below(len(_CAPACITIES) - 1) + 1]
        near = self._relay()
        hops: list[Hop] = []
        if shape in (1, 3):
            hops.append(TcpHop(self._relay()))
        if shape >= 2:
            hops.append(self._link(self.relays[-1], self._relay()))
        for number in range(1 + below(5 if shape >= 2 else 2)):
            self._way(number, near, hops)

    def _relay(self) -> SimRelay:
        self.relays.append(SimRelay(self.kernel))
        return self.relays[-1]

    def _way(self, number: int, near: SimRelay, hops: list[Hop]) -> None:
        client, client_side = self._peer(2 * number)
        target, target_side = self._peer(2 * number + 1)
        way = Way(number, client, target, target_side)
        self.ways.append(way)
        if self.choices.below(6) == 1:
            way.refuse(target.content[:_MOST_WORDS])
        self._onward(way, self._end(near, client_side), near, hops)

    def _peer(self, number: int) -> tuple[Peer, Side]:
        below = self.choices.below
        size = min(_SIZES[below(len(_SIZES))], 40 * min(self._capacity, self._hop_capacity))
        will = (Will.FIN, Will.FIN, Will.FIN, Will.FIN, Will.STAY, Will.RESET, Will.CLOSE)[below(7)]
        theirs, ours = self.kernel.connection(self._capacity)
        offset = number * 102_953 % (len(_BLOCK) - max(_SIZES))
        return Peer(theirs, _BLOCK[offset : offset + size], will, urgent=below(4) == 3), ours

    def _end(self, relay: SimRelay, side: Side) -> SocketEnd:
        return SocketEnd(relay.loop, self.kernel.socket(side), "peer")

    def _onward(
        self, way: Way, end: End, relay: SimRelay, hops: list[Hop], up: bytes = b"", answer: bytes = b""
    ) -> None:
        """From this end by these hops to the target. `answer` is said to `end` when it is joined."""
        if way.refused and not hops:
            end.write(answer + way.target.content)
            end.close()
            return
        if not hops:
            self._reach_target(way, end, relay, up, answer)
            return

        def fail() -> None:
            end.abort()
            onward.abort()

        def accepted(_: bytes, down: bytes) -> None:
            onward.set_handler(Waits(fail))
            onward.pause()
            self._later(relay, lambda: join(down))

        def join(down: bytes) -> None:
            if not (end.closed or onward.closed):
                if answer:
                    end.write(answer)
                self._join(way, relay, end, onward, up=up, down=down)

        end.set_handler(Waits(fail))
        end.pause()
        if isinstance(hops[0], LinkHop) and hops[0].link.over:  # as a broker: the session is gone
            end.abort()
            return
        onward = self._dial(way, relay, hops, Hears(1, accepted, fail))

    def _reach_target(self, way: Way, end: End, relay: SimRelay, up: bytes, answer: bytes) -> None:
        """Join this end with the target, at once or after some turns: what comes meanwhile waits in the end."""

        def join() -> None:
            if not end.closed:
                way.reached = True
                if answer:
                    end.write(answer)
                self._join(way, relay, end, self._end(relay, way.target_side), up=up)

        end.set_handler(Waits(lambda: None))
        end.pause()
        self._later(relay, join)

    def _later(self, relay: SimRelay, call: Callable[[], None]) -> None:
        """At once, or after some turns: what comes meanwhile waits in the ends."""
        turns = (0, 0, 1, 4)[self.choices.below(4)]

        def count(left: int) -> None:
            if left:
                relay.loop.soon(lambda: count(left - 1))
            else:
                call()

        count(turns)

    def _join(self, way: Way, relay: SimRelay, client: End, target: End, **options: Any) -> None:
        way.pairs += 1
        relay.join(client, target, owner=Recorder(way.accounts), **options)

    def _dial(self, way: Way, relay: SimRelay, hops: list[Hop], handler: EndHandler) -> End:
        hop, words = hops[0], b"D" + bytes([way.number])
        if isinstance(hop, LinkHop):
            return hop.link.open(handler, words)
        a, b = self.kernel.connection(self._hop_capacity)
        near, far = self._end(relay, a), self._end(hop.relay, b)
        if self._tls_hop:
            self._tls_sides += a, b
            server, client = contexts()
            near = relay.secure(near, client, alpn=DIAL_ALPN, server_name="x")
            far = hop.relay.secure(far, server, alpn=DIAL_ALPN)
        near.set_handler(handler)
        near.write(words)
        far.set_handler(self._answering(far, hop.relay, hops[1:]))
        return near

    def _answering(self, end: End, relay: SimRelay, hops: list[Hop]) -> EndHandler:
        def heard(words: bytes, rest: bytes) -> None:
            assert words[:1] == b"D", words
            self._onward(self.ways[words[1]], end, relay, hops, rest, b"A")

        return Hears(2, heard, lambda: None)

    # Links.

    def _link(self, near: SimRelay, far: SimRelay) -> LinkHop:
        a, b = self.kernel.connection(self._hop_capacity)
        server, client = contexts() if self._tls_link else (None, None)
        self.links = ends = [
            relay.link(
                self.kernel.socket(side), Owner(self, relay), Handshake(relay is far, 1000.0, tls, "x"), peer="peer"
            )
            for relay, side, tls in ((near, a, server), (far, b, client))
        ]  # fmt: skip
        self._link_sides = a, b
        while not all(link.up for link in ends):
            self._round()
        return LinkHop(ends[0], far)

    def cut_link(self) -> None:
        """The network resets the link."""
        if self.links:
            self.cut = True
            for side in self._link_sides:
                side.was_reset()

    def forge_fin(self) -> None:
        """Somebody on the way makes a FIN, on a link or under TLS: it is no orderly end of what goes through."""
        sides = [*self._tls_sides, *(self._link_sides if self.links else ())]
        if sides:
            self.cut = True
            sides[self.choices.below(len(sides))].forge_fin()

    # Time passes.

    def step(self) -> None:
        """One thing happens, of the tape's choice."""
        choices = self.choices
        kind = choices.below(16)
        if kind < 5:
            self.relays[choices.below(len(self.relays))].turn(self.now)
        elif kind < 10:
            sides = [side for side in self.kernel.sides if side.deliverable]
            if sides:
                side = sides[choices.below(len(sides))]
                side.deliver(choices.amount(max(1, len(side.sent))))
        elif kind < 15:
            way = self.ways[choices.below(len(self.ways))]
            peer = way.client if choices.below(2) else way.target
            if kind < 12:
                peer.write(choices.amount(1 << 16))
            elif kind < 14:
                peer.take(choices.amount(1 << 16))
            elif peer.will is Will.RESET and not peer.ended:
                peer.abort()
        else:
            self._rare(choices.below(8))

    def _rare(self, kind: int) -> None:
        if kind < 3:
            self.now += 0.05 * (1 + kind)
        elif kind == 3:
            self.kernel.fail_pipes = not self.kernel.fail_pipes
        elif kind == 4 and self.choices.below(4) == 3:
            self.cut_link()
        elif kind == 6 and self.choices.below(4) == 3:
            self.forge_fin()
        elif kind == 5 and self._tls_link and self.links and not self.cut:
            ask_for_keys(self.links[self.choices.below(2)])
        else:
            for side in self.kernel.sides:
                side.make_room()

    def _round(self) -> bool:
        """Everybody does all that can be done; False when nothing moved."""
        moved = take_turns(self.relays, self.now)
        moved |= self.kernel.deliver_all()
        for way in self.ways:
            for peer in (way.client, way.target):
                moved |= peer.write(1 << 20)
                moved |= peer.take(1 << 20)
        return moved

    def rest(self) -> None:
        """Run until nothing moves any more."""
        still = 0
        for _ in range(_MOST_ROUNDS):
            still = 0 if self._round() else still + 1
            if still > _STILL:
                return
        raise AssertionError("it never comes to rest")

    # The oracle.

    def check_prefixes(self) -> None:
        """What holds at any moment."""
        for way in self.ways:
            for reader, writer in ((way.client, way.target), (way.target, way.client)):
                assert writer.content.startswith(reader.read), f"way {way.number}: damaged"
                if reader.saw_fin:
                    assert len(reader.read) == len(writer.content), f"way {way.number}: short, and an orderly end"
                    assert writer.ended and writer.will is not Will.RESET, f"way {way.number}: an end that was none"

    def check_flow(self) -> None:
        """At rest, when nobody has broken anything: all bytes are there, also on ways that stay open."""
        for way in self.ways:
            if self._orderly(way) and not way.refused:
                for reader, writer in ((way.client, way.target), (way.target, way.client)):
                    assert len(reader.read) == len(writer.content), (
                        f"way {way.number}: stuck after {len(reader.read)} of {len(writer.content)} bytes"
                    )
                    assert reader.saw_fin == (writer.will is Will.FIN), f"way {way.number}: no FIN"

    def _orderly(self, way: Way) -> bool:
        wills = {way.client.will, way.target.will}
        return wills <= {Will.FIN, Will.STAY} and not self.cut

    def check_end(self) -> None:
        """At rest, when every peer has ended."""
        for way in self.ways:
            orderly = self._orderly(way)
            if orderly and way.refused:
                assert way.client.read == way.target.content, f"way {way.number}: last words are lost"
            assert len(way.accounts) == way.pairs, f"way {way.number}: {way.pairs - len(way.accounts)} pairs live on"
            for peer in (way.client, way.target):
                told = peer.saw_fin or peer.saw_reset or peer.left
                told = told or (peer is way.target and not way.reached)
                assert told, f"way {way.number}: nobody told the {'client' if peer is way.client else 'target'}"
            for account in way.accounts:
                assert len(way.target.read) <= account.up <= way.client.written, f"way {way.number}: {account}"
                assert len(way.client.read) <= account.down <= way.target.written, f"way {way.number}: {account}"
                if orderly:
                    assert account.ending is Ending.CLOSED, f"way {way.number}: {account}"
                    sent = len(way.client.content), len(way.target.content)
                    assert (account.up, account.down) == sent or way.refused, f"way {way.number}: {account}"
                elif not self.cut and not way.refused:
                    self._check_blame(way, account)
        self._check_leaks()

    def _check_blame(self, way: Way, account: Account) -> None:
        """Whoever resets is the one that the account names."""
        wills = way.client.will, way.target.will
        if Will.RESET in wills and set(wills) <= {Will.RESET, Will.FIN, Will.STAY} and wills[0] != wills[1]:
            expected = Ending.CLIENT_RESET if wills[0] is Will.RESET else Ending.TARGET_RESET
            assert account.ending is expected, f"way {way.number}: {account}, but the wills were {wills}"

    def _check_leaks(self) -> None:
        for relay in self.relays:
            assert not relay.pairs
            assert relay.memory.held == 0, f"{relay.memory.held} bytes are counted as held, and nothing is"
            relay.pipes.close()
        assert not self.kernel.pipes, "pipes are left"
        links = [link for link in self.links if not link.over]
        for link in links:
            assert not link.streams and not link.waiting and not link._out
        lost = {way.target_side.fd for way in self.ways if not way.reached}
        left = set(self.kernel.by_fd) - {link.sock.fileno() for link in links} - lost
        assert not left, f"sockets are left: {[self.kernel.by_fd[fd] for fd in left]}"


def ask_for_keys(link: Link) -> None:
    """Change this end's TLS keys, and ask the other end to do so: it answers in the middle of whatever it does.

    Python has no word for it. The request goes out with the link's next frame.
    """
    tls = link._transport._engine._tls  # type: ignore[attr-defined]
    session = ctypes.c_void_p(ctypes.c_void_p.from_address(id(tls._sslobj) + _SSL_AT).value)
    assert _OPENSSL.SSL_key_update(session, 1) == 1
    tls.do_handshake()
    link.ping(7)


class Owner:
    """The owner of a world's links."""

    def __init__(self, world: World, relay: SimRelay) -> None:
        self._world = world
        self._relay = relay

    def link_up(self, link: Link) -> None:
        """See LinkOwner."""

    def link_stream(self, stream: StreamEnd) -> EndHandler | None:
        """See LinkOwner."""
        return self._world._answering(stream, self._relay, [])

    def link_down(self, link: Link, lost: Lost) -> None:
        """See LinkOwner."""
        assert self._world.cut, f"the link is lost, and nobody has cut it: {lost}"


def tape_of(seed: int) -> bytes:
    """The tape of a number: short ones show much of how a world begins and ends, long ones much of its middle."""
    dice = random.Random(seed)
    return dice.randbytes(dice.choice((20, 100, 400, 1500)))


def fails_soon(play: Callable[[bytes], None], tapes: int) -> bool:
    """Return whether one of the first tapes finds a broken promise: a fault was put in."""
    for seed in range(tapes):
        try:
            play(tape_of(seed))
        except AssertionError:
            return True
    return False


def play(tape: bytes) -> None:
    """Build a world, let the tape rule, let everything end, and look. Raises AssertionError for a broken promise."""
    world = World(tape)
    frames = _FRAMES[world.choices.below(len(_FRAMES))]
    with (
        world.kernel.installed(),
        mock.patch.object(link_module, "random", random.Random(0)),
        mock.patch.object(link_module, "FRAMES_A_TURN", frames),
    ):
        try:
            world.build()
            while not world.choices.over:
                world.step()
            world.check_prefixes()
            world.kernel.fail_pipes = False
            world.rest()
            world.check_prefixes()
            world.check_flow()
            for way in world.ways:
                for peer in (way.client, way.target):
                    if peer.will is Will.STAY:
                        peer.will = Will.FIN
            world.rest()
            world.check_prefixes()
            world.check_end()
        finally:
            for relay in world.relays:
                relay.loop._shut()
            for sock in world.kernel.sockets:
                sock.close()
