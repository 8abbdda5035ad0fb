"""Proves that answers to Dials are the agent's own (docs/wire.md, "Proofs")."""

from __future__ import annotations

from typing import Final, TypeVar

from msgspec.structs import replace

from rtunnel.errors import TrustError
from rtunnel.trust.proof import Exchange, PairKey, answer_bytes, sign
from rtunnel.wire.messages import Accepted, DialBody, Refuse
from rtunnel_agent.enrolment import AgentIdentity

#: Gateway processes with which the agent has the key of a pair. A forgotten one gets another
#: signature.
MAX_PAIRS: Final = 4096

Answer = TypeVar("Answer", bound=Accepted | Refuse)


class Prover:
    """Proves answers by one certificate; a renewed one gets another prover. In the
    relay's thread.
    """

    def __init__(self, identity: AgentIdentity) -> None:
        self.identity = identity
        self._exchange = Exchange()
        self._pairs: dict[bytes, PairKey] = {}  # by the gateway's part

    def prove(self, answer: Answer, dial: DialBody, body: bytes) -> Answer:
        """Return the answer with a proof for this Dial; `body` is the Dial's, exactly as it came.

        Takes 3 us when gateway and agent have the key of a pair; else 25 us for the signature, and
        40 us more for a new gateway. A gateway whose part of the exchange is no usable key gets no
        proof.
        """
        said, pair = answer_bytes(answer), self._pairs.get(dial.exchange)
        if pair is not None and pair.id == dial.pair:
            return replace(answer, mac=pair.mac(said, body))
        identity, exchange = self.identity, self._exchange.public
        if pair is None:
            try:
                pair = self._exchange.with_gateway(dial.exchange, identity.certificate)
            except TrustError:
                return answer
            if len(self._pairs) >= MAX_PAIRS:
                del self._pairs[next(iter(self._pairs))]  # the oldest
            self._pairs[dial.exchange] = pair
        signature = sign(identity.key, said, exchange, body)
        return replace(answer, certificate=identity.certificate, exchange=exchange, signature=signature)
