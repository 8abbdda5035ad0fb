"""The relay: a thread with one loop, and what a role asks of it: listen, connect, link, join.

Everything but `Relay.start`, `stop`, `call` and `running` must run in the relay's own thread.
"""

from __future__ import annotations

import errno
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rtunnel.relay.ends import End, SocketEnd, reset_on_close
from rtunnel.relay.join import Account, Ending, Pair, PairOwner, Shared
from rtunnel.relay.link import Handshake, Link, LinkOwner, Links
from rtunnel.relay.loop import HUP, IN, LOST, OUT, Loop, Poller, Timer
from rtunnel.relay.lost import closed
from rtunnel.relay.memory import BUDGET, Memory, trim
from rtunnel.relay.socketpair import Pipes, SocketPair
from rtunnel.relay.stream import StreamEnd
from rtunnel.relay.streampair import StreamPair
from rtunnel.relay.tls import TlsEnd, TlsSocket
from rtunnel.relay.transport import Scratch
from rtunnel.wire.refusal import Refusal

#: Connections accepted from one listener per loop turn, at most. As many as wait are taken at once:
#: what they cause then leaves together. One per turn, doubling, cost 3 to 6 % more CPU under 64
#: clients.
ACCEPTS_A_TURN: Final = 64
#: Connections accepted from a listener that closes: a full queue (rtunnel.net.BACKLOG).
MAX_LAST_ACCEPTS: Final = 4096
#: accept(2) fails with these while the process or the machine has no room for another connection.
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: Seconds until a listener that ran out of descriptors accepts again.
ACCEPT_PAUSE: Final = 0.5
#: Seconds after which a connection of a `client_speaks` listener is accepted without a byte
#: (TCP_DEFER_ACCEPT, tcp(7)).
DEFER_SECONDS: Final = 1
#: Seconds after which a pair gets TCP keep-alive on its sockets: four calls that a short connection
#: does not repay.
WATCH_SECONDS: Final = 30.0
#: Seconds between two looks whether there is memory to give back to the kernel.
TRIM_SECONDS: Final = 10.0
#: Pairs whose owners are asked `allowed` in one loop turn: a millisecond or two.
REVIEWS_A_TURN: Final = 100
#: A peer that answers nothing is then noticed after 60 + 4 * 15 s of silence.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))

#: IP_BIND_ADDRESS_NO_PORT (ip(7)): connect(2) chooses the port, so that one port serves many
#: targets.
_BIND_ADDRESS_NO_PORT: Final = 24

#: The refusal for each errno of a connect; INTERNAL for all others.
_CONNECT_REFUSALS: Final = {
    errno.ECONNREFUSED: Refusal.TARGET_REFUSED,
    errno.ECONNRESET: Refusal.TARGET_REFUSED,
    errno.ETIMEDOUT: Refusal.TARGET_TIMEOUT,
    errno.ENETUNREACH: Refusal.TARGET_UNREACHABLE,
    errno.EHOSTUNREACH: Refusal.TARGET_UNREACHABLE,
    errno.EADDRNOTAVAIL: Refusal.OVERLOADED,  # no free source port
    errno.EACCES: Refusal.TARGET_UNREACHABLE,
    errno.EPERM: Refusal.TARGET_UNREACHABLE,
    errno.EMFILE: Refusal.OVERLOADED,
    errno.ENFILE: Refusal.OVERLOADED,
    errno.EAGAIN: Refusal.OVERLOADED,
}

Accept = Callable[[socket.socket, str], None]
Connected = Callable[[SocketEnd | None, Refusal, str], None]
Report = Callable[[str, dict[str, object]], None]


