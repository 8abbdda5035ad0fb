"""The authority's connections: each message is a request and gets one answer.

Everything runs in trio's thread, except the store, which runs on a worker thread.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import trio

import rtunnel
from rtunnel.compat import override
from rtunnel.config import AuthorityConfig, format_endpoint, parse_endpoint
from rtunnel.errors import TrustError
from rtunnel.logs import Throttle, get_logger
from rtunnel.net import listening_socket, source_of
from rtunnel.strangers import Place, Strangers
from rtunnel.trust.authority import Authority, Granted, claimed
from rtunnel.trust.certificates import DAY, Ca, Term, key_pem, new_key, pem
from rtunnel.trust.pki import Directory
from rtunnel.trust.tls import server_context
from rtunnel.wire.messages import VERSION, Decoder, Enrol, Follow, Message, MessageError, Refuse, Trust, encode
from rtunnel.wire.refusal import Refusal, Refused

_T = TypeVar("_T")

#: Seconds from one whole message to the next, and for a TLS handshake.
DEADLINE: Final = 10.0
#: Seconds without a first byte after which a connection ends: clients send their ClientHello at
#: once.
FIRST_BYTES: Final = 3.0
#: A broker or gateway process has one connection, and up to 8 while many agents enrol. Each costs
#: 64 KiB at most: 128 MiB in all.
MAX_CONNECTIONS: Final = 2048
MAX_OF_SOURCE: Final = 512
#: Bytes of one read: OpenSSL's buffers stay as large as the largest piece was.
READ_BYTES: Final = 4 * 1024
#: Bytes that a client may send in the TLS handshake. OpenSSL alone would keep a ClientHello of 128
#: KiB, twice.
HANDSHAKE_BYTES: Final = 32 * 1024
#: Log lines in ten seconds about messages that cannot be read, and about requests refused for one
#: reason.
REFUSED_LINES: Final = 32
#: Seconds between two checks for changes by `rtunnel pki`. With a follower's own pause the sum is
#: far below 5 s.
LOOK_SECONDS: Final = 0.5
#: Days of the authority's own certificate, which is replaced after half of them.
OWN_DAYS: Final = 7


class Server:
    """The authority's process: connections, decisions and status."""

    def __init__(self, config: AuthorityConfig) -> None:
        """Open the directory. Raises TrustError when it cannot be used."""
        self.directory = Directory(Path(config.directory))
        self.authority = Authority(self.directory, renew_unknown=config.renew == "all")
        # Issued certificates, by the way in which they were obtained.
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # by code word
        self.bound = ("", 0)
        self._listen = config.listen
        self._log = get_logger("authority").bind()
        # SQLite runs transactions one after another in any case.
        self._one = trio.CapacityLimiter(1)
        self._visitors: Strangers[_Visitor] = Strangers(
            MAX_CONNECTIONS, MAX_OF_SOURCE, lambda visitor: not visitor.spoke, silent_grace=0.0
        )
        self._throttle = Throttle()
        self._fault = ""
        # Copies from which Follow requests are answered.
        self._number = self.directory.number
        self._generation = self.directory.trust_store.generation
        self._signed = self.directory.signed
        self._tls = _Tls(self.directory.issuing)

    @property
    def connections(self) -> int:
        """Return the number of connections."""
        return len(self._visitors)

    def close(self) -> None:
        """Close the directory, after `run` has ended."""
        self.directory.close()

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept connections until `stop`. Calls `started` when it listens. Raises ListenError."""
        sock = listening_socket(*parse_endpoint(self._listen), key="authority.listen")
        self.bound = sock.getsockname()[:2]
        async with (
            trio.SocketListener(trio.socket.from_stdlib_socket(sock)) as listener,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._look)
            nursery.start_soon(trio.serve_listeners, self._connection, [listener])
            self._log.info("authority_started", listen=format_endpoint(*self.bound), list=self._number)
            task_status.started(self)
            await stop.wait()
            nursery.cancel_scope.cancel()

    def reasons(self) -> list[str]:
        """Return why the authority is not ready; empty when it is."""
        return [f"store: {self._fault}"] if self._fault else []

    async def answered(self) -> None:
        """Return at once: everything runs in trio's thread, which runs this."""
        await trio.lowlevel.checkpoint()

    def status(self) -> dict[str, object]:
        """Return the state for /statusz."""
        return {
            "role": "authority",
            "directory": str(self.directory.path),
            "version": rtunnel.__version__,
            "trust": {"number": self._number, "generation": self._generation},
            "ca_ends": self._tls.ca_ends,
            "reasons": self.reasons(),
            "store": self._fault or "ok",
            "connections": self.connections,
            **{name: self.counts[name] for name in ("enrolled", "renewed")},
            "refused": dict(self.refused),
        }

    # The directory. These methods run on a worker thread.

    async def _there(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(call, limiter=self._one)

    async def _look(self) -> None:
        """Load what `rtunnel pki` has changed, until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            try:
                await self._there(self._refresh)
            # TrustError is expected; after any other error the process must go on too.
            except Exception as error:
                self._store_is(str(error) if isinstance(error, TrustError) else f"{type(error).__name__}: {error}")
            else:
                self._store_is("")

    def _refresh(self) -> None:
        self.directory.refresh()
        if self.directory.number != self._number:
            self._log.info(
                "trust_list_loaded", number=self.directory.number, revoked=len(self.directory.trust_store.revoked)
            )
        # The order matters: trio's thread reads these values, and then sends a list too often
        # rather than an old one.
        self._signed = self.directory.signed
        self._number, self._generation = self.directory.number, self.directory.trust_store.generation
        if self._tls.is_of_yesterday(self.directory.issuing):
            self._tls = _Tls(self.directory.issuing)

    def _store_is(self, fault: str) -> None:
        if fault and fault != self._fault:
            self._log.error("store_failed", reason=fault, hint="no agent can enrol or renew until this is mended")
        self._fault = fault

    # Connections.

    async def _connection(self, tcp: trio.SocketStream) -> None:
        try:
            source = str(tcp.socket.getpeername()[0])
            peer = format_endpoint(*tcp.socket.getpeername()[:2])
        except OSError:  # the peer has already disconnected
            return
        visitor = _Visitor(tcp)
        if not self._admit(source_of(source), visitor):
            self._full(peer)
            return
        try:
            with visitor.scope:
                if await visitor.speaks():
                    tls = trio.SSLStream(visitor, self._tls.context, server_side=True, https_compatible=True)
                    await self._converse(tls, peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception:
            self._log.exception("connection_failed", peer=peer)
        finally:
            self._leave(visitor)

    def _admit(self, source: str, visitor: _Visitor) -> bool:
        """Give the connection a place, and end another one if there is none.

        The other one is silent, or the oldest of the largest source. A broker or gateway whose
        connection ends in this way repeats its request on a new one.
        """
        now = trio.current_time()
        if not self._visitors.has_room(source):
            weakest = self._visitors.weakest(source, now)
            if weakest is None:
                return False
            self._leave(weakest)
            weakest.scope.cancel()
        visitor.place = self._visitors.enter(source, visitor, now)
        return True

    def _leave(self, visitor: _Visitor) -> None:
        place, visitor.place = visitor.place, None
        if place is not None:
            place.release()

    def _full(self, peer: str) -> None:
        self.refused[Refusal.OVERLOADED.value] += 1
        self._warn("connection_limit_reached", "", 1, peer=peer, limit=MAX_CONNECTIONS, of_one_source=MAX_OF_SOURCE)

    def _warn(self, event: str, kind: str, lines: int, **fields: object) -> None:
        """Log a warning that any peer can cause: a limited number for each kind in ten seconds."""
        others = self._throttle.others(f"{event} {kind}", trio.current_time(), lines)
        if others is not None:
            self._log.warning(event, **fields, **({"others_since": others} if others else {}))

    async def _converse(self, stream: trio.SSLStream[_Visitor], peer: str) -> None:
        """Answer requests until the peer closes the connection, or is too slow, or is at fault."""
        decoder = Decoder[Enrol | Follow](Enrol, Follow)
        with trio.move_on_after(DEADLINE) as shaking:
            await stream.do_handshake()
        if shaking.cancelled_caught:
            return
        stream.transport_stream.is_up = True
        while True:
            with trio.move_on_after(DEADLINE) as waiting:
                try:
                    while (question := decoder.next()) is None:
                        data = await stream.receive_some(decoder.limit)
                        if not data:
                            return
                        decoder.feed(data)
                    answer = await self._answer(question, peer)
                except MessageError as error:
                    code = Refusal.VERSION if error.other_version else Refusal.PROTOCOL_ERROR
                    self._warn("message_rejected", code.value, REFUSED_LINES, peer=peer, reason=str(error))
                    await stream.send_all(encode(Refuse(code, str(error)[:512])))
                    return
                await stream.send_all(encode(answer))
            if waiting.cancelled_caught:
                return

    async def _answer(self, question: Enrol | Follow, peer: str) -> Message:
        if isinstance(question, Follow):
            if question.version != VERSION:
                return Refuse(Refusal.VERSION, f"version {question.version} is not spoken here, only {VERSION}")
            return Trust(self._signed if question.number < self._number else b"")
        try:
            granted = await self._there(lambda: self.authority.enrol(question))
        except Refused as error:
            return self._refuse(question, error.code, error.text, peer)
        except TrustError as error:
            self._store_is(str(error))
            text = "the authority can't read or write its store: see its log"
            return self._refuse(question, Refusal.AUTHORITY_UNAVAILABLE, text, peer)
        self._granted(granted, peer)
        return granted.answer

    def _granted(self, granted: Granted, peer: str) -> None:
        self.counts["enrolled" if granted.token_id else "renewed"] += 1
        self._log.info(
            "certificate_issued" if granted.token_id else "certificate_renewed",
            subject=granted.request.subject,
            addresses=list(granted.request.addresses),
            until=datetime.fromtimestamp(granted.ends, UTC).isoformat(timespec="seconds"),
            peer=peer,
            **({"token": granted.token_id} if granted.token_id else {}),
            **({"took_over_from": list(granted.took_over)} if granted.took_over else {}),
        )

    def _refuse(self, question: Enrol, code: Refusal, text: str, peer: str) -> Refuse:
        self.refused[code.value] += 1
        asked = claimed(question)
        self._warn(
            "enrol_refused",
            code.value,
            REFUSED_LINES,
            code=code,
            reason=text,
            token=question.token_id,
            subject=asked.subject if asked else "",
            addresses=list(asked.addresses) if asked else [],
            peer=peer,
        )
        return Refuse(code, text[:512])


class _Visitor(trio.abc.Stream):
    """One connection, with limits on its cost before the TLS handshake is complete."""

    def __init__(self, tcp: trio.SocketStream) -> None:
        self.scope = trio.CancelScope()
        self.place: Place[_Visitor] | None = None
        self.spoke = False  # its first byte has arrived
        self.is_up = False  # the TLS handshake is done
        self._tcp = tcp
        self._shaken = 0  # bytes before that

    async def speaks(self) -> bool:
        """Wait for the first byte, so that a silent peer costs no TLS.

        Return False when none comes in time.
        """
        with trio.move_on_after(FIRST_BYTES):
            try:
                self.spoke = bool(await self._tcp.socket.recv(1, socket.MSG_PEEK))
            except OSError:
                return False
        return self.spoke

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._tcp.receive_some(min(max_bytes or READ_BYTES, READ_BYTES))
        if not self.is_up:
            self._shaken += len(data)
            if self._shaken > HANDSHAKE_BYTES:
                raise trio.BrokenResourceError(f"the client's TLS handshake is over {HANDSHAKE_BYTES} bytes")
        return data

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._tcp.send_all(data)

    @override
    async def wait_send_all_might_not_block(self) -> None:
        await self._tcp.wait_send_all_might_not_block()

    @override
    async def aclose(self) -> None:
        await self._tcp.aclose()


class _Tls:
    """A certificate that the authority makes for itself; its key never leaves this process."""

    def __init__(self, ca: Ca) -> None:
        now = time.time()
        key = new_key()
        certificate = ca.certify_authority(key.public_key(), Term(now, OWN_DAYS * DAY))
        self._issuer = ca.fingerprint
        self.ca_ends = ca.certificate.not_valid_after_utc.timestamp()
        self._made = now
        # OpenSSL loads it from a file only: here from one without a name.
        descriptor = os.memfd_create("authority")
        try:
            os.write(descriptor, pem(certificate) + key_pem(key))
            self.context: ssl.SSLContext = server_context(*[f"/proc/self/fd/{descriptor}"] * 2)
        finally:
            os.close(descriptor)

    def is_of_yesterday(self, ca: Ca) -> bool:
        """Return whether the certificate must be replaced."""
        return ca.fingerprint != self._issuer or time.time() > self._made + OWN_DAYS * DAY / 2
