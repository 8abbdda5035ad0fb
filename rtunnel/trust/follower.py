"""Keeps one process's trust list current: the CAs in force and the revocations. In trio's thread.

They come from files and from the authority. A list is trusted for its signature, so all ways may be
used at once, and the newest list wins. While the authority is unreachable, the last list stays in
force.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.config import parse_endpoint
from rtunnel.errors import TrustError, certificate_fault
from rtunnel.trust.certificates import AUTHORITY_NAME
from rtunnel.trust.files import PUBLIC, keep_trust_list
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.tls import client_context_of
from rtunnel.watch import Watched, watch
from rtunnel.wire.messages import (
    MAX_MESSAGE,
    VERSION,
    Decoder,
    Enrol,
    Enrolled,
    Follow,
    M,
    Message,
    MessageError,
    Refuse,
    Trust,
    encode,
)
from rtunnel.wire.refusal import Refusal, Refused

#: Seconds between two requests to the authority for a newer list.
FOLLOW_SECONDS: Final = 1.5
#: Seconds that a request to the authority may take, including the connect.
PATIENCE: Final = 5.0
#: Connections to the authority at once for enrolments. Requests for a list use one more.
MAX_LINES: Final = 8
# Bytes of a file; a trust list with its wrapping has fewer, and a longer file is the wrong one.
_MAX_FILE: Final = 1 << 16

Apply = Callable[[Callable[[], Any]], Awaitable[Any]]


class TrustFollower:
    """The CAs in force and the revocations of one process.

    `trust_store` belongs to the thread in which `apply` runs its argument. `changed` is called in
    that thread after each change.
    """

    def __init__(
        self,
        *,
        ca: Path,
        trust: Path | None,
        authority: str,
        log: FilteringBoundLogger,
        apply: Apply,
        changed: Callable[[], object],
    ) -> None:
        """Read `ca`, and `trust` if it exists. Raises TrustError."""
        self.trust_store = TrustStore(_read(ca), str(ca))
        self._ca = ca
        self._trust = trust
        self._authority = authority
        self._log = log
        self._apply = apply
        self._changed = changed
        self._fault = "not asked yet"
        self._unkept = ""  # why the newest list is not in its file
        self._lines: list[_Line] = []
        self._limit = trio.CapacityLimiter(MAX_LINES)
        self._context: ssl.SSLContext | None = None
        self._watched = [Watched("ca", [ca], partial(_read, ca), self._put_ca)]
        if trust is not None:
            self._watched.append(Watched("trust", [trust], partial(_read, trust), self._put_trust))
            if trust.exists():
                self._take(_read(trust), f"{trust}: ")

    async def run(self) -> None:
        """Follow the files, and the authority through any outage, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, self._watched, self._log)
                if self._authority:
                    nursery.start_soon(self._follow)
        finally:
            while self._lines:
                self._lines.pop().close()

    async def enrol(self, request: Enrol) -> Enrolled:
        """Return the authority's answer.

        Raises Refused, with AUTHORITY_UNAVAILABLE when there is no answer within 5 s.
        """
        if not self._authority:
            text = "no authority is configured here: issue certificates by hand (rtunnel pki issue)"
            raise Refused(Refusal.AUTHORITY_UNAVAILABLE, text)
        try:
            answer = await self._ask(request, Decoder[Enrolled | Refuse](Enrolled, Refuse, limit=MAX_MESSAGE))
        except (_Silent, TrustError) as error:
            raise Refused(Refusal.AUTHORITY_UNAVAILABLE, f"the authority can't be reached: {error}") from None
        if isinstance(answer, Refuse):
            raise Refused(Refusal.parse(answer.code), answer.text)
        return answer

    def status(self) -> dict[str, object]:
        """Return the state for /statusz."""
        return {
            "number": self.trust_store.number,
            "generation": self.trust_store.generation,
            "revoked": len(self.trust_store.revoked),
            "authority": (self._fault or "ok") if self._authority else "none",
            "kept": self._unkept or ("ok" if self._trust else "no file"),
        }

    # Changes of `trust_store`.

    async def _put_ca(self, pem: bytes) -> dict[str, object]:
        def begin_again() -> bool:
            self.trust_store.begin_again(pem, str(self._ca))
            return True

        await self._change(begin_again)
        return {"number": self.trust_store.number}

    async def _put_trust(self, signed: bytes) -> dict[str, object]:
        news = await self._change(partial(self._take, signed, f"{self._trust}: "))
        return {"number": self.trust_store.number, "news": news}

    async def _change(self, change: Callable[[], bool]) -> bool:
        """Run `change` in the thread that owns `trust_store`.

        Return its result. Raises TrustError.
        """

        def there() -> bool:
            news = change()
            if news:
                self._changed()
            return news

        news = bool(await self._apply(there))
        if news:
            self._context = None  # the context trusts the CAs of before
        return news

    def _take(self, signed: bytes, where: str = "") -> bool:
        try:
            return self.trust_store.take(signed)
        except TrustError as error:
            raise TrustError(f"{where}{error}") from None

    # Requests to the authority.

    async def _follow(self) -> None:
        while True:
            try:
                question = Follow(VERSION, self.trust_store.number)
                answer = await self._ask(question, Decoder[Trust | Refuse](Trust, Refuse, limit=MAX_MESSAGE))
                if isinstance(answer, Refuse):
                    raise _Silent(f"it refuses: {answer.text}")
                if answer.signed and await self._change(partial(self._take, answer.signed)):
                    self._log.info("trust_list_taken", **self._news())
                    await self._keep(answer.signed)
                elif self._unkept:
                    await self._keep(self.trust_store.signed)
                self._heard("")
            except (_Silent, TrustError) as error:
                self._heard(str(error))
            await trio.sleep(FOLLOW_SECONDS)

    def _news(self) -> dict[str, object]:
        return {"number": self.trust_store.number, "revoked": len(self.trust_store.revoked)}

    def _heard(self, fault: str) -> None:
        """Log a fault once, when it changes, and its end."""
        if fault and fault != self._fault:
            hint = "the last trust list stays in force; no agent can enrol or renew until the authority answers"
            self._log.warning("authority_unavailable", authority=self._authority, reason=fault, hint=hint)
        elif not fault and self._fault:
            self._log.info("authority_reached", authority=self._authority)
        self._fault = fault

    async def _keep(self, signed: bytes) -> None:
        if self._trust is not None:
            keep = partial(keep_trust_list, self._trust, PUBLIC, signed, self._log, before=self._unkept)
            self._unkept = await trio.to_thread.run_sync(keep)

    async def _ask(self, request: Message, answers: Decoder[M]) -> M:
        """Send one request and return its answer. Raises _Silent."""
        # Requests for a list do not wait behind many new agents.
        limit = self._limit if isinstance(request, Enrol) else nullcontext()
        with trio.move_on_after(PATIENCE):
            async with limit:
                while self._lines:  # the authority closes silent connections: then use the next one
                    line = self._lines.pop()
                    try:
                        return await self._converse(line, request, answers)
                    except _Silent:
                        continue
                return await self._converse(await self._connect(), request, answers)
        raise _Silent(f"no answer within {PATIENCE:g} s")

    async def _converse(self, line: _Line, request: Message, answers: Decoder[M]) -> M:
        try:
            answer = await line.ask(request, answers)
        except BaseException:
            line.close()
            raise
        self._lines.append(line)
        return answer

    async def _connect(self) -> _Line:
        host, port = parse_endpoint(self._authority)
        try:
            tcp = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise _Silent(_reason(error)) from None
        # Checked after the connect, during which a new list may have come.
        if self._context is None:
            self._context = client_context_of(self.trust_store.pem)
        return _Line(trio.SSLStream(tcp, self._context, server_hostname=AUTHORITY_NAME, https_compatible=True))