def _set_keep_alive(sock: socket.socket) -> None:
    """Let the kernel probe a silent peer (RFC 9293 section 3.8.4)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        pass  # the connection is lost, and its next event says so


class Listener:
    """Accepts connections of one listening socket until `close`; made by `Relay.listen`.

    When the process runs out of descriptors it pauses for ACCEPT_PAUSE, and reports that.
    """

    __slots__ = ("_accept", "_family", "_held", "_loop", "_paused", "_report", "bound", "closed", "sock")

    def __init__(self, loop: Loop, sock: socket.socket, accept: Accept, report: Report, *, client_speaks: bool) -> None:
        self._loop = loop
        self._accept = accept
        self._report = report
        self._paused: Timer | None = None
        self._held = False
        self.sock = sock
        host, port = sock.getsockname()[:2]
        self.bound: tuple[str, int] = (host, port)  # where it listens, or did until `close`
        self._family = int(sock.family)
        self.closed = False
        sock.setblocking(False)
        # Accepted sockets inherit these options at no cost.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # else recv skips urgent bytes
        if client_speaks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_SECONDS)
        loop.add_listener(sock.fileno(), self._accept_some)

    def close(self) -> None:
        """Accept no more. The port is free when this returns; accepted connections stay."""
        if not self.closed:
            self.closed = True
            try:
                self.sock.shutdown(socket.SHUT_RDWR)  # its descriptor: at the end of the turn
            except OSError:
                pass
            if self._paused is not None:
                self._paused.cancel()
            self._loop.close(self.sock)

    def accept_silent(self) -> None:
        """Accept connections without a byte too, as without `client_speaks`.

        The kernel keeps a silent connection of a `client_speaks` listener outside the queue for up
        to DEFER_SECONDS, and resets it when the listener closes. One that came before this call
        arrives about that much later.
        """
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)

    def finish(self) -> None:
        """Accept what waits in the kernel's queue, then close: close(2) alone would reset it."""
        self._held = False
        for _ in range(MAX_LAST_ACCEPTS):
            if self.closed:
                return
            try:
                sock, address = self._take()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._report("accept_failed", {"reason": error.strerror, "hint": "the queue is reset"})
                    break
                continue  # the peer has left the queue (ECONNABORTED): try the next one
            self._accept(sock, address)
        self.close()

    def hold(self) -> None:
        """Accept no more until `release`; the kernel queues connections, then drops SYNs."""
        if not self._held and not self.closed:
            self._held = True
            self._loop.hold_listener(self.sock.fileno(), hold=True)

    def release(self) -> None:
        """Accept again, after `hold`."""
        if self._held:
            self._held = False
            self._watch_again()

    def _watch_again(self) -> None:
        if not (self.closed or self._held or self._paused is not None):
            self._loop.hold_listener(self.sock.fileno(), hold=False)

    def _accept_some(self, _mask: int) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if self.closed or self._held or self._paused is not None:
                return
            try:
                sock, address = self._take()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue  # the peer has left the queue (ECONNABORTED): try the next one
            self._accept(sock, address)

    def _take(self) -> tuple[socket.socket, str]:
        """Return the next connection of the kernel's queue, non-blocking, and its peer's address.

        `socket.accept` does the same, and makes two enums of the listener's family and type for
        each connection, which takes longer than the system call.
        """
        fd, address = self.sock._accept()  # type: ignore[attr-defined]  # of socket.py, since 3.0
        sock = socket.socket(self._family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fd)
        sock.setblocking(False)
        return sock, address[0]

    def _pause(self, error: OSError) -> None:
        self._report("accept_paused", {"reason": error.strerror, "seconds": ACCEPT_PAUSE})
        self._paused = self._loop.after(ACCEPT_PAUSE, self._resume)
        self._loop.hold_listener(self.sock.fileno(), hold=True)

    def _resume(self) -> None:
        self._paused = None
        self._watch_again()


def _finds_source(host: str) -> bool:
    """Return whether the kernel has a source address for packets to this IP. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))
    except OSError:
        return False
    return True


def bind_address(sock: socket.socket, source: str) -> int:
    """Let the socket connect from this local address, by any port. Return 0, or the errno."""
    try:
        sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _bind_refusal(code: int, source: str, where: str) -> tuple[Refusal, str]:
    """Return the refusal and the sentence for a bind to `source` that failed with this errno."""
    if code == errno.EADDRNOTAVAIL:
        return Refusal.STALE_TARGET, f"connect to {where}: {source} is not an address of this host any more"
    name = errno.errorcode.get(code, str(code))
    return Refusal.INTERNAL, f"connect to {where}: the source address {source} can't be used ({name})"


def _connect_refusal(code: int, host: str, where: str) -> tuple[Refusal, str]:
    """Return the refusal and the sentence for a connect to `host` that failed with this errno."""
    name = errno.errorcode.get(code, str(code))
    if code == errno.EADDRNOTAVAIL:
        if not _finds_source(host):  # as where IPv6 is off on the interface
            return Refusal.TARGET_UNREACHABLE, f"connect to {where}: this host has no source address for it ({name})"
        fix = "widen net.ipv4.ip_local_port_range"
        return Refusal.OVERLOADED, f"no free source port towards {where} on this host ({name}): {fix}"
    return _CONNECT_REFUSALS.get(code, Refusal.INTERNAL), f"connect to {where}: {name}"


def ephemeral_ports() -> range:
    """Return the range of the kernel's source ports; all ports if it can't be read."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return range(int(first), int(last) + 1)
    except (OSError, ValueError):
        return range(1, 65536)


