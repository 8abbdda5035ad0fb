"""Proofs that the target's own agent has answered a Dial: first by signature, later by MAC.

To make and check a signature for each connection would cost 90 us of CPU. The Dial therefore
carries an X25519 key of the gateway (RFC 7748), and the signature covers an X25519 key of the agent
and the Dial's body. The shared secret of the two keys gives the **key of the pair**: only this
gateway, and a holder of the private key of the agent's certificate, can compute it. HMAC-SHA256
(RFC 2104) under that key, over the Dial's body, proves later Dials between the two for 3 us. This
is the signed key exchange of TLS 1.3 (RFC 8446, 4.4.3), with connections instead of records.
docs/wire.md, "Proofs", is normative.
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

#: Prefix of the text from which the key of a pair is derived.
PAIR_LABEL: Final = b"rtunnel pair 1\0"
#: Prefixes of a text that is signed or authenticated by a MAC: the agent's answer to the Dial.
ACCEPTED: Final = b"rtunnel accepted 1\0"
REFUSED: Final = b"rtunnel refused 1\0"


def answer_bytes(answer: Accepted | Refuse) -> bytes:
    """Return an answer as the proof covers it: accepted, or refused, code and text; then the
    agent's report, if it has one.
    """
    said = ACCEPTED if isinstance(answer, Accepted) else REFUSED + f"{answer.code}\0{answer.text}\0".encode()
    return said + len(answer.hop).to_bytes(2, "big") + answer.hop if answer.hop else said


class PairKey:
    """The key of one gateway process and one agent's certificate, held by both ends."""

    __slots__ = ("_key", "id")

    def __init__(self, shared: bytes, gateway: bytes, agent: bytes, certificate: bytes) -> None:
        """Derive the key from `shared`, the X25519 result of the keys with these public halves.

        `certificate` is the agent's, in DER form.
        """
        context = gateway + agent + hashlib.sha256(certificate).digest()
        self._key = hmac.digest(shared, PAIR_LABEL + context, "sha256")
        self.id = hashlib.sha256(PAIR_LABEL + self._key).digest()[:PAIR_ID_BYTES]

    def mac(self, answer: bytes, body: bytes) -> bytes:
        """Return the proof of this answer to the Dial with this body."""
        return hmac.digest(self._key, answer + body, "sha256")

    def is_proof(self, answer: bytes, body: bytes, mac: bytes) -> bool:
        """Return whether `mac` proves this answer to the Dial with this body.

        Takes constant time.
        """
        return hmac.compare_digest(self.mac(answer, body), mac)


class Exchange:
    """One end's X25519 key, which lives as long as the process, or as an agent's certificate."""

    __slots__ = ("_private", "public")

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def with_agent(self, agent: bytes, certificate: bytes) -> PairKey:
        """Return the gateway's key for this pair.

        Raises TrustError for bytes that are no usable key.
        """
        return PairKey(self._shared(agent), self.public, agent, certificate)

    def with_gateway(self, gateway: bytes, certificate: bytes) -> PairKey:
        """Return the agent's key for this pair.

        Raises TrustError for bytes that are no usable key.
        """
        return PairKey(self._shared(gateway), gateway, self.public, certificate)

    def _shared(self, other: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(other))
        # A wrong length, or a point that gives everybody the same (RFC 7748, 6.1).
        except ValueError:
            raise TrustError("is not a usable X25519 key") from None


def sign(key: PrivateKey, answer: bytes, exchange: bytes, body: bytes) -> bytes:
    """Return the agent's signature over its answer, its `exchange` key, and the Dial's body."""
    return key.sign(answer + exchange + body, ECDSA_SHA256)


def is_signed(public_key: PublicKey, answer: bytes, exchange: bytes, body: bytes, signature: bytes) -> bool:
    """Return whether the holder of this key has signed all that.

    `exchange` must have its full length.
    """
    try:
        public_key.verify(signature, answer + exchange + body, ECDSA_SHA256)
    except InvalidSignature:
        return False
    return True
