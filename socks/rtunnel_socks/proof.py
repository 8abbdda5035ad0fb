"""Whether whoever said Accepted is the agent that has the target's address. In the relay's thread.

Registry and brokers only say where an agent may be found. That it was found is proved by the agent itself: its
certificate, from a CA of the cluster, names the address, and its key has signed the very Dial that was sent.
"""

from __future__ import annotations

from typing import Final

from rtunnel.trust.identity import Identity, Revoked, Roots, is_proof
from rtunnel.trust.keys import TrustError
from rtunnel.wire.messages import Accepted
from rtunnel.wire.refusal import Refusal, Refused

#: The reason when there is nothing to check: an older agent, one with a join token only, or none at all.
NO_CERTIFICATE: Final = 'the agent showed no certificate: give it one, or write gateway.proof = "off"'


def check_proof(roots: Roots, accepted: Accepted, body: bytes, namespace: str, ip: str) -> Identity:
    """Who accepted the Dial of this body, for this target. Raises Refused: `not_proven`, or `revoked`.

    65 us for the signature; the certificate costs as much once, then it is remembered.
    """
    if not accepted.certificate:
        raise Refused(Refusal.NOT_PROVEN, NO_CERTIFICATE)
    try:
        identity = roots.verify(accepted.certificate)
    except Revoked as fault:
        raise Refused(Refusal.REVOKED, str(fault)) from None
    except TrustError as fault:
        raise Refused(Refusal.NOT_PROVEN, str(fault)) from None
    if identity.kind != "agent":
        raise Refused(Refusal.NOT_PROVEN, f"the certificate is {identity.subject}'s, and no agent's")
    if identity.namespace != namespace:
        raise Refused(Refusal.NOT_PROVEN, f"{identity.subject} is of another namespace than {namespace}")
    if ip not in identity.addresses:
        raise Refused(Refusal.NOT_PROVEN, f"the certificate of {identity.subject} does not have the address {ip}")
    if not is_proof(identity.public_key, body, accepted.signature):
        raise Refused(Refusal.NOT_PROVEN, f"the signature is not {identity.subject}'s over this Dial")
    return identity