def _is_self_connected(sock: socket.socket, port: int) -> bool:
    """Return whether the socket is connected to itself.

    TCP allows that (simultaneous open, RFC 9293 section 3.5) when the kernel chooses the target's
    port as the source port, which it does only while no socket listens there.
    """
    try:
        return bool(sock.getsockname()[1] == port and sock.getsockname() == sock.getpeername())
    except OSError:
        return False  # the connection is lost already, and its next event says so


class Attempt:
    """A connect that has begun; made by `Relay.connect`. `where` is the target's "IP:port" for
    texts.

    `done` is called once, in a later step of the loop than `begin`, unless `cancel` is called
    before.
    """

    __slots__ = (
        "_done",
        "_host",
        "_loop",
        "_may_meet_itself",
        "_port",
        "_sock",
        "_timer",
        "errno",
        "pending",
        "where",
    )

    def __init__(self, loop: Loop, host: str, port: int, done: Connected, *, may_meet_itself: bool) -> None:
        self._loop = loop
        self._host = host
        self._port = port
        self._may_meet_itself = may_meet_itself
        self._done: Connected | None = done
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self.pending = False  # `begin` has neither connected nor failed at once
        self.errno = 0  # of the failed connect
        self.where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def begin(self, timeout: float, source: str) -> None:
        """Begin to connect. `timeout`, `source` ("": any): as of `Relay.connect`."""
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._fail_soon(error.errno or 0)
            return
        self._sock = sock
        if source and (code := bind_address(sock, source)):
            self._drop()
            self._loop.soon(lambda: self._tell(*_bind_refusal(code, source, self.where)))
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            code = sock.connect_ex((self._host, self._port))
            if code == errno.EINPROGRESS:
                # An agent's targets are on its own host, where the TCP handshake is done by now:
                # the second call says so, and saves the event.
                code = sock.connect_ex((self._host, self._port))
        except OSError as error:
            code = error.errno or errno.EINVAL
        if not code and self._may_meet_itself and _is_self_connected(sock, self._port):
            code = self._refuse_self()
        if not code:
            self._loop.soon(self._at_once)
        elif code in (errno.EINPROGRESS, errno.EALREADY):
            self.pending = True
            if timeout:
                self._timer = self._loop.after(timeout, self._late)
            self._loop.add(sock.fileno(), self._event)
        else:
            self._drop()
            self._fail_soon(code)

    def cancel(self) -> None:
        """Drop the connect; `done` is not called any more."""
        self._done = None
        self._drop()

    def _at_once(self) -> None:
        if self._loop.stopped:
            self.cancel()  # nothing would close the new end
            return
        sock, self._sock = self._sock, None
        done, self._done = self._done, None
        if sock is not None and done is not None:
            done(SocketEnd(self._loop, sock, self.where), Refusal.INTERNAL, "")

    def _event(self, mask: int) -> None:
        sock = self._sock
        if sock is None or not mask & (OUT | LOST):
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and self._may_meet_itself and _is_self_connected(sock, self._port):
            code = self._refuse_self()
        if code:
            self._fail(code)
        elif self._done is not None:
            self._stop_timer()
            self._sock = None
            done, self._done = self._done, None
            end = SocketEnd(self._loop, sock, self.where, watched=True)
            # Bytes and a FIN that came with the connection have no edge of their own.
            end.readable = bool(mask & (IN | HUP))
            end.hup = bool(mask & HUP)
            done(end, Refusal.INTERNAL, "")

    def _refuse_self(self) -> int:
        """Return ECONNREFUSED: no socket listens there. Free the port without TIME_WAIT."""
        assert self._sock is not None
        reset_on_close(self._sock)
        return errno.ECONNREFUSED

    def _late(self) -> None:
        self._fail(errno.ETIMEDOUT)

    def _fail_soon(self, code: int) -> None:
        self._loop.soon(lambda: self._fail(code))

    def _fail(self, code: int) -> None:
        self._drop()
        self.errno = code
        if self._done is not None:
            self._tell(*_connect_refusal(code, self._host, self.where))

    def _tell(self, code: Refusal, why: str) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(None, code, why)

    def _drop(self) -> None:
        self._stop_timer()
        sock, self._sock = self._sock, None
        if sock is not None and not self._loop.close(sock):
            sock.close()  # the loop does not watch it yet

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Relay:
    """A thread with one loop, and all that goes through it."""

    def __init__(
        self, report: Report, name: str = "relay", poller: Poller | None = None, *, memory: int = BUDGET
    ) -> None:
        """Make a relay; `start` starts its thread.

        `report(event, fields)` gets events for the log; it must not block. `memory`: the budget of
        bytes for the relay's streams (`rtunnel.relay.memory`). `poller`: as of `Loop`.
        """
        self._report = report
        self.loop = Loop(self._crashed, poller)
        self.scratch = Scratch(Memory(memory))
        self.pipes = Pipes()
        self.memory = self.scratch.memory
        self.pairs: set[Pair] = set()
        self._shared = Shared(self.loop, self.pairs, self.scratch, self.pipes)
        self.listeners: set[Listener] = set()
        self.links = Links(self.loop, self.scratch)
        self._ephemeral = ephemeral_ports()
        self._thread = threading.Thread(target=self.loop.run, name=name, daemon=True)

    # From any thread.

    def start(self) -> None:
        """Start the relay's thread."""
        # While the control plane computes, the default of 5 ms would be added to each round trip.
        sys.setswitchinterval(0.0005)
        self.call(self._renew_settings)
        self.call(self._trim)
        self._thread.start()

    def call(self, call: Callable[[], None]) -> None:
        """Run a call in the relay's thread, soon. It is dropped when the relay has stopped."""
        self.loop.call(call)

    def stop(self, timeout: float = 5.0) -> None:
        """Reset all links, pairs and ends now, and wait up to `timeout` seconds for the thread."""
        if self._thread.is_alive():
            self.call(self._end_all)
            self._thread.join(timeout)

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # In the relay's thread.

    def listen(self, sock: socket.socket, accept: Accept, *, client_speaks: bool = False) -> Listener:
        """Accept connections of a listening socket: `accept(socket, peer IP)` for each.

        `client_speaks`: the client sends the first byte, so that a connection is accepted when that
        byte has come, or after DEFER_SECONDS: one wake-up for both.
        """
        listener = Listener(self.loop, sock, accept, self._report, client_speaks=client_speaks)
        self.listeners.add(listener)
        return listener

    def unlisten(self, listener: Listener, *, serve_queue: bool = False) -> None:
        """Close a listener. `serve_queue`: accept what waits in the kernel's queue first."""
        self.listeners.discard(listener)
        if serve_queue:
            listener.finish()
        else:
            listener.close()

    def end(self, sock: socket.socket, peer: str, *, spoken: bool = False) -> SocketEnd:
        """Make an accepted socket an end. `spoken`: a byte has come (`client_speaks`)."""
        end = SocketEnd(self.loop, sock, peer)
        end.readable = spoken
        return end

    def secure(
        self,
        end: SocketEnd,
        context: ssl.SSLContext,
        *,
        alpn: str,
        server_name: str | None = None,
        otherwise: bytes = b"",
    ) -> TlsEnd:
        """Put TLS on an end that has no handler yet. Arguments: as of `TlsEnd`."""
        return TlsEnd(end, context, self.scratch, server_name=server_name, alpn=alpn, otherwise=otherwise)

    def connect(self, host: str, port: int, timeout: float, done: Connected, *, source: str = "") -> Attempt:
        """Connect to an IP; later call `done(end, _, "")`, or `done(None, refusal, text)`.

        `timeout`: seconds; 0: the caller must `cancel`. `source`: the local address to connect
        from; on a host without it the refusal is STALE_TARGET.
        """
        attempt = Attempt(self.loop, host, port, done, may_meet_itself=port in self._ephemeral)
        attempt.begin(timeout, source)
        return attempt

    def link(
        self, sock: socket.socket, owner: LinkOwner, handshake: Handshake, *, peer: str, watched: bool = False
    ) -> Link:
        """Make a connected socket a link. `peer`: the other end's IP.

        `watched`: the loop watches the socket already.
        """
        link = Link(self.links, sock, owner, handshake, peer)
        link.begin(watched=watched)
        return link

    def join(
        self,
        client: End,
        target: End,
        *,
        up: bytes = b"",
        down: bytes = b"",
        idle: float = 0.0,
        owner: PairOwner,
    ) -> None:
        """Make two ends a pair. `up`, `down`: bytes that handlers have read ahead, which go first.

        `idle`: seconds without a byte after which the pair ends; 0: never. When an end is closed or
        broken the other is reset. `owner.ended` may be called before this returns. Raises TypeError
        for two streams.
        """
        if client.closed or client.broken or target.closed or target.broken:
            ending = Ending.CLIENT_RESET if client.closed or client.broken else Ending.TARGET_RESET
            client.abort()
            target.abort()
            owner.ended(Account(self.loop.now, ended=self.loop.now, ending=ending))
        elif isinstance(client, SocketEnd) and isinstance(target, SocketEnd):
            SocketPair(self._shared, client, target, up=up, down=down, idle=idle, owner=owner)
        elif isinstance(client, SocketEnd) and isinstance(target, StreamEnd):
            StreamPair(
                self._shared, client, target,
                socket_is_client=True, out=up, back=down, idle=idle, owner=owner,
            )  # fmt: skip
        elif isinstance(client, StreamEnd) and isinstance(target, SocketEnd):
            StreamPair(
                self._shared, target, client,
                socket_is_client=False, out=down, back=up, idle=idle, owner=owner,
            )  # fmt: skip
        else:
            raise TypeError("two streams can't be joined")

    def review(self) -> None:
        """End the pairs that their owners no longer allow: some now, the others in later turns."""
        pairs = list(self.pairs)

        def some() -> None:
            for pair in pairs[-REVIEWS_A_TURN:]:
                if not pair.done and (ending := pair.owner.review()) is not None:
                    pair.abort(ending)
            del pairs[-REVIEWS_A_TURN:]
            if pairs:
                self.loop.soon(some)

        some()

    def _renew_settings(self) -> None:
        """Set TCP keep-alive for old pairs, and read the range of source ports again."""
        self._ephemeral = ephemeral_ports()
        for pair in self.pairs:
            if not pair.watched and self.loop.now - pair.account.started >= WATCH_SECONDS:
                pair.watched = True
                for sock in pair.sockets:
                    _set_keep_alive(sock)
        self.loop.after(WATCH_SECONDS, self._renew_settings)

    def _trim(self) -> None:
        """Give memory back to the kernel: an agent kept 518 MiB after a flood of uploads."""
        if self.memory.fell():
            threading.Thread(target=trim, name="trim", daemon=True).start()
        self.loop.after(TRIM_SECONDS, self._trim)

    def _end_all(self) -> None:
        for listener in list(self.listeners):
            self.unlisten(listener)
        for pair in list(self.pairs):
            pair.abort(Ending.DRAINED)
        for link in list(self.links):
            link.abort(closed("stopped"))
        for handler in list(self.loop.handlers.values()):
            owner = getattr(handler, "__self__", None)
            if isinstance(owner, SocketEnd):
                owner.cut_short()  # before a join, or closing
            elif isinstance(owner, Attempt):
                owner.cancel()
            elif isinstance(owner, TlsSocket):
                owner.abandon()  # closed, with bytes pending
        self.pipes.close()
        self.loop.stop()

    def _crashed(self, crash: BaseException) -> None:
        self._report("relay_crashed", {"exc_info": crash})
