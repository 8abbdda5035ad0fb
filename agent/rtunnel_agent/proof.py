"""Proofs that an answer is the agent's own (docs/wire.md, "Proofs"). In the relay's thread."""

from __future__ import annotations

from typing import Final, TypeVar

from msgspec.structs import replace

from rtunnel.errors import TrustError
from rtunnel.trust.proof import Exchange, PairKey, answer_bytes, sign
from rtunnel.wire.messages import Accepted, DialBody, Refuse
from rtunnel_agent.identity import AgentIdentity

#: Gateway processes with which it has the key of a pair; whose was forgotten gets another signature.
MAX_PAIRS: Final = 4096

Answer = TypeVar("Answer", bound=Accepted | Refuse)


class Prover:
    """What proves Dials by one certificate; a renewed one gets another prover, and other keys of pairs."""

    def __init__(self, identity: AgentIdentity) -> None:
        self.identity = identity
        self._exchange = Exchange()
        self._pairs: dict[bytes, PairKey] = {}  # by the gateway's part

    def prove(self, answer: Answer, dial: DialBody, body: bytes) -> Answer:
        """The answer to this Dial, whose `body` is exactly as it came, with the proof.

        3 us once gateway and agent have the key of a pair; before, 25 us for the signature, and 40 more for a gateway
        that is new. A gateway's part that is no usable key gets no proof.
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
