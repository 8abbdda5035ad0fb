"""Checks certificates: the names and addresses in them, the CAs in force, and the revocations.

Certificates are X.509 (RFC 5280) on P-256, issued directly by a CA of the cluster. The
subjectAltName holds the identity. An agent has the URI `rtunnel:agent/<namespace>/<agent_id>`, with
each word percent-encoded, and its addresses as iPAddress. A broker has DNS names
(`broker.rtunnel`), as TLS requires.

A **trust list** says which CAs are in force and what is revoked. It has a number, and is signed by
each CA that is or was in force, so that it can safely arrive by any way: a file, the authority, a
broker. A list is accepted only if its number is higher, and a CA that is in force at that moment
has signed it. One list thus hands over to the next, also from one CA to another.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote, unquote

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rtunnel.clock import CHECK_CLOCK, utc
from rtunnel.errors import TrustError
from rtunnel.trust.tls import certificate_der
from rtunnel.wire.messages import MAX_LIST

#: A certificate is valid from this long before it is issued, for hosts whose clocks are behind.
BACKDATE: Final = timedelta(hours=1)
#: Prefix of a trust list's body in the text that is signed.
LIST_LABEL: Final = b"rtunnel trust list 1\0"
#: Prefix of binding, epoch and node in the text that an Update with a certificate signs.
SESSION_LABEL: Final = b"rtunnel session 1\0"
_SCHEME: Final = "rtunnel:"
ECDSA_SHA256: Final = ec.ECDSA(hashes.SHA256())
#: Signatures of a trust list: one by each CA that is or was in force, and whose key exists.
MAX_SIGNATURES: Final = 16
# Verified certificates that are cached. The cache is cleared when it is full.
_REMEMBERED: Final = 65536

#: Errors that a peer's key or certificate may raise when it is loaded, or later when a part of it
#: is read.
UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


class Revoked(TrustError):
    """The certificate was valid before it was revoked."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The contents of a certificate. Times are seconds since 1970."""

    kind: str  # "agent", "broker", "authority"
    namespace: str  # of an agent
    name: str  # the agent_id, or the common name of another certificate
    addresses: frozenset[str]  # canonical
    issued: float
    ends: float
    public_key: PublicKey
    issuer: bytes = b""  # the CA that signed it (`ca_id`); empty when it was not verified

    @property
    def subject(self) -> str:
        """The name that revocations use: `agent/<namespace>/<agent_id>`, `broker/<name>`."""
        return f"agent/{self.namespace}/{self.name}" if self.kind == "agent" else f"{self.kind}/{self.name}"


def agent_uri(namespace: str, agent_id: str) -> str:
    """Return the URI that names an agent in its certificate and its request."""
    return f"{_SCHEME}agent/{quote(namespace, safe='')}/{quote(agent_id, safe='')}"


def read_names(names: x509.SubjectAlternativeName | None, common: str) -> tuple[str, str, str, frozenset[str]]:
    """Return (kind, namespace, name, addresses) of a subjectAltName.

    Raises TrustError when it names no agent, broker or authority.
    """
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names is not None else []
    addresses = frozenset(str(ip) for ip in names.get_values_for_type(x509.IPAddress)) if names is not None else ()
    for uri in uris:
        parts = uri.removeprefix(_SCHEME).split("/") if uri.startswith(_SCHEME) else []
        if len(parts) == 3 and parts[0] == "agent":
            return "agent", unquote(parts[1]), unquote(parts[2]), frozenset(addresses)
    hosts = names.get_values_for_type(x509.DNSName) if names is not None else []
    for kind in ("broker", "authority"):
        if f"{kind}.rtunnel" in hosts:
            return kind, "", common, frozenset(addresses)
    raise TrustError("the certificate names no agent, broker or authority of rtunnel")


def read_certificate(der: bytes) -> Identity:
    """Return the contents of a certificate, without verifying it (see `TrustStore.verify`).

    Raises TrustError when the bytes are not such a certificate.
    """
    try:
        return _identity(x509.load_der_x509_certificate(der))
    except UNREADABLE as error:
        raise TrustError(f"is not a certificate: {error}") from None


def _identity(certificate: x509.Certificate) -> Identity:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = None
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    kind, namespace, name, addresses = read_names(names, str(common[0].value) if common else "")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("the certificate's key is not on P-256: issue a new certificate with rtunnel pki issue")
    issued = (certificate.not_valid_before_utc + BACKDATE).timestamp()
    ends = certificate.not_valid_after_utc.timestamp()
    return Identity(kind, namespace, name, addresses, issued, ends, key)


