"""TLS of links: 1.3 only, ALPN `rtunnel/1`, no tickets.

OpenSSL goes on without ALPN when the peer offers none: who needs it checks `selected_alpn_protocol()`.
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
    """A broker's side. Raises TrustError, which names the file at fault.

    `clients`: the CAs (PEM) of clients' certificates; then a client may show one, and one that is not from them, or not
    of this time, ends the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _common(context)
    # A link is never resumed: tickets would be bytes and keys for nothing.
    context.num_tickets = 0
    _load_chain(context, certificate, key)
    if clients:
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(cadata=clients)
        except (ssl.SSLError, ValueError) as error:
            raise TrustError(f"the CAs in force can't be used: {error}") from None
    return context


def client_context(ca: Path | str) -> ssl.SSLContext:
    """An agent's side: the certificate must come from this CA and carry the `server_hostname` of the connection.

    Raises TrustError.
    """
    return client_context_of(_readable(ca).decode("ascii", "ignore"), str(ca))


def client_context_of(pem: str, where: str = "the CAs in force") -> ssl.SSLContext:
    """The same with the text of the CA certificates (`Roots.pem`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _common(context)
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise TrustError(f"{where}: has no PEM certificate") from None
    if not context.get_ca_certs():
        raise TrustError(f"{where}: has no CA certificate")
    return context


def link_context(cas: str, certificate: Path | str = "", key: Path | str = "") -> ssl.SSLContext:
    """As `client_context_of`; shows a certificate if one is given. Raises TrustError."""
    context = client_context_of(cas)
    if certificate:
        _load_chain(context, certificate, key)
    return context


def dial_server_context(certificate: Path | str, key: Path | str) -> ssl.SSLContext:
    """Of a broker's guarded ports. Raises TrustError."""
    context = server_context(certificate, key)
    context.set_alpn_protocols([DIAL_ALPN])
    return context


def dial_client_context(cas: str) -> ssl.SSLContext:
    """A gateway's side: the broker's certificate must come from one of these CAs (PEM). Raises TrustError."""
    context = client_context_of(cas)
    context.set_alpn_protocols([DIAL_ALPN])
    return context


def certificate_fingerprint(der: bytes) -> bytes:
    """SHA-256 of a certificate: binds the join proof to this link (`SSLSocket.getpeercert(True)`)."""
    return hashlib.sha256(der).digest()


def certificate_der(path: Path | str) -> bytes:
    """The first certificate of a PEM file, which a server shows: for the other side of the binding."""
    return ssl.PEM_cert_to_DER_cert(_first_pem(path))


def days_left(path: Path | str, now: datetime | None = None) -> float:
    """How long the first certificate of a file is good still; below 0 when it is over. Raises TrustError."""
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
    # Without this OpenSSL asks on the terminal, and a service waits for ever.
    raise _Encrypted


def _chain_fault(certificate: Path | str, key: Path | str, fault: Exception) -> str:
    """OpenSSL does not say which of the two files it means."""
    if isinstance(fault, _Encrypted):
        return f"{key}: is encrypted with a passphrase; give a plain key file of mode 0600"
    if isinstance(fault, ssl.SSLError) and fault.reason == "KEY_VALUES_MISMATCH":
        return f"{key}: is not the key of the certificate in {certificate}"
    if b"-----BEGIN CERTIFICATE-----" not in _readable(certificate):
        return f"{certificate}: has no PEM certificate"
    if b"PRIVATE KEY-----" not in _readable(key):
        return f"{key}: has no PEM private key"
    return f"{certificate} and {key}: can't be used: {fault}"
