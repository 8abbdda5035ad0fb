"""The load that compares content finds lost, doubled and changed bytes, and another stream's."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from bench.load import Address, Way
from support.exact import DOWN, HEAD, MAGIC, UP, Damaged, Incoming, Job, Load, Outcome, Target, content, short_jobs
from support.line import Line, Shape
from support.plumbing import PATIENCE, dial, kept, listener, reset

SIZE = 200_000


def stream(number: int, direction: int = DOWN, size: int = SIZE) -> bytes:
    """All bytes of one direction of a stream."""
    return b"".join(content(number, direction, size))


@pytest.mark.parametrize("step", [1, 7, 65_536, SIZE])
def test_the_right_bytes_pass_in_any_pieces(step: int) -> None:
    size = min(SIZE, 400 * step)
    data, incoming = memoryview(stream(7, UP, size)), Incoming(7, UP, size)
    for begin in range(0, size, step):
        incoming.take(data[begin : begin + step])
    assert incoming.left == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:60_000] + data[65_000:], "byte 60000 of 200000 is wrong: 5000 bytes are missing there"),
        (lambda data: data[:500] + data[:500], "byte 500 of 200000 is wrong: these bytes have another place"),
        (lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:], "byte 9 of 200000 is wrong: these bytes are of no"),
        (lambda data: data[:4096] + stream(8)[4096:], "byte 4096 of 200000 is wrong"),
        (lambda data: stream(7, UP), "byte 0 of 200000 is wrong"),
    ],
    ids=["lost", "doubled", "changed", "another stream's", "the other direction's"],
)
def test_wrong_bytes_are_found_where_they_are(spoil: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(Damaged, match=f"the download of stream 7: {says}"):
        Incoming(7, DOWN, SIZE).take(memoryview(spoil(stream(7))))


@contextlib.contextmanager
def turning(turn: Callable[[float], None]) -> Iterator[None]:
    """A loop that runs in a thread of its own meanwhile."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            turn(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE)


@contextlib.contextmanager
def target() -> Iterator[tuple[Address, list[str]]]:
    """A running target: where it listens, and what it has found."""
    found: list[str] = []
    sock = listener()
    with contextlib.closing(Target(sock, found.append)) as served, turning(served.loop.turn):
        yield sock.getsockname(), found


def load(address: Address, *jobs: tuple[int, int]) -> Outcome:
    """Exchanges of these sizes (up, down), every other one with a half-close."""
    way = Way(address, address)
    return Load([Job(n, up, down, n % 2 == 0, way) for n, (up, down) in enumerate(jobs)], 10).run()


SIZES = [(0, 0), (0, 0), (1, 0), (0, 1), (20_000, 20_000), (300_000, 1), (1, 300_000), (300_000, 300_000)]


def test_streams_are_whole_on_a_way_that_harms_nothing() -> None:
    with target() as (address, found):
        outcome = load(address, *SIZES)
    assert (outcome.whole, outcome.faults, outcome.cut, found) == (len(SIZES), [], [], [])
    assert outcome.bytes == sum(up + down for up, down in SIZES)


def test_short_jobs_are_the_same_in_every_run() -> None:
    ways = [Way(("127.0.0.1", 1), ("127.0.0.1", 1))]
    one, two = short_jobs(ways), short_jobs(ways)
    assert [next(one) for _ in range(50)] == [next(two) for _ in range(50)]


def answer(sock: socket.socket, reply: bytes, end: Callable[[socket.socket], None]) -> None:
    """Serve one exchange without an upload: read the head, reply, and end the connection."""
    served = kept(sock.accept()[0])
    head = served.recv(HEAD.size, socket.MSG_WAITALL)
    assert head[: len(MAGIC)] == MAGIC
    served.sendall(reply)
    end(served)


@pytest.mark.parametrize(
    ("reply", "end", "fault"),
    [
        (stream(0, DOWN, 900), socket.socket.close, "ended in order after 900 of 1000 bytes"),
        (stream(0, DOWN, 1000), socket.socket.close, "ended in order after 1000 of 1000 bytes"),
        (stream(1, DOWN, 1000), socket.socket.close, "byte 0 of 1000 is wrong"),
        (stream(0, DOWN, 900), reset, ""),
    ],
    ids=["an early end", "no receipt", "another stream", "a reset"],
)
def test_an_early_end_is_damage_and_a_reset_is_none(
    reply: bytes, end: Callable[[socket.socket], None], fault: str
) -> None:
    sock = listener()
    thread = threading.Thread(target=answer, args=(sock, reply, end))
    thread.start()
    outcome = load(sock.getsockname(), (0, 1000))
    thread.join(PATIENCE)
    assert (len(outcome.faults), len(outcome.cut)) == ((1, 0) if fault else (0, 1))
    assert fault in "".join(outcome.faults)


def test_a_target_tells_of_an_upload_that_ends_early() -> None:
    with target() as (address, found):
        client = dial(address)
        client.sendall(HEAD.pack(MAGIC, 3, 1000, 0) + stream(3, UP, 900))
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert found == ["the upload of stream 3 ended in order after 900 of 1000 bytes"]


def test_a_thin_line_keeps_every_byte() -> None:
    sock = listener()
    with target() as (address, found):
        line = Line(sock, address, Shape(rate=50e6, delay=0.002, buffer=16 << 10))
        with contextlib.closing(line), turning(lambda _: line.turn(0.001)):
            outcome = load(sock.getsockname(), *SIZES)
    assert (outcome.whole, outcome.faults, outcome.cut, found) == (len(SIZES), [], [], [])