# --- trust lists ----------------------------------------------------------------------------------


class TrustList(msgspec.Struct, frozen=True):
    """The CAs in force and the revocations.

    `number` increases with every list. `generation` increases when agents must get the list: when
    the CAs change, or a broker is revoked.
    """

    number: int
    generation: int
    cas: list[bytes]  # certificates, DER
    #: Subject -> time, in seconds since 1970, up to which the subject's certificates are revoked. A
    #: gateway's Dial key has the subject `gateway/<key id>`.
    revoked: dict[str, int] = {}
    #: CAs (`ca_id`) whose keys were stolen. Sessions accepted by their certificates end, too.
    void: list[bytes] = []


class _Signature(msgspec.Struct, frozen=True):
    signer: bytes  # SHA-256 of the CA's certificate
    value: bytes


class _SignedList(msgspec.Struct, frozen=True):
    body: bytes
    signatures: Annotated[list[_Signature], msgspec.Meta(max_length=MAX_SIGNATURES)]


def ca_id(ca: x509.Certificate) -> bytes:
    """Return the name of a CA: the SHA-256 of its public key, equal in a renewed certificate."""
    key = ca.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).digest()


def sign_list(content: TrustList, cas: Sequence[tuple[x509.Certificate, PrivateKey]]) -> bytes:
    """Return the list as it is sent. Raises TrustError when it is too long for a message."""
    body = msgspec.msgpack.encode(content)
    signatures = [
        _Signature(ca.fingerprint(hashes.SHA256()), key.sign(LIST_LABEL + body, ECDSA_SHA256)) for ca, key in cas
    ]
    data = msgspec.msgpack.encode(_SignedList(body, signatures))
    if len(data) > MAX_LIST:
        raise TrustError(
            f"the trust list has {len(data)} bytes, over {MAX_LIST}: too many revocations; "
            "wait until revoked certificates have expired, or rotate the CA (rtunnel pki rotate)"
        )
    return data


