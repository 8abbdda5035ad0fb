"""The agent's answer yes, with the proof that it is its to give (docs/wire.md, "accepted"). In the relay's thread."""

from __future__ import annotations

from typing import Final

from rtunnel.trust.keys import TrustError
from rtunnel.trust.proof import Exchange, Pair, sign
from rtunnel.wire.messages import Accepted, DialBody
from rtunnel_agent.identity import AgentIdentity

#: Gateway processes with which it has the key of a pair; whose was forgotten gets another signature.
MAX_PAIRS: Final = 4096


class Prover:
    """What proves Dials by one certificate; a renewed one gets another prover, and other keys of pairs."""

    def __init__(self, identity: AgentIdentity) -> None:
        self.identity = identity
        self._exchange = Exchange()
        self._pairs: dict[bytes, Pair] = {}  # by the gateway's part

    def accepted(self, dial: DialBody, body: bytes) -> Accepted:
        """The answer to this Dial, whose `body` is exactly as it came.

        3 us once gateway and agent have the key of a pair; before, 25 us for the signature, and 40 more for a gateway
        that is new. A gateway's part that is no usable key gets no proof.
        """
        pair = self._pairs.get(dial.exchange)
        if pair is not None and pair.id == dial.pair:
            return Accepted(mac=pair.mac(body))
        identity = self.identity
        if pair is None:
            try:
                pair = self._exchange.with_gateway(dial.exchange, identity.certificate)
            except TrustError:
                return Accepted()
            if len(self._pairs) >= MAX_PAIRS:
                del self._pairs[next(iter(self._pairs))]  # the oldest
            self._pairs[dial.exchange] = pair
        exchange = self._exchange.public
        return Accepted(
            certificate=identity.certificate, exchange=exchange, signature=sign(identity.key, exchange, body)
        )
