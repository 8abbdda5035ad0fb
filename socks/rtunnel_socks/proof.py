"""Checks that an answer to a Dial is from the agent that has the target's address. In the relay's
thread.

The registry and brokers only say where an agent may be found. The agent itself proves that it was
found, over the very Dial that was sent: by the key of a certificate of the cluster's CA that names
the address, or by the key of the pair, on which such a signature has agreed before (docs/wire.md,
"Proofs").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rtunnel.errors import TrustError
from rtunnel.trust.identity import Identity, Revoked, TrustStore
from rtunnel.trust.proof import Exchange, PairKey, answer_bytes, is_signed
from rtunnel.wire.messages import EXCHANGE_BYTES, Accepted, Refuse
from rtunnel.wire.refusal import Refusal, Refused

#: The reason when an answer has nothing to check: from an older agent, one with a join token only,
#: or no agent.
NO_CERTIFICATE: Final = 'the agent showed no certificate: give it one, or write gateway.proof = "off"'
#: Addresses whose agents have proved themselves. The agent of a forgotten one gives another
#: signature.
MAX_KNOWN: Final = 65536


@dataclass(frozen=True, slots=True)
class Known:
    """The agent of one address: the certificate by which it has proved itself, and the key of the
    pair.
    """

    pair: PairKey
    exchange: bytes  # the agent's part of it
    certificate: bytes


class Proofs:
    """Checks proofs for one gateway process, and remembers the agents that have given one."""

    def __init__(self, trust_store: TrustStore) -> None:
        self._trust_store = trust_store
        self._exchange = Exchange()
        self.exchange = self._exchange.public  # for each Dial
        self._known: dict[tuple[str, str], Known] = {}  # by namespace and address

    def known(self, namespace: str, ip: str) -> Known | None:
        """Return the agent that a Dial to this address names, and that may answer it by MAC; None:
        not known.
        """
        return self._known.get((namespace, ip))

    def check(self, answer: Accepted | Refuse, body: bytes, namespace: str, ip: str, known: Known | None) -> Identity:
        """Return the agent that gave this answer to a Dial with this `body`, for this target; the
        Dial named `known`.

        Takes 3 us by MAC. A signature takes 65 us, and 40 us more for the key of the pair; a new
        certificate as much again. Raises Refused: `not_proven`, or `revoked`.
        """
        if answer.mac:
            if known is None or not known.pair.is_proof(answer_bytes(answer), body, answer.mac):
                raise Refused(Refusal.NOT_PROVEN, "the MAC is not by the key of a pair with this target's agent")
            return self._holder(known.certificate)  # checked anew: CA, time and revocations
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
                return  # the signature is good without it
            if len(known) >= MAX_KNOWN:
                del known[next(iter(known))]  # the oldest
            before = Known(pair, answer.exchange, answer.certificate)
        known[key] = before  # as the newest
