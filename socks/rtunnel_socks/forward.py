"""Forwards HTTP requests in absolute form, one exchange after another. In the relay's thread.

Unlike the pairs of `relay/join.py`, a `Forwarding` knows where a request and its answer end. It can
therefore rewrite heads, nothing behind a request reaches its target, and both connections can serve
another request: the client's goes back to its `Client` after each answer, the target's is parked
for PARK_SECONDS at most.

Bytes of the client behind its request stay in the kernel, except AHEAD bytes, which are kept for
the next request. FIN and RST are passed on as such, in both directions. States of a socket and
edges: see `relay/join.py`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, Protocol

from rtunnel.compat import override
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.join import PIECE, QUANTUM, Ending, Pair, PairOwner
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Timer
from rtunnel.relay.memory import Memory
from rtunnel.relay.relay import Relay
from rtunnel.wire.http import Forward
from rtunnel.wire.http_body import Body, Chunked, Data, Endless, Sized
from rtunnel.wire.http_response import ResponseReader
from rtunnel.wire.refusal import Refused

#: Seconds that a target's connection waits for another request of its client. Node and Apache close
#: theirs after 5 s: a request on its way at that moment would be lost.
PARK_SECONDS: Final = 4.0
#: Bytes of one read of a chunked body. A chunk costs as much as the copy of CHUNK_COST bytes (1.2
#: us).
CODED_PIECE: Final = 16 * 1024
CHUNK_COST: Final = 2048
#: Bytes of the client's next request that are read ahead, to learn of its FIN.
AHEAD: Final = 16 * 1024


class Exchanger(Protocol):
    """The client, as its forwarding sees it.

    Before each call its end is given back, without a handler.
    """

    def answered(self, rest: bytes) -> None:
        """Hear that the answer is whole, and another request may come.

        `rest`: the client's bytes behind this one.
        """

    def unanswered(self, rest: bytes) -> None:
        """Dial again for the same request: the target has ended a connection that had served
        others.
        """

    def broken(self, refused: Refused) -> None:
        """Refuse the request: the coding of its body is broken, and the target has not answered."""


class _Lost(Exception):
    """A socket failed, in a write or in a read."""

    def __init__(self, side: _Side, *, writing: bool) -> None:
        super().__init__()
        self.side = side
        self.writing = writing


class _Side:
    """One of the two sockets. Reads and writes raise _Lost."""

    __slots__ = ("_memory", "deaf", "end", "eof", "held", "hup", "readable", "shut")

    def __init__(self, end: SocketEnd, handler: Callable[[int], None], memory: Memory) -> None:
        self._memory = memory
        self.held: bytes | memoryview = b""  # written, and not taken by the kernel yet
        self.end = end
        self._hold(end.hand_over(handler))
        self.readable = True  # until a read gives nothing
        self.hup = end.hup
        self.eof = False
        self.shut = False  # FIN is sent
        self.deaf = False  # a write has failed; what the peer has sent before may still be read

    def read(self, view: memoryview) -> int:
        """Read into `view`; return the number of bytes: 0 when there are none now, or no more
        (`eof`).
        """
        try:
            size = self.end.sock.recv_into(view)
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:
            raise _Lost(self, writing=False) from None
        if not size:
            if self.deaf:  # the failed write has used the error up: this is no orderly end
                raise _Lost(self, writing=False)
            self.eof = True
        if not size or (size < len(view) and not self.hup):
            self.readable = False  # epoll(7): a short read has drained the socket
        return size

    def write(self, data: Data) -> int:
        """Send, and hold what the kernel does not take. Return the number of bytes that it took."""
        if self.held:
            self._hold(bytes(self.held) + bytes(data))
            return 0
        try:
            sent = self.end.sock.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            raise _Lost(self, writing=True) from None
        if sent < len(data):
            self._hold(memoryview(bytes(data[sent:])))
            self.end.await_room()
        return sent

    def _hold(self, data: bytes | memoryview) -> None:
        self._memory.hold(len(data) - len(self.held))
        self.held = data

    def drop(self) -> None:
        """Drop what is held."""
        self._hold(b"")

    def flush(self) -> int:
        """Send what is held. Return the number of bytes that the kernel took."""
        held = self.held
        self._hold(b"")
        return self.write(held)

    def finish(self) -> None:
        """Send FIN, once and behind what is held."""
        if self.held or self.shut:
            return
        self.shut = True
        try:
            self.end.sock.shutdown(socket.SHUT_WR)
        except OSError:
            raise _Lost(self, writing=True) from None

    def quiet(self, view: memoryview) -> bool:
        """Return whether neither a byte nor FIN has come."""
        return not self.eof and not (self.readable and (self.read(view[:1]) or self.eof))

    def release(self) -> SocketEnd:
        """Take the socket back from this forwarding, and return its end, without a handler."""
        self.drop()
        self.end.take_back(hup=self.hup or self.eof)
        return self.end

    def reset(self) -> None:
        """Close the socket with RST."""
        self.end.reset_on_close()
        self.close()

    def close(self) -> None:
        """Close the socket, after both directions have ended."""
        self.drop()
        self.end.closed = True
        self.end.loop.close(self.end.sock)


class Forwarding(Pair):
    """The connection to one dialled target, and the client whose requests it serves."""

    __slots__ = (
        "_answer",
        "_body",
        "_client",
        "_cut",
        "_down",
        "_exchanger",
        "_is_first",
        "_is_partial",
        "_max_head",
        "_memory",
        "_parking",
        "_queued",
        "_request",
        "_rest",
        "_scratch",
        "_target",
        "requests",
    )

    def __init__(
        self, relay: Relay, exchanger: Exchanger, target: SocketEnd, down: bytes, *,
        idle: float, max_head: int, owner: PairOwner,
    ) -> None:  # fmt: skip
        """Take the target's connection over.

        `down`: bytes that were read from the target already. `idle`: seconds without a byte after
        which it ends; 0: never. `max_head`: the most bytes of an answer's head.
        """
        super().__init__(relay.loop, relay.pairs, idle, owner)
        self._scratch = relay.scratch.upload
        self._memory = relay.memory
        self._exchanger = exchanger
        self._max_head = max_head
        self._target = _Side(target, self._target_event, relay.memory)
        self.account.up -= len(self._target.held)  # the Dial's last bytes are not the client's
        self._client: _Side | None = None  # during an exchange
        self._request: Forward
        self._body: Body  # the rest of the request's body
        self._answer: ResponseReader
        self._is_first = True  # the client has got no answer yet
        self._down = down
        self._rest = b""  # the client's bytes behind its request
        self._cut = False  # the answer has ended before it was whole
        self._is_partial = False  # the request has ended before it was whole
        self._queued = False
        self._parking: Timer | None = None
        self.requests = 0

    @override
    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        sides = (self._target,) if self._client is None else (self._client, self._target)
        return tuple(side.end.sock for side in sides)

    @property
    def parked(self) -> bool:
        """Whether the target's connection waits for another request."""
        return self._parking is not None

    def exchange(self, request: Forward, client: SocketEnd, early: bytes, *, first: bool) -> None:
        """Serve a request, the client's `first` or a later one. `early`: bytes that came behind its
        head.

        The exchanger and the pair's owner may be called before this returns.
        """
        self._stop_parking()
        self.requests += 1
        self._client = _Side(client, self._client_event, self._memory)
        self._request, self._body, self._is_first = request, request.body, first
        self._cut = self._is_partial = False
        self._answer = ResponseReader(
            is_head=request.method == b"HEAD", keep=request.keep, upgrade=request.upgrade, max_head=self._max_head
        )
        self._guarded(lambda: self._begin(early))

    def _begin(self, early: bytes) -> None:
        self._count_up(self._target.write(self._request.head))
        self._pass_up(early)
        down, self._down = self._down, b""
        if down:
            self._pass_down(down)
        self._run()

    # Events.

    def _client_event(self, mask: int) -> None:
        client = self._client
        if client is not None:
            self._event(mask, client)

    def _target_event(self, mask: int) -> None:
        self._event(mask, self._target)

    def _event(self, mask: int, side: _Side) -> None:
        if mask & (IN | HUP | LOST):
            side.readable = True
            if mask & HUP:
                side.hup = True
        if self._client is None:
            self._look_at_parked()
            return
        self._guarded(lambda: self._step(mask, side))

    def _step(self, mask: int, side: _Side) -> None:
        if mask & OUT and side.held:
            sent = side.flush()
            if side is self._target:
                self._count_up(sent)
            else:
                self._count_down(sent)
        self._run()
        # HUP without an error comes with the second FIN.
        is_ours = side in (self._client, self._target) and not self.done
        if mask & LOST and is_ours and side.end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise _Lost(side, writing=False)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Do a step of an exchange, and end the exchange if a socket fails or a body's coding is
        broken.
        """
        try:
            step()
        except _Lost as error:
            self._lost(error)
        except _BrokenRequest as error:
            refused = error.refused
            self._guarded(lambda: self._stop_request(refused))
        except Refused:
            self.abort(Ending.TARGET_RESET)  # the client must not take a part for the whole

    def _again(self) -> None:
        self._queued = False
        if self._client is not None:
            self._guarded(self._run)

    def _run(self) -> None:
        """Move bytes both ways until nothing moves, or QUANTUM is used up; end the exchange if it
        is done.
        """
        is_up_left, is_down_left = self._run_up(), self._run_down()
        self._settle()
        if (is_up_left or is_down_left) and self._client is not None and not self._queued:
            self._queued = True
            self.loop.soon(self._again)

    # The request.

    def _run_up(self) -> bool:
        """Move the request's body, then read ahead. Return whether QUANTUM stopped it."""
        client, target, budget = self._client, self._target, QUANTUM
        assert client is not None
        while client.readable and not target.held and not self._body.done:
            if budget <= 0:
                return True
            view = self._scratch[: self._piece(self._body)]
            size = client.read(view)
            budget -= self._pass_up(view[:size])
        while client.readable and self._body.done and len(self._rest) < AHEAD:
            size = client.read(self._scratch[: AHEAD - len(self._rest)])
            self._keep(self._rest + self._scratch[:size])
        if client.eof and not (self._body.done and self._rest.strip(b"\r\n")):
            target.finish()  # nothing follows
        return False

    def _piece(self, body: Body) -> int:
        """Return how many bytes to read at once: none behind a body of known length, few of a
        chunked one.
        """
        most = CODED_PIECE if isinstance(body, Chunked) or self._memory.full else PIECE
        return most if body.reach is None else min(most, body.reach)

    def _pass_up(self, data: Data) -> int:
        """Give the target what belongs to the request. Return what that has cost, in bytes."""
        body = self._body
        lines = _lines(body)
        try:
            taken = body.feed(data)
        except Refused as error:
            raise _BrokenRequest(error) from None
        self._keep(bytes(data[taken:]))
        self._count_up(self._target.write(data[:taken]))
        return taken + CHUNK_COST * (_lines(body) - lines)

    def _stop_request(self, refused: Refused) -> None:
        """Send no more of a request whose coding is broken.

        An answer that has begun may go on to its end.
        """
        if self._answer.begun:
            self._is_partial = True
            self._body = Sized(0)
            self._target.finish()
            self._run()
            return
        self._end_exchange(Ending.OVERRUN, reset=True)
        self._exchanger.broken(refused)

    def _read_last_answer(self) -> None:
        """Read what a target has sent that takes no more of the request: it may be an answer, such
        as 413.
        """
        target = self._target
        self._is_partial = self._is_partial or not self._body.done or len(target.held) > 0
        self._body = Sized(0)
        target.deaf = target.shut = True
        target.drop()
        target.readable = not self._answer.done
        self._run()

    # The answer.

    def _run_down(self) -> bool:
        """Move the answer. Return whether QUANTUM stopped it."""
        client, target, answer, budget = self._client, self._target, self._answer, QUANTUM
        assert client is not None
        while target.readable and not client.held and not answer.done and not self._cut:
            if budget <= 0:
                return True
            view = self._scratch[: CODED_PIECE if answer.in_head else self._piece(answer.body)]
            size = target.read(view)
            if size:
                budget -= self._pass_down(view[:size])
            elif target.eof:
                self._count_down(client.write(answer.end()))
                self._cut = not answer.done
        return False

    def _pass_down(self, data: Data) -> int:
        """Give the client what belongs to the answer. Return what that has cost, in bytes."""
        client, answer = self._client, self._answer
        assert client is not None
        lines = _lines(answer.body)
        for piece in answer.feed(data):
            self._count_down(client.write(piece))
        if answer.upgraded and not isinstance(self._body, Endless):
            self._body = Endless()  # from here on it is a tunnel
            self._pass_up(self._rest)
        return len(data) + CHUNK_COST * (_lines(answer.body) - lines)

    # Ends.

    def _settle(self) -> None:
        """End the exchange if the answer is whole, or can't become whole any more."""
        client, target, answer = self._client, self._target, self._answer
        if client is None or client.held or not (answer.done or self._cut):
            return
        if answer.upgraded:
            client.finish()
            if target.shut:
                self._client = None
                self._keep(b"")
                client.close()
                target.close()
                self._finish(Ending.CLOSED)
            return
        if not answer.begun and self.requests > 1 and self._request.replayable:
            self._dial_again()
            return
        is_whole = self._body.done and not target.held and not self._is_partial and not self._cut
        keeps_client = is_whole and answer.keeps_client
        rest = self._rest
        self._keep(b"")
        if keeps_client and answer.keeps_target and not target.shut and target.quiet(self._scratch):
            self._client = None
            client.release()
            self._parking = self.loop.after(PARK_SECONDS, self.close)
        else:
            # A target that has answered early waits for the rest of the request: only RST ends
            # that.
            self._end_exchange(Ending.CLOSED, reset=not is_whole and not target.eof)
        if keeps_client:
            self._exchanger.answered(rest)
        else:
            client.end.close()

    def _end_exchange(self, ending: Ending, *, reset: bool) -> None:
        """Close the target's connection (`reset`: with RST), end the pair, and give the client's
        end back.
        """
        client, self._client = self._client, None
        assert client is not None
        self._keep(b"")
        if reset:
            self._target.reset()
        else:
            self._target.release().close()
        self._finish(ending)
        client.release()

    def close(self) -> None:
        """Close a parked connection, in order. No effect during an exchange."""
        self._stop_parking()
        if not self.done and self._client is None:
            self._target.release().close()
            self._finish(Ending.CLOSED)

    def _look_at_parked(self) -> None:
        """Close a parked connection on which a byte or FIN has come: it can't serve another
        request.
        """
        if self.done:
            return
        try:
            is_quiet = self._target.quiet(self._scratch)
        except _Lost:
            self.abort(Ending.CLOSED)
        else:
            if not is_quiet:
                self.close()

    def _lost(self, lost: _Lost) -> None:
        client, answer, target = self._client, self._answer, self._target
        if lost.side is not target:
            self.abort(Ending.CLIENT_RESET)
        elif client is None or answer.upgraded:
            self.abort(Ending.TARGET_RESET)
        elif not target.deaf and (lost.writing or answer.done):
            self._guarded(self._read_last_answer)
        elif not answer.begun and self.requests > 1 and self._request.replayable:
            self._dial_again()
        elif not answer.begun and not self._is_first:
            # A RST could overtake the answers before this one.
            self._end_exchange(Ending.TARGET_RESET, reset=True)
            client.end.close()
        else:
            self.abort(Ending.TARGET_RESET)

    def _dial_again(self) -> None:
        rest = self._rest
        self._end_exchange(Ending.CLOSED, reset=True)
        self._exchanger.unanswered(rest)

    @override
    def abort(self, ending: Ending) -> None:
        """Reset the target, and the client during an exchange; a client between exchanges stays."""
        self._stop_parking()
        if self.done:
            return
        client, self._client = self._client, None
        self._keep(b"")
        if client is not None:
            client.reset()
        self._target.reset()
        self._finish(ending)

    def _stop_parking(self) -> None:
        if self._parking is not None:
            self._parking.cancel()
            self._parking = None

    def _keep(self, rest: bytes) -> None:
        """Hold these bytes of the client for its next request."""
        self._memory.hold(len(rest) - len(self._rest))
        self._rest = rest

    def _count_up(self, size: int) -> None:
        self.moved = self.loop.now
        self.account.up += size

    def _count_down(self, size: int) -> None:
        self.moved = self.loop.now
        self.account.down += size


class _BrokenRequest(Exception):
    """The coding of the request's body is broken."""

    def __init__(self, refused: Refused) -> None:
        super().__init__()
        self.refused = refused


def _lines(body: Body) -> int:
    return body.lines if isinstance(body, Chunked) else 0
