"""Symmetric secrets: cluster keys, gateway keys, join tokens, their MACs, and the used nonces.

All files are text with one secret a line. Empty lines and lines that begin with `#` are skipped:

    rtunnel-cluster-key-1 <base64 of 32 bytes>
    rtunnel-gateway-key-1 <id> <base64 of 32 bytes>
    rtunnel-token-1.<id>.<base64url of 32 bytes, no padding>

A gateway's key is derived from the cluster key and the gateway's id. Brokers can thus compute every
gateway's key, and no gateway can compute another's.

Messages of this module repeat only the id of a key or token from such a file, never the secret.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rtunnel.errors import TrustError

#: Characters of a token for the API, at least and at most.
API_TOKEN_LENGTH: Final = (24, 256)
KEY_BYTES = 32
#: Prefix of the id in the text from which a gateway's key is derived.
GATEWAY_LABEL: Final = b"rtunnel gateway 1\0"
#: Cluster keys in force at once: the new one and, until every gateway has a key from it, the old
#: one.
MAX_CLUSTER_KEYS: Final = 2
# A file of 1000 tokens has 80 KB.
_MAX_FILE = 1 << 20
# Derived keys that a broker caches. The cache is cleared when it is full.
_REMEMBERED: Final = 4096

_CLUSTER = "rtunnel-cluster-key-1"
_GATEWAY = "rtunnel-gateway-key-1"
_TOKEN = "rtunnel-token-1"  # noqa: S105 - a format's name
_TOKEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GATEWAY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LENGTH = struct.Struct(">I")


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """A join token, with which an agent proves to a broker that it may join."""

    id: str
    secret: bytes = field(repr=False)

    def line(self) -> str:
        """Return the token as it stands in a file."""
        return f"{_TOKEN}.{self.id}.{base64.urlsafe_b64encode(self.secret).rstrip(b'=').decode()}"


@dataclass(frozen=True, slots=True)
class GatewayKey:
    """One gateway's key, which makes MACs of Dials: HMAC-SHA256 over the body's bytes."""

    id: str  # stands in every Dial; a revocation names it
    secret: bytes = field(repr=False)

    def sign(self, body: bytes) -> bytes:
        """Return the MAC of a Dial body."""
        return hmac.digest(self.secret, body, "sha256")

    def line(self) -> str:
        """Return the key as it stands in a file."""
        return f"{_GATEWAY} {self.id} {base64.b64encode(self.secret).decode()}"


def gateway_key(cluster_key: bytes, key_id: str) -> GatewayKey:
    """Return the key of the gateway with this id. Raises ValueError for an invalid id."""
    if not _GATEWAY_ID.fullmatch(key_id):
        raise ValueError(f"{key_id!r} can't be the id of a gateway's key: use 1 to 128 letters, digits, '-', '_', '.'")
    return GatewayKey(key_id, _derive(cluster_key, key_id))


def _derive(cluster_key: bytes, key_id: str) -> bytes:
    return hmac.digest(cluster_key, GATEWAY_LABEL + key_id.encode(), "sha256")


def new_cluster_key() -> bytes:
    """Return a new, random cluster key."""
    return secrets.token_bytes(KEY_BYTES)


def cluster_key_line(key: bytes) -> str:
    """Return a cluster key as it stands in a file."""
    return f"{_CLUSTER} {base64.b64encode(key).decode()}"


def new_token(token_id: str = "") -> Token:
    """Return a new token, with a random id unless one is given.

    Raises ValueError for an invalid id.
    """
    token_id = token_id or secrets.token_hex(4)
    if not _TOKEN_ID.fullmatch(token_id):
        raise ValueError(f"{token_id!r} can't be a token's id: use 1 to 64 letters, digits, '-', '_'")
    return Token(token_id, secrets.token_bytes(KEY_BYTES))


def load_cluster_keys(path: Path | str) -> tuple[bytes, ...]:
    """Return the keys of a cluster key file, the newest first. Raises TrustError.

    There is one key, or two while the key is rotated.
    """
    lines = _lines(path)
    if len(lines) > MAX_CLUSTER_KEYS:
        raise TrustError(
            f"{path}: has {len(lines)} keys; a cluster has one, or two while it is rotated: remove the oldest"
        )
    found = []
    for number, line in lines:
        word, _, encoded = line.partition(" ")
        if word != _CLUSTER:
            raise TrustError(f"{path}:{number}: is not a cluster key{_looks_like(line)}")
        found.append(_decode(encoded.strip(), b"+/", path, number))
    return tuple(found)


def load_gateway_key(path: Path | str) -> GatewayKey:
    """Return the key of a gateway's key file. Raises TrustError."""
    lines = _lines(path)
    if len(lines) > 1:
        raise TrustError(f"{path}: has {len(lines)} lines; a gateway has one key: remove the others")
    number, line = lines[0]
    word, _, rest = line.partition(" ")
    if word != _GATEWAY:
        raise TrustError(f"{path}:{number}: is not a gateway's key{_looks_like(line)}")
    key_id, _, encoded = rest.strip().partition(" ")
    if not encoded or not _GATEWAY_ID.fullmatch(key_id):
        raise TrustError(f"{path}:{number}: is not {_GATEWAY} <id> <key>")
    return GatewayKey(key_id, _decode(encoded.strip(), b"+/", path, number))


