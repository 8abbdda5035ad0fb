"""A real authority in the test's own trio run, and what its clients need."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rtunnel.config import AuthorityConfig, format_endpoint
from rtunnel.logs import get_logger
from rtunnel.trust import keys
from rtunnel.trust.authority import Authority, Granted
from rtunnel.trust.certificates import ENROL_LABEL, agent_request, new_key, sign_renewal
from rtunnel.trust.follower import TrustFollower
from rtunnel.trust.identity import Identity, read_certificate
from rtunnel.trust.keys import Token, token_mac
from rtunnel.trust.pki import Directory, open_directory
from rtunnel.trust.store import TokenRecord
from rtunnel.wire.messages import VERSION, Enrol
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_authority.server import Server
from support.plumbing import kept

PATIENCE = 15.0


@asynccontextmanager
async def authority(directory: Path, listen: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    """Running, on a port of the kernel's choice."""
    server = Server(AuthorityConfig(directory=str(directory), listen=listen, admin=""))
    stop = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, stop)
            yield server
            stop.set()
    finally:
        server.close()


def address(server: Server) -> str:
    """Where it listens."""
    return format_endpoint(*server.bound)


def token(directory: Path, **changes: Any) -> Token:
    """A new token of the store: one use, 10.1.0.0/16, an hour, for certificates of a day."""
    made = keys.new_token(changes.pop("id", ""))
    fields: dict[str, Any] = {"namespace": "default", "networks": ("10.1.0.0/16",), "uses": 1, "lifetime": 86400}
    fields |= {"ends": int(time.time()) + 3600, "used": 0} | changes
    with open_directory(directory) as opened, opened.change():
        opened.store.add_token(TokenRecord(id=made.id, secret=made.secret, **fields))
    return made


def change(directory: Path, do: Callable[[Directory], Any]) -> Any:
    """What `rtunnel pki` does."""
    with open_directory(directory) as opened, opened.change():
        return do(opened)


def csr(
    key: ec.EllipticCurvePrivateKey,
    agent_id: str = "a1",
    namespace: str = "default",
    addresses: Iterable[str] = ("10.1.0.7",),
) -> bytes:
    """A request, DER."""
    request = agent_request(key, agent_id, namespace, list(addresses))
    return request.public_bytes(serialization.Encoding.DER)


def enrol(by: Token, key: ec.EllipticCurvePrivateKey | None = None, **asked: Any) -> Enrol:
    """An agent's first."""
    request = csr(key or new_key(), **asked)
    return Enrol(VERSION, request, by.id, token_mac(by.secret, ENROL_LABEL, request))


def renewal(
    certificate: bytes,
    present: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey | None = None,
    **asked: Any,
) -> Enrol:
    """An agent's later ones."""
    request = csr(key or new_key(), **asked)
    return Enrol(VERSION, request, certificate=certificate, signature=sign_renewal(present, request))


class Following:
    """An anchor, and the changes that it told."""

    def __init__(self, ca: Path, trust: Path | None = None, authority: str = "") -> None:
        self.changes: list[int] = []
        self._news = trio.Condition()
        self.follower = TrustFollower(
            ca=ca,
            trust=trust,
            authority=authority,
            log=get_logger("test").bind(),
            apply=self._apply,
            changed=lambda: self.changes.append(self.follower.trust_store.number),
        )

    async def _apply(self, call: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        try:
            return call()
        finally:
            async with self._news:
                self._news.notify_all()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for a change after which this holds."""
        with trio.fail_after(PATIENCE):
            async with self._news:
                while not true():
                    await self._news.wait()


@asynccontextmanager
async def following(ca: Path, trust: Path | None = None, authority: str = "") -> AsyncIterator[Following]:
    """An anchor that runs."""
    made = Following(ca, trust, authority)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.follower.run)
        yield made
        nursery.cancel_scope.cancel()


class Clock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    def __call__(self) -> float:
        return self.now


def at(directory: Path, clock: Callable[[], float] = time.time) -> Authority:
    """Return the authority of a directory, without its process."""
    return Authority(kept(Directory(directory, clock)))


def refusal(decide: Authority, question: Enrol) -> tuple[Refusal, str]:
    """Return the code and the text with which a request is refused."""
    with pytest.raises(Refused) as caught:
        decide.enrol(question)
    return caught.value.code, caught.value.text


def who(granted: Granted) -> Identity:
    """Return the identity in a certificate that was granted."""
    return read_certificate(granted.answer.certificate)