class TrustStore:
    """The CAs in force and the revocations, which certificates are checked against.

    Not thread-safe.
    """

    def __init__(self, pem: bytes, where: str = "the CA file") -> None:
        """Start with the CA certificates in `pem`. Raises TrustError, which names `where`."""
        self.number = 0
        self.generation = 0
        self.signed = b""  # the list in force, as it was received
        self.revoked: dict[str, int] = {}
        self.void: frozenset[bytes] = frozenset()
        # Each with its `ca_id`, which two certificates share when a CA's certificate was renewed.
        self._cas: list[tuple[bytes, x509.Certificate]] = []  # the CAs in force
        self._past: list[tuple[bytes, x509.Certificate]] = []  # CAs that are or were in force
        self._ids: frozenset[bytes] = frozenset()  # the ids of those in force
        self._given: list[tuple[bytes, x509.Certificate]] = []  # the CAs of the last file
        self._known: dict[bytes, Identity] = {}
        self._void_known: dict[bytes, bool] = {}
        # The library's message is longer and less clear.
        if b"-----BEGIN CERTIFICATE-----" not in pem:
            raise TrustError(f"{where}: has no PEM certificate: give the cluster's ca.pem")
        try:
            self._put(_usable(x509.load_pem_x509_certificates(pem)))
        except UNREADABLE as error:
            raise TrustError(
                f"{where}: has no PEM certificate that can be used ({error}): give the cluster's ca.pem"
            ) from None
        self._given = self._cas

    def _put(self, cas: Iterable[x509.Certificate], void: Iterable[bytes] = ()) -> None:
        self._cas = [(ca_id(ca), ca) for ca in cas]
        self._ids = _ids(self._cas)
        self._past += [each for each in self._cas if each not in self._past]
        self.void = frozenset(void)
        self._known.clear()
        self._void_known.clear()

    @property
    def pem(self) -> str:
        """The CAs in force, as PEM text."""
        return b"".join(ca.public_bytes(serialization.Encoding.PEM) for _, ca in self._cas).decode()

    def begin_again(self, pem: bytes, where: str = "the CA file") -> None:
        """Put the CAs of a changed file in force.

        The list in force stays when one of the new CAs has signed it. Otherwise only its
        revocations stay, and any list that a new CA has signed is accepted. When no CA of before is
        among the new ones, neither in force nor from the file, this is no rotation: the CAs of
        before become void. Raises TrustError, and has then changed nothing.
        """
        fresh = TrustStore(pem, where)
        if fresh._cas == self._given:
            return  # the file was written again with the same CAs: the list in force still applies
        fresh.must_not_be(self.void, where)
        given = fresh._cas
        if self.signed:
            with suppress(TrustError):
                fresh.take(self.signed)
        self.number, self.generation, self.signed = fresh.number, fresh.generation, fresh.signed
        handed_over = (self._ids | _ids(self._given)) & (fresh._ids | _ids(given))
        self._given = given
        self._put((ca for _, ca in fresh._cas), fresh.void if handed_over else fresh.void | self._ids)

    def must_not_be(self, void: frozenset[bytes], where: str) -> None:
        """Raise TrustError when every CA in force is one of these void ones."""
        if self._ids <= void:
            raise TrustError(f"{where}: has only void CAs, whose keys were stolen: give the newest ca.pem")

    def take(self, data: bytes) -> bool:
        """Put a list in force, and return True. Returns False when it is not newer.

        Raises TrustError when no CA in force has signed it.
        """
        try:
            signed = msgspec.msgpack.decode(data, type=_SignedList)
            content = msgspec.msgpack.decode(signed.body, type=TrustList)
            cas = _usable(x509.load_der_x509_certificate(der) for der in content.cas)
        except (msgspec.DecodeError, RecursionError, *UNREADABLE) as error:
            raise TrustError(f"is not a trust list: {error}") from None
        if content.number <= self.number:
            return False
        if not any(self._has_signed(ca, signed) for _, ca in self._cas):
            raise TrustError(f"trust list {content.number} is not signed by a CA in force: give the cluster's ca.pem")
        if not cas:
            raise TrustError(f"trust list {content.number} has no CA: export it again")
        self.number, self.generation, self.signed = content.number, content.generation, data
        self.revoked = content.revoked
        self._put(cas, content.void)
        return True

    @staticmethod
    def _has_signed(ca: x509.Certificate, signed: _SignedList) -> bool:
        key, fingerprint = ca.public_key(), ca.fingerprint(hashes.SHA256())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False  # an operator's own CA may issue certificates, but signs no lists
        for signature in signed.signatures:
            if signature.signer == fingerprint:
                try:
                    key.verify(signature.value, LIST_LABEL + signed.body, ECDSA_SHA256)
                except InvalidSignature:
                    continue
                return True
        return False

    def verify(self, der: bytes, now: Callable[[], float] = time.time, *, keep: bool = True) -> Identity:
        """Return the identity in a certificate of a CA in force that is valid now.

        The signature of a known certificate is not computed again. `keep`: cache the result,
        because the certificate is expected again soon. Raises TrustError, or Revoked.
        """
        identity = self._known.get(der)
        if identity is None:
            identity = self._check(der)
            if keep:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[der] = identity
        moment = now()
        if moment >= identity.ends:
            ended = utc(identity.ends)
            raise TrustError(f"the certificate of {identity.subject} has expired: it ended {ended} ({CHECK_CLOCK})")
        if moment < identity.issued - BACKDATE.total_seconds():
            begins = utc(identity.issued)
            text = f"the certificate of {identity.subject} is not valid yet: it begins {begins}"
            raise TrustError(f"{text} ({CHECK_CLOCK})")
        if self.is_revoked(identity):
            raise Revoked(f"the certificate of {identity.subject} is revoked")
        return identity

    def _check(self, der: bytes) -> Identity:
        try:
            certificate = x509.load_der_x509_certificate(der)
            for known, ca in self._cas:
                if _has_issued(ca, certificate):
                    return replace(_identity(certificate), issuer=known)
        except UNREADABLE as error:
            raise TrustError(f"is not a certificate: {error}") from None
        raise TrustError("the certificate is not from a CA in force")

    def is_revoked(self, identity: Identity) -> bool:
        """Return whether the certificate was issued before its subject was revoked."""
        return identity.issued <= self.revoked.get(identity.subject, 0)

    def in_force(self, identity: Identity) -> bool:
        """Return whether the CA that signed a verified certificate is still in force."""
        return identity.issuer in self._ids

    def is_void(self, identity: Identity) -> bool:
        """Return whether the certificate's CA is void, so that its sessions must end."""
        return identity.issuer in self.void

    def fault_of(self, der: bytes | None) -> str:
        """Return why a certificate that TLS has accepted is revoked or from a void CA, or "".

        From any thread.
        """
        if der is None or not (self.revoked or self.void):
            return ""
        try:
            identity = read_certificate(der)
        except TrustError:
            return ""  # it is from an operator's own CA, and trust lists cannot name it
        if self.is_revoked(identity):
            return f"the certificate of {identity.subject} is revoked"
        return f"the certificate of {identity.subject} is from a CA that is void" if self._of_void_ca(der) else ""

    def _of_void_ca(self, der: bytes) -> bool:
        found = self._void_known.get(der)
        if found is None:
            certificate = x509.load_der_x509_certificate(der)
            void = [ca for known, ca in self._past if known in self.void]
            found = self._void_known[der] = any(_has_issued(ca, certificate) for ca in void)
        return found


