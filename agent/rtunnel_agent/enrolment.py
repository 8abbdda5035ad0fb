"""Requests for a certificate: the first one by a join token, later ones by the present certificate.

The key of a pending request stays in `next.key` until there is an answer, so that a repeated
request does not use the token up again. trio's side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate
from msgspec.structs import replace as replace_fields

from rtunnel.errors import TrustError
from rtunnel.trust.certificates import ENROL_LABEL, agent_request, key_pem, new_key, pem, sign_renewal
from rtunnel.trust.files import SECRET, replace
from rtunnel.trust.identity import Identity, PrivateKey, load_pair, load_private_key
from rtunnel.trust.keys import token_mac
from rtunnel.wire.messages import VERSION, Enrol, Enrolled
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.token import JoinToken

Ask = Callable[[Enrol], Awaitable[Enrolled]]

_PENDING: Final = "next.key"


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """A certificate and its key."""

    certificate: bytes  # DER
    key: PrivateKey
    who: Identity

    @property
    def life(self) -> float:
        """Seconds from the certificate's issue to its end."""
        return self.who.ends - self.who.issued


class Enroller:
    """Makes the requests of one agent, and keeps what is needed until they are answered.

    `ask` sends a request to the authority; it raises Refused, or OSError with a text.
    """

    def __init__(self, agent_id: str, namespace: str, directory: Path, ask: Ask) -> None:
        self._names = agent_id, namespace
        self._pending = directory / _PENDING
        self._ask = ask
        #: A certificate of this agent that lacks one of its addresses: beside a new token it proves
        #: the agent_id.
        self.former: AgentIdentity | None = None
        self._proves_former = False  # the authority has asked for it

    def certified(self) -> None:
        """Hear that the agent has a certificate with all its addresses."""
        self.former, self._proves_former = None, False

    async def renew(self, addresses: Sequence[str], present: AgentIdentity) -> tuple[Enrolled, PrivateKey]:
        """Ask for the next certificate, by the present one. Return the answer and its key.

        Raises what `ask` raises.
        """
        key = _pending_key(self._pending)
        request = self._request(key, addresses)
        signature = sign_renewal(present.key, request)
        return await self._send(Enrol(VERSION, request, certificate=present.certificate, signature=signature)), key

    async def enrol(
        self, addresses: Sequence[str], token: JoinToken, present: AgentIdentity | None
    ) -> tuple[Enrolled, PrivateKey]:
        """Ask for a certificate by the token. Return the answer and its key.

        Raises TrustError without a token that counts, and what `ask` raises.
        """
        key = _pending_key(self._pending)
        request, by = self._request(key, addresses), token.for_request()
        enrol = Enrol(VERSION, request, by.id, token_mac(by.secret, ENROL_LABEL, request))
        former = present or self.former
        if former is not None and self._proves_former:
            # The first request is without it: an authority of an older version would take it for a
            # renewal.
            signature = sign_renewal(former.key, request)
            enrol = replace_fields(enrol, certificate=former.certificate, signature=signature)
        try:
            return await self._send(enrol), key
        except Refused as error:
            if error.code is Refusal.REVOKED:
                # The key was certified, the answer was lost, and then the key was revoked: no token
                # can renew it.
                self._pending.unlink(missing_ok=True)
            raise

    async def _send(self, enrol: Enrol) -> Enrolled:
        try:
            return await self._ask(enrol)
        except Refused as error:
            self._proves_former = error.code is Refusal.AGENT_ID_TAKEN
            raise

    def _request(self, key: PrivateKey, addresses: Sequence[str]) -> bytes:
        return agent_request(key, *self._names, addresses).public_bytes(Encoding.DER)

    def keep(self, identity: AgentIdentity, pair: tuple[Path, Path]) -> None:
        """Write the certificate to the first file and its key, the pending one, to the second.

        Raises TrustError.
        """
        # The certificate is written first: after a crash between the two, `finish` finds the key.
        replace(pair[0], SECRET, pem(load_der_x509_certificate(identity.certificate)))
        self._pending.rename(pair[1])

    def finish(self, pair: tuple[Path, Path]) -> None:
        """Finish a `keep` that ended between its two files: the certificate is that of the pending
        key.
        """
        if self._pending.exists() and not _fits(*pair) and _fits(pair[0], self._pending):
            self._pending.rename(pair[1])


def _pending_key(path: Path) -> PrivateKey:
    """Return the key of the pending request, or a new one. Raises TrustError."""
    if path.exists():
        try:
            return load_private_key(path)
        except TrustError:
            pass  # a damaged one can be replaced: no certificate is for it
    key = new_key()
    replace(path, SECRET, key_pem(key))
    return key


def _fits(certificate: Path, key: Path) -> bool:
    try:
        load_pair(certificate, key)
    except TrustError:
        return False
    return True