def load_tokens(path: Path | str) -> dict[str, bytes]:
    """Return the secrets of all tokens of a file by their ids (a broker's side).

    Raises TrustError.
    """
    tokens: dict[str, bytes] = {}
    for number, line in _lines(path):
        token = _parse_token(line, path, number)
        if token.id in tokens:
            raise TrustError(f"{path}:{number}: is a second token with the id {token.id}: remove one")
        tokens[token.id] = token.secret
    return tokens


def load_token(path: Path | str) -> Token:
    """Return the only token of a file (an agent's side). Raises TrustError."""
    tokens = load_tokens(path)
    if len(tokens) > 1:
        raise TrustError(f"{path}: has {len(tokens)} tokens; an agent needs a file with its own only")
    return Token(*tokens.popitem())


def load_api_token(path: Path | str) -> str:
    """Return the token of an API token file: one line, which `openssl rand -base64 32` makes.

    Raises TrustError.
    """
    lines = _lines(path)
    if len(lines) > 1:
        raise TrustError(f"{path}: has {len(lines)} lines; an API token file has one")
    number, token = lines[0]
    if not API_TOKEN_LENGTH[0] <= len(token) <= API_TOKEN_LENGTH[1] or " " in token:
        raise TrustError(
            f"{path}:{number}: is not an API token: {API_TOKEN_LENGTH[0]} to {API_TOKEN_LENGTH[1]} characters without "
            "a space (`openssl rand -base64 32` makes one)"
        )
    return token


