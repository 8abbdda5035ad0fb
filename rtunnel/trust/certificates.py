"""X.509: the cluster's CAs, the certificates that they issue, and requests for certificates.

Keys are ECDSA on P-256. Every TLS 1.3 implementation must support it (RFC 8446 section 9.1), and
OpenSSL's FIPS providers and hardware tokens do, which is not so for Ed25519. With OpenSSL's
assembly a handshake costs about the same.
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

#: DNS names that TLS clients look for in the certificates of brokers and of the authority.
BROKER_NAME: Final = "broker.rtunnel"
AUTHORITY_NAME: Final = "authority.rtunnel"
CA_DAYS: Final = 3650
DAY: Final = 86400

#: First part of the join token's MAC in an Enrol; the request follows (`keys.token_mac`).
ENROL_LABEL: Final = b"rtunnel enrol 1"
#: Prefix of the request in the text that the present key signs in an Enrol.
RENEW_LABEL: Final = b"rtunnel renew 1\0"

_ECDSA: Final = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Term:
    """The time for which a certificate is good."""

    issued: float  # seconds since 1970
    seconds: float


@dataclass(frozen=True, slots=True)
class Ca:
    """A CA's certificate with its private key."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate, which names the CA in signatures."""
        return self.certificate.fingerprint(hashes.SHA256())

    def certify_agent(
        self, key: PublicKey, agent_id: str, namespace: str, addresses: Sequence[str], term: Term
    ) -> x509.Certificate:
        """Return an agent's certificate: who it is, and which addresses it answers for.

        Raises TrustError.
        """
        names = _agent_names(agent_id, namespace, addresses)
        return self._certify(key, "rtunnel agent", names, ExtendedKeyUsageOID.CLIENT_AUTH, term)

    def certify_broker(
        self, key: PublicKey, name: str, names: Sequence[str], ips: Sequence[str], term: Term
    ) -> x509.Certificate:
        """Return a broker's certificate.

        Agents connect to `broker.rtunnel`, or to `names` and `ips`.

        `name` distinguishes brokers. Raises TrustError.
        """
        wanted = _alternatives((BROKER_NAME, *names), ips)
        return self._certify(key, name, wanted, ExtendedKeyUsageOID.SERVER_AUTH, term)

    def certify_authority(self, key: PublicKey, term: Term) -> x509.Certificate:
        """Return the certificate of the authority itself, by which its clients know it."""
        names = _alternatives((AUTHORITY_NAME,), ())
        return self._certify(key, "authority", names, ExtendedKeyUsageOID.SERVER_AUTH, term)

    def _certify(
        self, key: PublicKey, common: str, names: Sequence[x509.GeneralName], usage: ObjectIdentifier, term: Term
    ) -> x509.Certificate:
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = _builder(_name(common), self.certificate.subject, key, term)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
        return builder.add_extension(authority, critical=False).sign(self.key, hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Request:
    """The contents of an agent's certificate request, and the key that it is for."""

    namespace: str
    agent_id: str
    addresses: tuple[str, ...]  # canonical, sorted
    public_key: PublicKey

    @property
    def subject(self) -> str:
        """The name that revocations use, as in `Identity.subject`."""
        return f"agent/{self.namespace}/{self.agent_id}"


def new_key() -> PrivateKey:
    """Return a new private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_hash(key: PublicKey) -> bytes:
    """Return the name of a public key: the SHA-256 of its SubjectPublicKeyInfo."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def pem(thing: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return a certificate or request as PEM text."""
    return thing.public_bytes(serialization.Encoding.PEM)


def key_pem(key: PrivateKey) -> bytes:
    """Return a private key as PEM text, without a passphrase."""
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


# --- certificates ---------------------------------------------------------------------------------


def new_ca(number: int, issued: float) -> Ca:
    """Return a new CA of the cluster. `number`: 1 for the first; `issued`: seconds since 1970."""
    key = new_key()
    name = _name("rtunnel cluster CA" + (f" {number}" if number > 1 else ""))
    builder = _builder(name, name, key.public_key(), Term(issued, CA_DAYS * DAY))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Ca(builder.sign(key, hashes.SHA256()), key)


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, term: Term) -> x509.CertificateBuilder:
    begin = datetime.fromtimestamp(int(term.issued), UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - BACKDATE)
        .not_valid_after(begin + timedelta(seconds=int(term.seconds)))
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
        raise TrustError(f"agent {agent_id}: an agent's certificate names at least one address: give one")
    return [x509.UniformResourceIdentifier(agent_uri(namespace, agent_id)), *_alternatives((), addresses)]


def _alternatives(names: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    try:
        wanted: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys(names)]
        wanted += [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(map(canonical_ip, ips))]
    except ValueError as error:
        raise TrustError(f"can't stand in a certificate: {error}") from None
    return wanted


# --- requests -------------------------------------------------------------------------------------


def agent_request(
    key: PrivateKey, agent_id: str, namespace: str, addresses: Sequence[str]
) -> x509.CertificateSigningRequest:
    """Return a request for an agent's certificate. Raises TrustError."""
    names = x509.SubjectAlternativeName(_agent_names(agent_id, namespace, addresses))
    builder = x509.CertificateSigningRequestBuilder(_name("rtunnel agent")).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256())


def broker_request(key: PrivateKey, name: str) -> x509.CertificateSigningRequest:
    """Return a request for a broker's certificate, which only proves the key. Raises TrustError.

    `rtunnel pki issue` chooses names and addresses.
    """
    return x509.CertificateSigningRequestBuilder(_name(name)).sign(key, hashes.SHA256())


def read_request(request: x509.CertificateSigningRequest) -> Request:
    """Return the contents of an agent's request.

    Raises TrustError for what no agent may request.
    """
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
        raise TrustError(f"the request names {len(addresses)} addresses: it must name 1 to {MAX_ADDRESSES}")
    return Request(namespace, agent_id, addresses, key)


def load_request(der: bytes) -> x509.CertificateSigningRequest:
    """Return the request in these bytes (DER). Raises TrustError."""
    try:
        return x509.load_der_x509_csr(der)
    except UNREADABLE as error:
        raise TrustError(f"is not a certificate request: {error}") from None


def requested_key(request: x509.CertificateSigningRequest) -> PublicKey:
    """Return the key that a request is for, if the same key signed it. Raises TrustError."""
    try:
        key = request.public_key()
        # The check comes before that of the signature: verifying an RSA key with an odd exponent
        # takes 12 ms, and any peer can send one.
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise TrustError("the request's key is not on P-256")
        if not request.is_signature_valid:
            raise TrustError("the request is not signed by its key")
    except UNREADABLE as error:
        raise TrustError(f"the request's key can't be used: {error}") from None
    return key


def sign_renewal(key: PrivateKey, request: bytes) -> bytes:
    """Return the proof of a renewing Enrol: the present key's signature over the request."""
    return key.sign(RENEW_LABEL + request, _ECDSA)


def _one_host(text: str) -> str:
    address = ipaddress.ip_address(canonical_ip(text))
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{address} is not the address of one host")
    return str(address)
