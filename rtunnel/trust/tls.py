"""TLS contexts for links and Dials: TLS 1.3 only, with ALPN, without session tickets.

OpenSSL continues without ALPN when the peer offers none. A caller that requires ALPN must check
`selected_alpn_protocol()`.
"""

from __future__ import annotations

import hashlib
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from rtunnel.errors import TrustError
from rtunnel.wire.messages import ALPN, DIAL_ALPN


def server_context(certificate: Path | str, key: Path | str, *, clients: str = "") -> ssl.SSLContext:
    """Return the context of a broker's link port. Raises TrustError, which names the file at fault.

    `clients`: CA certificates (PEM). When given, a client may present a certificate, and one that
    is not from these CAs, or not valid now, ends the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _common(context)
    # No client resumes a link, so a ticket would only cost bytes and a key.
    context.num_tickets = 0
    _load_chain(context, certificate, key)
    if clients:
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(cadata=clients)
        except (ssl.SSLError, ValueError) as error:
            raise TrustError(f"the CAs in force can't be used ({error}): export the trust list again") from None
    return context


def client_context(ca: Path | str) -> ssl.SSLContext:
    """Return an agent's context for links, which trusts the CA certificates of this file.

    The broker's certificate must carry the `server_hostname` of the connection. Raises TrustError.
    """
    return client_context_of(_readable(ca).decode("ascii", "ignore"), str(ca))


def client_context_of(pem: str, where: str = "the CAs in force") -> ssl.SSLContext:
    """Return an agent's context for links, which trusts these CA certificates (`TrustStore.pem`).

    `where` names their source in an error. Raises TrustError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _common(context)
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise TrustError(f"{where}: has no PEM certificate: give the file of the CA's certificate") from None
    if not context.get_ca_certs():
        raise TrustError(f"{where}: has no CA certificate: give the file of the CA's certificate")
    return context


def link_context(cas: str, certificate: Path | str = "", key: Path | str = "") -> ssl.SSLContext:
    """Return `client_context_of(cas)`, which presents a certificate if one is given.

    Raises TrustError.
    """
    context = client_context_of(cas)
    if certificate:
        _load_chain(context, certificate, key)
    return context


def dial_server_context(certificate: Path | str, key: Path | str) -> ssl.SSLContext:
    """Return the context of a broker's guarded ports. Raises TrustError."""
    context = server_context(certificate, key)
    context.set_alpn_protocols([DIAL_ALPN])
    return context


def dial_client_context(cas: str) -> ssl.SSLContext:
    """Return a gateway's context for guarded ports.

    The broker's certificate must come from one of these CAs (PEM). Raises TrustError.
    """
    context = client_context_of(cas)
    context.set_alpn_protocols([DIAL_ALPN])
    return context


def certificate_fingerprint(der: bytes) -> bytes:
    """Return the SHA-256 of a certificate (DER). It binds the join proof to one link."""
    return hashlib.sha256(der).digest()


def certificate_der(path: Path | str) -> bytes:
    """Return the first certificate of a PEM file, which a server presents, in DER form."""
    return ssl.PEM_cert_to_DER_cert(_first_pem(path))


def days_left(path: Path | str, now: datetime | None = None) -> float:
    """Return the days for which the first certificate of a file stays valid; below 0 after its end.

    Raises TrustError.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der(path))
    except ValueError as error:
        raise TrustError(f"{path}: is not a certificate: {error}") from None
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))).total_seconds() / 86400


def _common(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])


def _load_chain(context: ssl.SSLContext, certificate: Path | str, key: Path | str) -> None:
    for path in (certificate, key):
        _readable(path)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise TrustError(_chain_fault(certificate, key, error)) from None


_END = "-----END CERTIFICATE-----"


def _first_pem(path: Path | str) -> str:
    text = _readable(path).decode("ascii", "replace")
    begin, end = text.find("-----BEGIN CERTIFICATE-----"), text.find(_END)
    if begin < 0 or end < begin:
        raise TrustError(f"{path}: has no PEM certificate")
    return text[begin : end + len(_END)]


def _readable(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise TrustError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None


class _Encrypted(ValueError):
    pass


def _no_password() -> str:
    # Without a callback OpenSSL asks on the terminal, and a service waits for ever.
    raise _Encrypted


def _chain_fault(certificate: Path | str, key: Path | str, fault: Exception) -> str:
    """Return which of the two files is at fault and why; OpenSSL names neither."""
    if isinstance(fault, _Encrypted):
        return f"{key}: is encrypted with a passphrase; give a plain key file of mode 0600"
    if isinstance(fault, ssl.SSLError) and fault.reason == "KEY_VALUES_MISMATCH":
        return f"{key}: is not the key of the certificate in {certificate}"
    if b"-----BEGIN CERTIFICATE-----" not in _readable(certificate):
        return f"{certificate}: has no PEM certificate: give the certificate that belongs to {key}"
    if b"PRIVATE KEY-----" not in _readable(key):
        return f"{key}: has no PEM private key: give the key that belongs to {certificate}"
    return f"{certificate} and {key}: can't be used ({fault}): issue a new certificate"
