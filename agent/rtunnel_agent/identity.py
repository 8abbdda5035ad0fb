"""What an agent shows and proves: its certificate and the key of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rtunnel.trust.identity import PrivateKey, load_private_key, read_certificate
from rtunnel.trust.keys import TrustError
from rtunnel.trust.tls import certificate_der


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """A certificate that says whose addresses these are, and its key."""

    certificate: bytes  # DER
    key: PrivateKey = field(repr=False)


def load_identity(certificate: Path | str, key: Path | str) -> AgentIdentity:
    """From PEM files. Raises TrustError."""
    loaded = AgentIdentity(certificate_der(certificate), load_private_key(key))
    if read_certificate(loaded.certificate).public_key != loaded.key.public_key():
        raise TrustError(f"{key}: is not the key of the certificate in {certificate}")
    return loaded
