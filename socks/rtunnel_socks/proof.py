"""Whether whoever answered a Dial is the agent that has the target's address. In the relay's thread.

Registry and brokers only say where an agent may be found. That it was found is proved by the agent itself, over the
very Dial that was sent: by the key of a certificate that is from a CA of the cluster and names the address, or by the
key of the pair, on which such a signature has agreed before (docs/wire.md, "Proofs").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rtunnel.errors import TrustError
from rtunnel.trust.identity import Identity, Revoked, TrustStore
from rtunnel.trust.proof import Exchange, PairKey, answer_bytes, is_signed
from rtunnel.wire.messages import EXCHANGE_BYTES, Accepted, Refuse
from rtunnel.wire.refusal import Refusal, Refused

#: The reason when there is nothing to check: an older agent, one with a join token only, or none at all.
NO_CERTIFICATE: Final = 'the agent showed no certificate: give it one, or write gateway.proof = "off"'
#: Addresses whose agents have proved themselves; one that was forgotten gives another signature.
MAX_KNOWN: Final = 65536


@dataclass(frozen=True, slots=True)
class Known:
    """The agent of one address has proved itself by this certificate, and has this pair's key."""

    pair: PairKey
    exchange: bytes  # the agent's part of it
    certificate: bytes


class Proofs:
    """What one gateway process asks of agents, and whom it knows by now."""

    def __init__(self, trust_store: TrustStore) -> None:
        self._trust_store = trust_store
        self._exchange = Exchange()
        self.exchange = self._exchange.public  # for each Dial
        self._known: dict[tuple[str, str], Known] = {}  # by namespace and address

    def known(self, namespace: str, ip: str) -> Known | None:
        """Whom a Dial to this address is to name, and who may answer it by MAC."""
        return self._known.get((namespace, ip))

    def check(self, answer: Accepted | Refuse, body: bytes, namespace: str, ip: str, known: Known | None) -> Identity:
        """Who gave this answer to the Dial of this body, for this target, that named `known`.

        3 us by MAC. A signature takes 65 us, and another 40 for the key of the pair; a certificate that was not seen
        before as much again. Raises Refused: `not_proven`, or `revoked`.
        """
        if answer.mac:
            if known is None or not known.pair.is_proof(answer_bytes(answer), body, answer.mac):
                raise Refused(Refusal.NOT_PROVEN, "the MAC is not by the key of a pair with this target's agent")
            return self._holder(known.certificate)  # its CA, its time, and revocations are of now
        return self._first(answer, body, namespace, ip)

    def _first(self, answer: Accepted | Refuse, body: bytes, namespace: str, ip: str) -> Identity:
        if not answer.certificate:
            raise Refused(Refusal.NOT_PROVEN, NO_CERTIFICATE)
        identity = self._holder(answer.certificate)
        if identity.kind != "agent":
            raise Refused(Refusal.NOT_PROVEN, f"the certificate is {identity.subject}'s, and no agent's")
        if identity.namespace != namespace:
            raise Refused(Refusal.NOT_PROVEN, f"{identity.subject} is of another namespace than {namespace}")
        if ip not in identity.addresses:
            raise Refused(Refusal.NOT_PROVEN, f"the certificate of {identity.subject} does not have the address {ip}")
        said, exchange, key = answer_bytes(answer), answer.exchange, identity.public_key
        if len(exchange) != EXCHANGE_BYTES or not is_signed(key, said, exchange, body, answer.signature):
            raise Refused(Refusal.NOT_PROVEN, f"the signature is not {identity.subject}'s over this Dial")
        self._remember(namespace, ip, answer)
        return identity

    def _holder(self, certificate: bytes) -> Identity:
        try:
            return self._trust_store.verify(certificate)
        except Revoked as error:
            raise Refused(Refusal.REVOKED, str(error)) from None
        except TrustError as error:
            raise Refused(Refusal.NOT_PROVEN, str(error)) from None

    def _remember(self, namespace: str, ip: str, answer: Accepted | Refuse) -> None:
        known, key = self._known, (namespace, ip)
        before = known.pop(key, None)
        if before is None or (before.exchange, before.certificate) != (answer.exchange, answer.certificate):
            try:
                pair = self._exchange.with_agent(answer.exchange, answer.certificate)
            except TrustError:
                return  # its signature is good all the same
            if len(known) >= MAX_KNOWN:
                del known[next(iter(known))]  # the oldest
            before = Known(pair, answer.exchange, answer.certificate)
        known[key] = before  # as the youngest
