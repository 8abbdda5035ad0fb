"""Requests in absolute form on the hostile kernel (tests/support/kernel.py): every answer is whole, and its request's.

A client sends a script of requests, to two targets, as fast as it can; the targets answer with every framing, close
when they like, answer before the request is whole, or reset. The tape decides who moves, and how much.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, cast

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtunnel.config import GatewayConfig, LimitsConfig
from rtunnel.counts import StreamCounts
from rtunnel.histogram import Histogram, Histograms
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import Ending
from rtunnel.trust.policy import Verdict
from rtunnel.wire.http_body import Data, Sized
from rtunnel_socks import forward
from rtunnel_socks.client import Client, ClientOwner, ClientPermit
from rtunnel_socks.dial import Paths, Reached, Target
from rtunnel_socks.limits import Limits
from support.effort import times
from support.hostile import SimRelay, fails_soon, tape_of
from support.kernel import Choices, Kernel, Side

_SIZES: Final = (0, 1, 50, 3000, 20_000, 150_000)
_CAPACITIES: Final = (7, 300, 4096, 70_000)
_BLOCK: Final = random.Random(3).randbytes(1 << 18)
#: How a target answers; `RISKY` ones may cost the client its connection.
SIZED, CODED, CLOSE, ENDLESS, SILENT_CLOSE, EARLY, RESET = range(7)


@dataclass
class Exchange:
    """One request of the script, and its answer."""

    number: int
    target: str
    method: bytes
    body: bytes  # as it is coded
    framing: bytes
    kind: int
    content: bytes  # of the answer

    @property
    def request(self) -> bytes:
        """As the client sends it."""
        head = b"%s http://%s/%d HTTP/1.1\r\nHost: x\r\n%s\r\n" % (
            self.method, self.target.encode(), self.number, self.framing,
        )  # fmt: skip
        return head + self.body

    @property
    def answer(self) -> bytes:
        """As the target sends it."""
        content = b"" if self.method == b"HEAD" else self.content
        if self.kind == CODED:
            pieces = [content[at : at + 700] for at in range(0, len(content), 700)]
            coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX: y\r\n\r\n"
            lines, content = b"Transfer-Encoding: chunked\r\n", b"" if self.method == b"HEAD" else coded
        elif self.kind == ENDLESS:
            lines = b""
        else:
            lines = b"Content-Length: %d\r\n" % len(self.content)
        if self.kind in (CLOSE, EARLY):
            lines += b"Connection: close\r\n"
        return b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n" + content

    @property
    def ends(self) -> bool:
        """The target's connection ends with it."""
        return self.kind not in (SIZED, CODED)


