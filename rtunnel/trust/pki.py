"""Makes the cluster's secrets: a CA, a broker's certificate, the cluster key and a gateway's, a join token.

Keys are ECDSA on P-256: every TLS 1.3 implementation must have it (RFC 8446 section 9.1), OpenSSL's FIPS providers and
hardware tokens too, which is not so for Ed25519; and with OpenSSL's assembly a handshake costs about the same.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rtunnel.trust import keys
from rtunnel.trust.identity import BACKDATE, agent_uri
from rtunnel.trust.keys import TrustError

SERVER_NAME = "broker.rtunnel"
CA_DAYS = 3650
BROKER_DAYS = 365
#: By hand; one that an agent enrols for lives shorter.
AGENT_DAYS = 90

_PUBLIC, _SECRET = 0o644, 0o600
_File = tuple[str, int, bytes, str]  # name, mode, content, what it is


@dataclass(frozen=True, slots=True)
class Made:
    """What was written."""

    path: Path
    what: str


def init(directory: Path, *, names: Sequence[str] = (), ips: Sequence[str] = ()) -> list[Made]:
    """Make everything that a new cluster needs. Raises TrustError; never overwrites, and leaves nothing half made."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _ca_certificate(ca_key)
    broker_key = ec.generate_private_key(ec.SECP256R1())
    broker = _broker_certificate(broker_key, ca, ca_key, names, ips)
    cluster_key = keys.new_cluster_key()
    cluster_line = _text(keys.cluster_key_line(cluster_key))
    return _write_all(
        directory,
        [
            ("ca.pem", _PUBLIC, _pem(ca), f"CA certificate, for agents; valid until {_until(ca)}"),
            ("ca.key", _SECRET, _key_pem(ca_key), "the CA's key: keep it offline, no role needs it"),
            ("broker.pem", _PUBLIC, _pem(broker), _broker_words(broker)),
            ("broker.key", _SECRET, _key_pem(broker_key), "its key, for brokers"),
            ("cluster.key", _SECRET, cluster_line, "for brokers: gateways' keys are derived from it"),
            _gateway_file("gateway", cluster_key),
            ("join.token", _SECRET, _text(keys.new_token().line()), "for brokers and agents: lets agents join"),
        ],
    )


def issue_broker(directory: Path, name: str, *, names: Sequence[str] = (), ips: Sequence[str] = ()) -> list[Made]:
    """Another broker certificate, `name`.pem and `name`.key, from the CA in `directory`: also how one is renewed.

    Raises TrustError; never overwrites.
    """
    if not name or "/" in name or name.startswith("."):
        raise TrustError(f"{name!r} is not a name for a file")
    ca, ca_key = _load_ca(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _broker_certificate(key, ca, ca_key, names, ips)
    return _write_all(
        directory,
        [
            (f"{name}.pem", _PUBLIC, _pem(certificate), _broker_words(certificate)),
            (f"{name}.key", _SECRET, _key_pem(key), "its key, for brokers"),
        ],
    )


def issue_agent(
    directory: Path, name: str, *, agent_id: str, namespace: str, addresses: Sequence[str], days: float = AGENT_DAYS
) -> list[Made]:
    """An agent's certificate and key, `name`.pem and `name`.key, from the CA in `directory`.

    Raises TrustError; never overwrites.
    """
    ca, ca_key = _load_ca(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = agent_certificate(key.public_key(), ca, ca_key, agent_id, namespace, addresses, days)
    return _write_all(
        directory,
        [
            (f"{name}.pem", _PUBLIC, _pem(certificate), f"agent certificate; valid until {_until(certificate)}"),
            (f"{name}.key", _SECRET, _key_pem(key), "its key, for the agent"),
        ],
    )


def issue_gateway(directory: Path, name: str) -> list[Made]:
    """A gateway's key, `name`.key, derived from the (newest) cluster key in `directory`: also how one is renewed.

    Its id is the name and a random part, so that a key that was revoked never comes back. Raises TrustError; never
    overwrites.
    """
    return _write_all(directory, [_gateway_file(name, keys.load_cluster_keys(directory / "cluster.key")[0])])


def _gateway_file(name: str, cluster_key: bytes) -> _File:
    try:
        key = keys.gateway_key(cluster_key, f"{name}-{secrets.token_hex(2)}")
    except ValueError as fault:
        raise TrustError(str(fault)) from None
    return f"{name}.key", _SECRET, _text(key.line()), f"for one gateway: signs its Dials; its id is {key.id}"


def agent_certificate(
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    agent_id: str,
    namespace: str,
    addresses: Sequence[str],
    days: float,
) -> x509.Certificate:
    """What makes a key an agent's: who it is, and which addresses it answers for. Raises TrustError."""
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(agent_uri(namespace, agent_id))]
    try:
        names += [x509.IPAddress(address) for address in dict.fromkeys(map(ipaddress.ip_address, addresses))]
    except ValueError as fault:
        raise TrustError(f"can't stand in a certificate: {fault}") from None
    builder = _builder(_name("rtunnel agent"), ca.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    return builder.add_extension(authority, critical=False).sign(ca_key, hashes.SHA256())


def _broker_words(certificate: x509.Certificate) -> str:
    return f"broker certificate; valid for {BROKER_DAYS} days, until {_until(certificate)}"


def _until(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.strftime("%Y-%m-%d")


# --- certificates -----------------------------------------------------------------------------------------


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _name("rtunnel cluster CA")
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA256())


def _broker_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    ips: Sequence[str],
) -> x509.Certificate:
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(_name(SERVER_NAME), ca.subject, key.public_key(), BROKER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(names, ips)), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    return builder.add_extension(authority, critical=False).sign(ca_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternatives(names: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    try:
        wanted: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys((SERVER_NAME, *names))]
        wanted += [x509.IPAddress(address) for address in dict.fromkeys(map(ipaddress.ip_address, ips))]
    except ValueError as fault:
        raise TrustError(f"can't stand in a certificate: {fault}") from None
    return wanted


def _load_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate, key = directory / "ca.pem", directory / "ca.key"
    try:
        ca = x509.load_pem_x509_certificate(certificate.read_bytes())
        ca_key = serialization.load_pem_private_key(key.read_bytes(), None)
    except OSError as fault:
        raise TrustError(f"{fault.filename}: can't be read: {fault.strerror}") from None
    except (ValueError, TypeError) as fault:
        raise TrustError(f"{directory}: ca.pem and ca.key can't be used: {fault}") from None
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise TrustError(f"{key}: is not the key of {certificate}")
    return ca, ca_key


# --- files ------------------------------------------------------------------------------------------------


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _text(line: str) -> bytes:
    return f"{line}\n".encode()


def _write_all(directory: Path, files: Sequence[_File]) -> list[Made]:
    """Write all or nothing; whatever is there already stays as it is."""
    undo: list[Callable[[], object]] = []
    try:
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True)
            undo.append(directory.rmdir)
        for name, mode, data, _ in files:
            path = directory / name
            _create(path, mode, data, undo)
    except OSError as fault:
        for step in reversed(undo):
            with suppress(OSError):
                step()
        if isinstance(fault, FileExistsError):
            raise TrustError(f"{fault.filename}: exists, and is not overwritten: use another directory") from None
        raise TrustError(f"{fault.filename or directory}: can't be written: {fault.strerror}") from None
    return [Made(directory / name, what) for name, _, _, what in files]


def _create(path: Path, mode: int, data: bytes, undo: list[Callable[[], object]]) -> None:
    # Secret from its first byte on: the mode is given at creation, whatever the umask.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    undo.append(path.unlink)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
