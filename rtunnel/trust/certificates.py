"""X.509: the cluster's CAs, the certificates that they give out, and requests for them.

Keys are ECDSA on P-256: every TLS 1.3 implementation must have it (RFC 8446 section 9.1), OpenSSL's FIPS providers and
hardware tokens too, which is not so for Ed25519; and with OpenSSL's assembly a handshake costs about the same.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from rtunnel.config import MAX_ADDRESSES, canonical_ip, check_word
from rtunnel.errors import TrustError
from rtunnel.trust.identity import BACKDATE, UNREADABLE, PrivateKey, PublicKey, agent_uri, read_names

#: What TLS looks for in the certificates of brokers and of the authority.
BROKER_NAME: Final = "broker.rtunnel"
AUTHORITY_NAME: Final = "authority.rtunnel"
CA_DAYS: Final = 3650
DAY: Final = 86400

#: What a join token's MAC in an Enrol is over, in front of the request (`keys.token_mac`).
ENROL_LABEL: Final = b"rtunnel enrol 1"
#: What the present key's signature in an Enrol is over, in front of the request.
RENEW_LABEL: Final = b"rtunnel renew 1\0"

_ECDSA: Final = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Ca:
    """A CA that can sign."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    @property
    def fingerprint(self) -> bytes:
        """Names it: SHA-256 of its certificate."""
        return self.certificate.fingerprint(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Request:
    """What an agent asks for in a certificate request, and whose key it is."""

    namespace: str
    agent_id: str
    addresses: tuple[str, ...]  # canonical, sorted
    public_key: PublicKey

    @property
    def subject(self) -> str:
        """As `Identity.subject`."""
        return f"agent/{self.namespace}/{self.agent_id}"


def new_key() -> PrivateKey:
    """A fresh one."""
    return ec.generate_private_key(ec.SECP256R1())


def key_hash(key: PublicKey) -> bytes:
    """Names a public key: SHA-256 of its SubjectPublicKeyInfo."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def pem(thing: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """As text."""
    return thing.public_bytes(serialization.Encoding.PEM)


def key_pem(key: PrivateKey) -> bytes:
    """As text, without a passphrase."""
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


# --- certificates -----------------------------------------------------------------------------------------


def new_ca(number: int, issued: float) -> Ca:
    """The cluster's CA of this number, the first is 1."""
    key = new_key()
    name = _name("rtunnel cluster CA" + (f" {number}" if number > 1 else ""))
    builder = _builder(name, name, key.public_key(), issued, CA_DAYS * DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Ca(builder.sign(key, hashes.SHA256()), key)


def agent_certificate(
    ca: Ca, key: PublicKey, agent_id: str, namespace: str, addresses: Sequence[str], issued: float, seconds: float
) -> x509.Certificate:
    """What makes a key an agent's: who it is, and which addresses it answers for. Raises TrustError."""
    names = _agent_names(agent_id, namespace, addresses)
    return _leaf(ca, key, "rtunnel agent", names, ExtendedKeyUsageOID.CLIENT_AUTH, issued, seconds)


def broker_certificate(
    ca: Ca, key: PublicKey, name: str, names: Sequence[str], ips: Sequence[str], issued: float, seconds: float
) -> x509.Certificate:
    """What makes a key a broker's: agents connect to `broker.rtunnel`, or to these names and addresses.

    `name` tells brokers apart. Raises TrustError.
    """
    wanted = _alternatives((BROKER_NAME, *names), ips)
    return _leaf(ca, key, name, wanted, ExtendedKeyUsageOID.SERVER_AUTH, issued, seconds)


def authority_certificate(ca: Ca, key: PublicKey, issued: float, seconds: float) -> x509.Certificate:
    """What makes a key the authority's."""
    names = _alternatives((AUTHORITY_NAME,), ())
    return _leaf(ca, key, "authority", names, ExtendedKeyUsageOID.SERVER_AUTH, issued, seconds)


def _leaf(
    ca: Ca,
    key: PublicKey,
    common: str,
    names: Sequence[x509.GeneralName],
    usage: ObjectIdentifier,
    issued: float,
    seconds: float,
) -> x509.Certificate:
    issuer = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(_name(common), ca.certificate.subject, key, issued, seconds)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    return builder.add_extension(authority, critical=False).sign(ca.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, issued: float, seconds: float
) -> x509.CertificateBuilder:
    begin = datetime.fromtimestamp(int(issued), UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - BACKDATE)
        .not_valid_after(begin + timedelta(seconds=int(seconds)))
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
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    except ValueError as error:
        raise TrustError(f"{common!r} can't stand in a certificate: {error}") from None


def _agent_names(agent_id: str, namespace: str, addresses: Sequence[str]) -> list[x509.GeneralName]:
    if not addresses:
        raise TrustError(f"agent {agent_id}: an agent's certificate names at least one address")
    return [x509.UniformResourceIdentifier(agent_uri(namespace, agent_id)), *_alternatives((), addresses)]


def _alternatives(names: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    try:
        wanted: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys(names)]
        wanted += [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(map(canonical_ip, ips))]
    except ValueError as error:
        raise TrustError(f"can't stand in a certificate: {error}") from None
    return wanted


# --- requests ---------------------------------------------------------------------------------------------


def agent_request(
    key: PrivateKey, agent_id: str, namespace: str, addresses: Sequence[str]
) -> x509.CertificateSigningRequest:
    """A request for an agent's certificate. Raises TrustError."""
    names = x509.SubjectAlternativeName(_agent_names(agent_id, namespace, addresses))
    builder = x509.CertificateSigningRequestBuilder(_name("rtunnel agent")).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256())


def broker_request(key: PrivateKey, name: str) -> x509.CertificateSigningRequest:
    """A request for a broker's certificate: it proves the key, all else is said by who issues it. Raises TrustError."""
    return x509.CertificateSigningRequestBuilder(_name(name)).sign(key, hashes.SHA256())


def read_request(request: x509.CertificateSigningRequest) -> Request:
    """What an agent asks for. Raises TrustError for what no agent may ask, whoever allows it."""
    key = requested_key(request)
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise TrustError("the request has no subjectAltName: it names no agent") from None
    except UNREADABLE as error:
        raise TrustError(f"the request can't be read: {error}") from None
    kind, namespace, agent_id, asked = read_names(names, "")
    if kind != "agent":
        raise TrustError("the request is not for an agent")
    try:
        check_word(namespace)
        check_word(agent_id)
        addresses = tuple(sorted({_one_host(address) for address in asked}))
    except ValueError as error:
        raise TrustError(f"the request is malformed: {error}") from None
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise TrustError(f"the request names {len(addresses)} addresses: 1 to {MAX_ADDRESSES} are possible")
    return Request(namespace, agent_id, addresses, key)


def load_request(der: bytes) -> x509.CertificateSigningRequest:
    """From its DER. Raises TrustError."""
    try:
        return x509.load_der_x509_csr(der)
    except UNREADABLE as error:
        raise TrustError(f"is not a certificate request: {error}") from None


def requested_key(request: x509.CertificateSigningRequest) -> PublicKey:
    """The key that a request is for, when its holder has signed the request. Raises TrustError."""
    try:
        key = request.public_key()
        # Before its signature: to check that of an RSA key with an odd exponent takes 12 ms, and anybody may ask.
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise TrustError("the request's key is not on P-256")
        if not request.is_signature_valid:
            raise TrustError("the request is not signed by its key")
    except UNREADABLE as error:
        raise TrustError(f"the request's key can't be used: {error}") from None
    return key


def sign_renewal(key: PrivateKey, request: bytes) -> bytes:
    """The proof in an Enrol that renews: the present key's signature over the request's DER."""
    return key.sign(RENEW_LABEL + request, _ECDSA)


def _one_host(text: str) -> str:
    address = ipaddress.ip_address(canonical_ip(text))
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{address} is not the address of one host")
    return str(address)