def _has_issued(ca: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _ids(cas: Iterable[tuple[bytes, x509.Certificate]]) -> frozenset[bytes]:
    return frozenset(known for known, _ in cas)


def void_cas(data: bytes) -> frozenset[bytes]:
    """Return the CAs (`ca_id`) that a list calls void, without checking who signed it."""
    try:
        return frozenset(
            msgspec.msgpack.decode(msgspec.msgpack.decode(data, type=_SignedList).body, type=TrustList).void
        )
    except (msgspec.DecodeError, RecursionError):
        return frozenset()


def _usable(cas: Iterable[x509.Certificate]) -> list[x509.Certificate]:
    """Return the CAs, after a check that their keys are of a known kind. Raises `UNREADABLE`."""
    found = list(cas)
    for ca in found:
        ca.public_key()
        with suppress(x509.ExtensionNotFound):
            if ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                continue
        raise ValueError(f"the certificate of {ca.subject.rfc4514_string()} is not of a CA")
    return found


def load_trust_store(path: Path | str) -> TrustStore:
    """Return a store with the CAs of a file, and no list. Raises TrustError."""
    try:
        return TrustStore(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror}") from None


# --- a session changes to another certificate -----------------------------------------------------


def prove_session(key: PrivateKey, node: str, epoch: int, binding: bytes) -> bytes:
    """Return an agent's signature, by the key of its new certificate, that this session is its own.

    `binding` is the SHA-256 of the certificate that the broker presented on the link. Another
    broker that claims to be `node` therefore cannot use the signature.
    """
    return key.sign(_session(node, epoch, binding), ECDSA_SHA256)


def is_session_proof(public_key: PublicKey, node: str, epoch: int, binding: bytes, signature: bytes) -> bool:
    """Return whether the holder of this key signed that this session is its own."""
    try:
        public_key.verify(signature, _session(node, epoch, binding), ECDSA_SHA256)
    except InvalidSignature:
        return False
    return True


def _session(node: str, epoch: int, binding: bytes) -> bytes:
    return SESSION_LABEL + binding + epoch.to_bytes(8, "big") + node.encode()


# --- files ----------------------------------------------------------------------------------------


def load_private_key(path: Path | str) -> PrivateKey:
    """Return the P-256 key of a file. Raises TrustError."""
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), None)
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror}") from None
    except UNREADABLE:
        # The library's text may quote the file, and the key with it.
        raise TrustError(
            f"{path}: is not a private key that can be used: give a PEM file without a passphrase"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"{path}: is not a key on P-256: make a new key with rtunnel pki")
    return key


def load_pair(certificate: Path | str, key: Path | str) -> tuple[bytes, PrivateKey, Identity]:
    """Return an agent's certificate (DER), its key, and its identity.

    Raises TrustError, which names the file at fault.
    """
    der, private = certificate_der(certificate), load_private_key(key)
    try:
        who = read_certificate(der)
    except TrustError as error:
        raise TrustError(f"{certificate}: {error}") from None
    if private.public_key() != who.public_key:
        raise TrustError(f"{key}: is not the key of the certificate in {certificate}: give the two files of one pair")
    return der, private, who


def check_directory(path: Path | str) -> None:
    """Raise TrustError unless this process can write to the directory, or can create it."""
    directory = Path(path)
    try:
        if not directory.exists():
            directory = next(parent for parent in directory.absolute().parents if parent.exists())
        if not directory.is_dir():
            raise TrustError(f"{directory}: is not a directory: give a folder")
    except OSError as error:
        raise TrustError(f"{path}: can't be used: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TrustError(f"{directory}: this user can't write there: give the folder to the user that runs the agent")