class Origin:
    """A target's end of one connection."""

    def __init__(self, world: World, ip: str, side: Side) -> None:
        self.world, self.ip, self.side = world, ip, side
        self.data = b""
        self.out = b""
        self.present: Exchange | None = None
        self.over = False
        self.fin = False
        self.drops = False  # it has answered, and reads what still comes so that no reset overtakes the answer

    def take(self, most: int) -> bool:
        """Read, and answer what is whole."""
        if self.over or self.fin:
            return False
        if self.drops:
            return self._drop(most)
        try:
            data = self.side.recv(most)
        except BlockingIOError:
            return False
        except OSError:
            self.over = True
            self.side.close()
            return True
        self.fin = not data
        self.data += data
        self._read()
        return True

    def _drop(self, most: int) -> bool:
        try:
            self.over = not self.side.recv(most)
        except BlockingIOError:
            return False
        except OSError:
            self.over = True
        if self.over:
            self.side.close()
        return True

    def _read(self) -> None:
        head, end, rest = self.data.partition(b"\r\n\r\n")
        if self.present is not None or not end:
            return
        exchange = self.world.script[int(head.split(b" ")[1][1:])]
        assert exchange.target == self.ip, "a request reached another target"
        assert head.startswith(exchange.method + b" /")
        if exchange.kind != EARLY:
            assert exchange.body.startswith(rest[: len(exchange.body)]), "a damaged request"
            if len(rest) < len(exchange.body):
                return
        self.data = rest[len(exchange.body) :]
        self.present = exchange
        self.out = exchange.answer
        if exchange.kind == RESET:
            self.out = self.out[: len(self.out) // 2]

    def write(self, most: int) -> bool:
        """Send some of the answer, then end or go on as it says."""
        side = self.side
        if self.over or self.drops:
            return False
        if self.present is None:
            if self.fin:
                self._end()
            return self.fin
        if side.dead:
            return False
        if self.out:
            size = min(most, side.capacity - len(side.sent))
            side.sent += self.out[:size]
            self.out = self.out[size:]
            return size > 0
        present, self.present = self.present, None
        if present.kind == RESET:
            side.reset()
        if present.kind == EARLY and not self.fin:
            self.drops = True
            side.shut()
        elif present.ends:
            self._end()
        else:
            self._read()
        return True

    def _end(self) -> None:
        self.over = True
        self.side.close()


class World:
    """A client, the gateway's `Client` with its forwardings, and targets; the owner of that client."""

    def __init__(self, tape: bytes) -> None:
        self.choices = Choices(tape)
        self.kernel = Kernel(self.choices)
        self.relay = SimRelay(self.kernel)
        self.origins: list[Origin] = []
        self.paths, self.limits, self.counts = Paths(), Limits(LimitsConfig()), StreamCounts()
        self.access = SimpleNamespace(
            version=0, users=None, anonymous=lambda peer: True, judge=lambda question, entry: Verdict(True, 1, "1")
        )
        self.namespace = "default"
        self.setup_times: Histograms[str] = Histograms()
        self.first_byte_times = Histogram()
        self.config = GatewayConfig(idle_timeout=0.0, handshake_timeout=1000.0, max_head=65536)
        self.resolver = self
        self.waiting: set[Client] = set()
        self.keep_alive, self.ready = 1000.0, True
        self.clients = 0
        self.logged: list[str] = []
        self.now = 0.0

    # See ClientOwner.

    def new_dial(self, client: Client, target: Target) -> Any:
        """Reach the target after a turn."""
        ours, theirs = self.kernel.connection(self.capacity)
        self.origins.append(Origin(self, target.ip, theirs))
        end = SocketEnd(self.relay.loop, self.kernel.socket(ours), "broker")
        used = SimpleNamespace(node="b1", epoch=1, ps_ip="1.2.3.4", ps_port=1, agent_id="a1")
        reached = Reached(end, b"", cast("Any", used), 1, None, None)
        state = {"cancelled": False}

        def cancel() -> None:
            state["cancelled"] = True
            end.abort()

        def done() -> None:
            if not state["cancelled"]:
                client.dialled(reached, None)

        return SimpleNamespace(start=lambda tuples: self.relay.loop.soon(done), cancel=cancel, unproven="")

    def lookup(self, client: Client, target: Target) -> tuple[str, ...]:
        return ("any",)

    def acquire_client(self, peer: str) -> ClientPermit:
        return ClientPermit(self, self.limits.acquire_client(peer, 0.0))

    def log(self, event: str, **fields: object) -> None:
        self.logged.append(event)

    # Playing.

    def build(self) -> None:
        """The script, and the client."""
        below = self.choices.below
        self.capacity, client_capacity = (_CAPACITIES[below(len(_CAPACITIES))] for _ in range(2))
        most = 20 * min(self.capacity, client_capacity)
        self.script = [self._exchange(number, most) for number in range(1 + below(6))]
        gaps = (b"", b"\r\n", b"\r\n\r\n")
        self.to_send = b"".join(exchange.request + gaps[below(3)] for exchange in self.script)
        self.client_resets = below(10) == 9
        self.half_closes = below(2) == 1
        self.read = b""
        self.saw_fin = self.saw_reset = self.left = False
        self.side, ours = self.kernel.connection(client_capacity)
        end = SocketEnd(self.relay.loop, self.kernel.socket(ours), "10.9.9.9")
        self.client = Client(cast("ClientOwner", self), end, self.acquire_client("10.9.9.9"))
        end.set_handler(self.client, 1000.0)

    def _exchange(self, number: int, most: int) -> Exchange:
        below = self.choices.below
        size, method = min(_SIZES[below(len(_SIZES))], most), (b"GET", b"GET", b"HEAD", b"POST", b"PUT")[below(5)]
        body = _BLOCK[number : number + min(_SIZES[below(len(_SIZES))], most)] if method in (b"POST", b"PUT") else b""
        framing = b"Content-Length: %d\r\n" % len(body) if body else b""
        if body and below(2):
            pieces = [body[at : at + 900] for at in range(0, len(body), 900)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            framing = b"Transfer-Encoding: chunked\r\n"
        kind = (SIZED, SIZED, SIZED, CODED, CODED, CLOSE, ENDLESS, SILENT_CLOSE, EARLY, RESET)[below(10)]
        content = b"%d:" % number + _BLOCK[1000 * number :][:size]
        return Exchange(number, ("10.1.0.1", "10.1.0.2")[below(2)], method, body, framing, kind, content)

    def step(self) -> None:
        """One thing happens."""
        choices, kind = self.choices, self.choices.below(16)
        if kind < 5:
            self._turn()
        elif kind < 9:
            sides = [side for side in self.kernel.sides if side.deliverable]
            if sides:
                side = sides[choices.below(len(sides))]
                side.deliver(choices.amount(max(1, len(side.sent))))
        elif kind < 11:
            self._client_writes(choices.amount(1 << 16))
        elif kind < 13:
            self._client_reads(choices.amount(1 << 16))
        elif kind < 15 and self.origins:
            origin = self.origins[choices.below(len(self.origins))]
            (origin.take if choices.below(2) else origin.write)(choices.amount(1 << 16))
        elif choices.below(8) == 7:
            self.now += forward.PARK_SECONDS / 2
        elif choices.below(8) == 7 and self.client_resets:
            self.left = True
            self.side.reset()
            self.side.closed = True

    def _turn(self) -> None:
        self.relay.loop.turn(self.relay.poller.poll(), self.now)
        assert not self.relay.reports, self.relay.reports

    def _client_writes(self, most: int) -> bool:
        side = self.side
        if self.left or side.dead:
            return False
        if not self.to_send:
            moved = self.half_closes and not side.fin
            if self.half_closes:
                side.shut()
            return moved
        size = min(most, side.capacity - len(side.sent))
        side.sent += self.to_send[:size]
        self.to_send = self.to_send[size:]
        return size > 0

    def _client_reads(self, most: int) -> bool:
        if self.left or self.saw_fin or self.saw_reset:
            return False
        try:
            data = self.side.recv(most)
        except BlockingIOError:
            return False
        except OSError:
            self.saw_reset = True
            return True
        self.read += data
        self.saw_fin = not data
        return True

    def rest(self) -> None:
        """Until nothing moves any more."""
        still = 0
        for _ in range(400_000):
            moved = self.relay.busy
            if moved:
                self._turn()
            moved |= self.kernel.deliver_all()
            moved |= self._client_writes(1 << 20) | self._client_reads(1 << 20)
            for origin in self.origins:
                moved |= origin.take(1 << 20) | origin.write(1 << 20)
            still = 0 if moved else still + 1
            if still > 4:
                return
        raise AssertionError("it never comes to rest")

    # The oracle.

    def certain(self) -> int:
        """How many answers the client must have got."""
        count, open_target = 0, ""
        for exchange in self.script:
            if exchange.kind == RESET:
                return count
            # On a connection that ends just now a request is lost, unless it may be sent twice.
            if exchange.target == open_target and (exchange.body or exchange.method == b"POST"):
                return count
            count += 1
            if exchange.kind == ENDLESS and exchange.method != b"HEAD":
                return count
            if exchange.kind == EARLY and exchange.body:
                return count
            open_target = exchange.target if exchange.kind in (SILENT_CLOSE, ENDLESS) else ""
        return count

    def check_answers(self) -> None:
        """Each answer that has come is the one to its request, and none is missing."""
        data, answered = self.read, 0
        for exchange in self.script:
            reader = h11.Connection(h11.CLIENT)
            reader.send(h11.Request(method=exchange.method, target="/", headers=[("Host", "x")]))
            reader.send(h11.EndOfMessage())
            if data:
                reader.receive_data(data)
            if self.saw_fin:
                reader.receive_data(b"")
            body, whole = self._body_of(reader)
            expected = b"" if exchange.method == b"HEAD" else exchange.content
            if not whole:
                assert expected.startswith(body), f"answer {exchange.number} is damaged"
                break
            assert body == expected, f"answer {exchange.number} is damaged"
            data, _ = reader.trailing_data
            answered += 1
        if not self.client_resets:
            assert answered >= self.certain(), f"{answered} answers, and not {self.certain()}"
            if self.certain() == len(self.script):
                assert not data and not self.saw_reset

    @staticmethod
    def _body_of(reader: h11.Connection) -> tuple[bytes, bool]:
        body = b""
        while True:
            try:
                event = reader.next_event()
            except h11.RemoteProtocolError:
                return body, False  # cut short
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return body, True
            elif not isinstance(event, h11.Response):
                return body, False

    def check_leaks(self) -> None:
        """After all have gone nothing is held."""
        assert not self.relay.pairs and not self.waiting
        assert (self.clients, self.counts.streams, self.limits.known, self.relay.memory.held) == (0, 0, 0, 0)
        assert self.logged.count("stream_ended") == self.counts.accepted
        assert not self.kernel.by_fd, "sockets are left"


def play(tape: bytes) -> None:
    """Build a world, let the tape rule, let everything end, and look."""
    world = World(tape)
    with world.kernel.installed():
        try:
            world.build()
            while not world.choices.over:
                world.step()
            world.rest()
            world.check_answers()
            if not world.left:
                world.to_send, world.half_closes = b"", True
            world.rest()
            world.now += 100.0
            world.relay.loop.turn([], world.now)
            world.rest()
            world.check_leaks()
        finally:
            world.relay.loop._shut()
            for sock in world.kernel.sockets:
                sock.close()


@pytest.mark.parametrize("first", range(0, times(300), 150))
def test_no_schedule_damages_an_answer(first: int) -> None:
    """Seeded tapes."""
    for seed in range(first, first + 150):
        play(tape_of(seed))


def flush_and_forget(self: forward._Side) -> int:
    """What the kernel does not take is lost."""
    held, self.held = self.held, b""
    try:
        return self.end.sock.send(held)
    except BlockingIOError:
        return 0


def let_all_pass(self: Sized, data: Data) -> int:
    """A gate that does not close: bytes behind a request go to its target."""
    self.done = True
    return len(data)


def end_with_the_request(self: forward.Forwarding) -> None:
    """Surplus bytes end the pair, as in version 0.1."""
    if self._client is not None and self._body.done and self._rest:
        self.abort(Ending.OVERRUN)
    else:
        settle(self)


settle = forward.Forwarding._settle
FAULTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "held bytes are lost": (forward._Side, "flush", flush_and_forget),
    "an open gate": (Sized, "feed", let_all_pass),
    "surplus ends the pair": (forward.Forwarding, "_settle", end_with_the_request),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fault put in, one of the first tapes fails."""
    where, method, faulty = FAULTS[name]
    monkeypatch.setattr(where, method, faulty)
    assert fails_soon(play, 300)


@settings(max_examples=times(60), derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=20, max_size=600))
def test_no_tape_damages_an_answer(tape: bytes) -> None:
    """The same with tapes of Hypothesis, which makes a failing one short."""
    play(tape)