class _Silent(Exception):
    """The authority gave no answer; the text says why."""


class _Line:
    """One connection to the authority."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream

    def close(self) -> None:
        """Close the socket at once, without a TLS goodbye."""
        self.stream.transport_stream.socket.close()

    async def ask(self, request: Message, answers: Decoder[M]) -> M:
        """Send the request and return its answer. Raises _Silent."""
        try:
            await self.stream.send_all(encode(request))
            while (answer := answers.next()) is None:
                data = await self.stream.receive_some(MAX_MESSAGE)
                if not data:
                    raise _Silent("it closed the connection")
                answers.feed(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise _Silent(_reason(error)) from None
        except MessageError as error:
            raise _Silent(f"it does not speak our protocol: {error}") from None
        return answer


def _reason(fault: BaseException) -> str:
    """Return the innermost reason: trio wraps the errors of OpenSSL and the kernel."""
    below = fault.__cause__ or fault.__context__
    while below is not None:
        fault = below.exceptions[0] if isinstance(below, BaseExceptionGroup) else below
        below = fault.__cause__ or fault.__context__
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {certificate_fault(fault)}"
    if isinstance(fault, OSError):
        return (fault.strerror or str(fault)).lower()
    return str(fault) or "the connection broke"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise TrustError(f"{path}: is longer than {_MAX_FILE} bytes: give a file of the cluster's CAs or trust list")
    return data
