"""A way to the broker that can be cut, or go deaf: layer 4, in a process of its own, told what to do by a pipe."""

from __future__ import annotations

import contextlib
import select
import socket
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Final, NoReturn

from bench.load import Address, become_a_load_process
from support.plumbing import reset

_FORK: Final = get_context("fork")
_PIECE: Final = 256 * 1024
#: Seconds until the process must have answered.
_PATIENCE: Final = 10.0

#: Words to the process; each is answered with the number of links that it met.
CUT, SWALLOW, ADMIT = "cut", "swallow", "admit"


@dataclass(eq=False)
class _Side:
    """One socket of a link, and what it has not taken yet."""

    sock: socket.socket
    pending: bytearray = field(default_factory=bytearray)
    other: _Side | None = None
    deaf: bool = False  # what it says is dropped
    eof: bool = False


class _Passing:
    """The loop of the process. Level-triggered: there are few links."""

    def __init__(self, listener: socket.socket, onward: Address, orders: Connection) -> None:
        self._listener = listener
        self._onward = onward
        self._orders = orders
        self._admits = True
        self._sides: dict[int, _Side] = {}
        self._epoll = select.epoll()

    def run(self) -> NoReturn:
        """For ever."""
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._orders.fileno(), select.EPOLLIN)
        while True:
            for fd, mask in self._epoll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._orders.fileno():
                    self._obey(self._orders.recv())
                elif (side := self._sides.get(fd)) is not None:
                    self._move(side, mask)

    def _obey(self, order: str) -> None:
        sides = list(self._sides.values())
        if order == CUT:
            for side in sides:
                self._drop(side)
        elif order == SWALLOW:
            for side in sides:
                side.deaf = True
                side.pending.clear()
                self._watch(side)
        self._admits = order != SWALLOW
        self._orders.send(len(sides) // 2)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._onward) if self._admits else None
        except OSError:
            far = None
        if far is None:
            reset(near)
            return
        one, two = _Side(near), _Side(far)
        one.other, two.other = two, one
        for side in (one, two):
            side.sock.setblocking(False)
            side.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sides[side.sock.fileno()] = side
            self._epoll.register(side.sock.fileno(), select.EPOLLIN)

    def _watch(self, side: _Side) -> None:
        if side.sock.fileno() < 0:
            return
        assert side.other is not None
        wants_in = not side.eof and (side.deaf or not side.other.pending)
        self._epoll.modify(
            side.sock.fileno(), (select.EPOLLIN if wants_in else 0) | (select.EPOLLOUT if side.pending else 0)
        )

    def _move(self, side: _Side, mask: int) -> None:
        other = side.other
        assert other is not None
        try:
            if mask & select.EPOLLOUT:
                del side.pending[: side.sock.send(side.pending)]
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                data = side.sock.recv(_PIECE)
                if side.deaf:
                    if not data:
                        self._drop(side)  # the other side is told nothing
                    return
                if data:
                    other.pending += data
                    with contextlib.suppress(BlockingIOError):
                        del other.pending[: other.sock.send(other.pending)]
                else:
                    side.eof = True
                    other.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(side)
            if not side.deaf:
                self._drop(other)
            return
        if side.eof and other.eof:
            self._drop(side)
            self._drop(other)
            return
        self._watch(side)
        self._watch(other)

    def _drop(self, side: _Side) -> None:
        if self._sides.pop(side.sock.fileno(), None) is not None:
            reset(side.sock)


def _run(listener: socket.socket, onward: Address, orders: Connection) -> NoReturn:
    become_a_load_process()
    _Passing(listener, onward, orders).run()


class Vip:
    """The process, as the test sees it."""

    def __init__(self, onward: Address) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address: Address = listener.getsockname()
        self._orders, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_run, args=(listener, onward, theirs), daemon=True)
        self._process.start()
        listener.close()
        theirs.close()

    def cut(self) -> int:
        """Reset every link, both sides of it."""
        return self._tell(CUT)

    def swallow(self) -> int:
        """Drop what links say from now on, in both directions, telling nobody; reset whoever comes anew."""
        return self._tell(SWALLOW)

    def admit(self) -> int:
        """Let new links through again."""
        return self._tell(ADMIT)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._orders.close()

    def _tell(self, order: str) -> int:
        self._orders.send(order)
        assert self._orders.poll(_PATIENCE), "the VIP does not answer"
        return int(self._orders.recv())