def _lines(path: Path | str) -> list[tuple[int, str]]:
    """Return the lines that are not empty or comments, with their numbers; at least one."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        raise TrustError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MAX_FILE or not data.isascii():
        raise TrustError(f"{path}: is not a key or token file: it is binary, or far too long")
    numbered = enumerate((line.strip() for line in data.decode("ascii").splitlines()), 1)
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise TrustError(f"{path}: is empty: a key or token must stand in it")
    return lines


def _parse_token(line: str, path: Path | str, number: int) -> Token:
    word, _, rest = line.partition(".")
    token_id, dot, encoded = rest.partition(".")
    if word != _TOKEN:
        raise TrustError(f"{path}:{number}: is not a join token{_looks_like(line)}")
    if not dot or not _TOKEN_ID.fullmatch(token_id):
        raise TrustError(f"{path}:{number}: is not {_TOKEN}.<id>.<secret>")
    return Token(token_id, _decode(encoded + "=" * (-len(encoded) % 4), b"-_", path, number))


def _looks_like(line: str) -> str:
    """Return what the wrong file seems to be: usually two paths are mixed up."""
    kinds = {
        _CLUSTER: "a cluster key",
        _GATEWAY: "a gateway's key",
        _TOKEN: "a join token",
        "-----BEGIN": "a PEM file",
        "rtunnel-": "of another version of rtunnel",
    }
    kind = next((kind for start, kind in kinds.items() if line.startswith(start)), "")
    return f" (it is {kind})" if kind else ""


def _decode(encoded: str, altchars: bytes, path: Path | str, number: int) -> bytes:
    try:
        key = base64.b64decode(encoded, altchars, validate=True)
    except (binascii.Error, ValueError):
        raise TrustError(f"{path}:{number}: the secret is damaged: it is not base64") from None
    if len(key) != KEY_BYTES:
        raise TrustError(f"{path}:{number}: the secret is damaged: {len(key)} bytes instead of {KEY_BYTES}")
    return key


# --- MACs -----------------------------------------------------------------------------------------


class DialKeys:
    """The keys of all gateways, as a broker computes them. Not thread-safe."""

    __slots__ = ("_cluster", "_known")

    def __init__(self, cluster_keys: Sequence[bytes]) -> None:
        if not cluster_keys or any(len(key) != KEY_BYTES for key in cluster_keys):
            raise ValueError(f"a cluster key has {KEY_BYTES} bytes, and there must be one")
        self._cluster = tuple(cluster_keys)
        self._known: dict[str, bytes] = {}

    def verify(self, key_id: str, body: bytes, mac: bytes) -> bool:
        """Return whether the MAC of this Dial body was made with the key of this gateway.

        Caches a key only after it has verified a MAC, so that invented ids fill no memory.
        """
        known = self._known.get(key_id)
        if known is not None and hmac.compare_digest(hmac.digest(known, body, "sha256"), mac):
            return True
        for cluster_key in self._cluster:
            key = _derive(cluster_key, key_id)
            if hmac.compare_digest(hmac.digest(key, body, "sha256"), mac):
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key_id] = key
                return True
        return False


#: First parts of the texts of the two MACs in a link's handshake. The Hello, the nonce and the hash
#: of the broker's certificate follow.
BROKER_LABEL: Final = b"rtunnel broker 1"
AGENT_LABEL: Final = b"rtunnel agent 1"


def token_mac(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    """Return HMAC-SHA256 over label and parts, each preceded by its length (4 bytes, big-endian).

    The lengths ensure that two different lists of parts never give the same text.
    """
    text = b"".join(_LENGTH.pack(len(part)) + part for part in (label, *parts))
    return hmac.digest(secret, text, "sha256")


class LinkMacs:
    """Computes the MACs with which agent and broker prove a join token on one link.

    It is the `TokenMacs` of `rtunnel.wire.control`. `binding` returns the SHA-256 of the
    certificate that the broker has shown on the link, and b"" on a plain link.
    """

    def __init__(self, binding: Callable[[], bytes]) -> None:
        self._binding = binding

    def broker(self, secret: bytes, hello: bytes, nonce: bytes) -> bytes:
        """Return the MAC of the Challenge."""
        return token_mac(secret, BROKER_LABEL, hello, nonce, self._binding())

    def agent(self, secret: bytes, hello: bytes, nonce: bytes) -> bytes:
        """Return the MAC of the Proof."""
        return token_mac(secret, AGENT_LABEL, hello, nonce, self._binding())


class NonceWindow:
    """Remembers used nonces, each for at least `seconds` and at most twice that.

    A Dial is valid from `window` seconds before its time to `window` after it: pass twice that
    window. Two generations are kept, and the older one is dropped as a whole, so that no search is
    needed. When a generation is full, every nonce is refused until it ends, because forgetting
    nonces would allow replays. A nonce arrives here only with a valid MAC, so that only a load far
    beyond a node's capacity can fill it.
    """

    #: 1 Mi nonces: 17,000 Dials a second over a minute, and about 100 MB.
    CAP = 1 << 20

    __slots__ = ("_began", "_cap", "_new", "_old", "seconds")

    def __init__(self, seconds: float, cap: int = CAP) -> None:
        self.seconds = seconds
        self._cap = cap
        self._began = float("-inf")
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    @property
    def full(self) -> bool:
        """Whether `fresh` refuses nonces because a generation is full."""
        return len(self._new) >= self._cap

    def fresh(self, nonce: bytes, now: float) -> bool:
        """Store the nonce, and return True when it is new. `now`: seconds of a monotonic clock."""
        age = now - self._began
        if age >= self.seconds:
            recent = age < 2 * self.seconds
            self._old = self._new if recent else set()
            self._new = set()
            self._began = self._began + self.seconds if recent else now
        if nonce in self._new or nonce in self._old or self.full:
            return False
        self._new.add(nonce)
        return True
