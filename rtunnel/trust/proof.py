"""Proofs that the target's own agent has answered a Dial: the first by signature, those that follow by MAC.

A signature for each connection would cost 90 us of CPU, made and checked. So the Dial carries an X25519 key of the
gateway (RFC 7748), and the signature covers one of the agent's beside the Dial's body. What the two make is the **key
of the pair**: whoever has it is this gateway, or had the key of the agent's certificate. HMAC-SHA256 (RFC 2104) under
it, over the Dial's body, proves later Dials between the two for 3 us. It is the signed key exchange of TLS 1.3 (RFC
8446, 4.4.3) with a connection in the place of a record. Normative: docs/wire.md, "Proofs".
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from rtunnel.errors import TrustError
from rtunnel.trust.identity import ECDSA_SHA256, PrivateKey, PublicKey
from rtunnel.wire.messages import PAIR_ID_BYTES, Accepted, Refuse

#: In front of what a pair's key is made of.
PAIR_LABEL: Final = b"rtunnel pair 1\0"
#: In front of what is signed, or under a MAC: what is said to the Dial.
ACCEPTED: Final = b"rtunnel accepted 1\0"
REFUSED: Final = b"rtunnel refused 1\0"


def said_by(answer: Accepted | Refuse) -> bytes:
    """What an answer says, as the proof covers it: yes, or no and why."""
    return ACCEPTED if isinstance(answer, Accepted) else REFUSED + f"{answer.code}\0{answer.text}\0".encode()


class PairKey:
    """The key of one gateway process and one agent's certificate, at either end."""

    __slots__ = ("_key", "id")

    def __init__(self, shared: bytes, gateway: bytes, agent: bytes, certificate: bytes) -> None:
        """`shared` is what X25519 made of the two keys whose public halves follow; the certificate is the agent's."""
        said = gateway + agent + hashlib.sha256(certificate).digest()
        self._key = hmac.digest(shared, PAIR_LABEL + said, "sha256")
        self.id = hashlib.sha256(PAIR_LABEL + self._key).digest()[:PAIR_ID_BYTES]

    def mac(self, said: bytes, body: bytes) -> bytes:
        """The proof that this is said to the Dial with this body."""
        return hmac.digest(self._key, said + body, "sha256")

    def is_proof(self, said: bytes, body: bytes, mac: bytes) -> bool:
        """Whether who has this key says this to the Dial with this body. In constant time."""
        return hmac.compare_digest(self.mac(said, body), mac)


class Exchange:
    """One end's part of its pairs: an X25519 key that lives as long as the process, or as an agent's certificate."""

    __slots__ = ("_private", "public")

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def with_agent(self, agent: bytes, certificate: bytes) -> PairKey:
        """As the gateway. Raises TrustError for bytes that are no usable key."""
        return PairKey(self._shared(agent), self.public, agent, certificate)

    def with_gateway(self, gateway: bytes, certificate: bytes) -> PairKey:
        """As the agent with this certificate. Raises TrustError for bytes that are no usable key."""
        return PairKey(self._shared(gateway), gateway, self.public, certificate)

    def _shared(self, other: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:  # of another length, or a point with which everybody gets the same (RFC 7748, 6.1)
            raise TrustError("is not a usable X25519 key") from None


def sign(key: PrivateKey, said: bytes, exchange: bytes, body: bytes) -> bytes:
    """The signature that this is said to the Dial with this body, and that the `exchange` key is the agent's own."""
    return key.sign(said + exchange + body, ECDSA_SHA256)


def is_signed(public_key: PublicKey, said: bytes, exchange: bytes, body: bytes, signature: bytes) -> bool:
    """Whether the holder of this key has signed all that. `exchange` has its full length."""
    try:
        public_key.verify(signature, said + exchange + body, ECDSA_SHA256)
    except InvalidSignature:
        return False
    return True
