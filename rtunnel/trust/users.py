"""The users of a gateway: a file with one name and scrypt hash a line, which `rtunnel user` writes.

    alice:$scrypt$ln=14,r=8,p=5$<salt, base64 without padding>$<hash>

The hash has the PHC string format; RFC 7914 specifies scrypt. Empty lines and lines that begin with
`#` are skipped, and kept when the file is written. Messages of this module repeat only the name
from a line, never its hash.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rtunnel.config import BadValue, check_word
from rtunnel.errors import TrustError

#: Bytes that a password of RFC 1929 can have.
MAX_PASSWORD: Final = 255
# 16 MiB and 0.15 s for one check: the least that OWASP recommends.
_COST: Final = (14, 8, 5)
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32
# Bounds on the memory and time of one check, whatever a file says.
_MAX_MEMORY: Final = 128 << 20
_MAX_P: Final = 16
# A file of 10,000 users has 1 MB.
_MAX_FILE: Final = 4 << 20

_HASH = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})")


@dataclass(frozen=True, slots=True)
class Hash:
    """The hash of one password, with its cost and salt."""

    cost: tuple[int, int, int]  # log2 of N, r, p
    salt: bytes = field(repr=False)
    key: bytes = field(repr=False)

    def fits(self, password: str) -> bool:
        """Return whether this is the hash of the password.

        Takes 0.15 s, the same for every password; for a worker thread.
        """
        return hmac.compare_digest(_scrypt(password, self.salt, self.cost, len(self.key)), self.key)

    def text(self) -> str:
        """Return the hash as it stands in a file."""
        log_n, r, p = self.cost
        return f"$scrypt$ln={log_n},r={r},p={p}${_encoded(self.salt)}${_encoded(self.key)}"


def new_hash(password: str) -> Hash:
    """Return a password's hash with a fresh salt.

    Raises BadValue for one that no client can send.
    """
    if not 1 <= len(password.encode()) <= MAX_PASSWORD:
        raise BadValue(f"the password has {len(password.encode())} bytes", f"use 1 to {MAX_PASSWORD}")
    salt = secrets.token_bytes(_SALT_BYTES)
    return Hash(_COST, salt, _scrypt(password, salt, _COST, _HASH_BYTES))


class Users:
    """The users of one file, by name."""

    def __init__(self, hashes: Mapping[str, Hash]) -> None:
        self.hashes = dict(hashes)
        # A name that is not in the file costs what most names cost, so that the time reveals no
        # names.
        costs = [entry.cost for entry in hashes.values()]
        cost = max(set(costs), key=costs.count) if costs else _COST
        self._nobody = Hash(cost, secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_HASH_BYTES))

    def check(self, name: str, password: str) -> bool:
        """Return whether this is a user with this password. Blocks for 0.15 s."""
        entry = self.hashes.get(name)
        return (entry or self._nobody).fits(password) and entry is not None


def check_name(name: str) -> str:
    """Return `name` if a user may have it. Raises BadValue."""
    check_word(name)
    if ":" in name or name.startswith("#") or name == "*":
        raise BadValue(
            f"{name!r} can't be a user's name", "use a name without ':', not '*', that does not begin with '#'"
        )
    return name


# --- the file -------------------------------------------------------------------------------------


def load_users(path: Path | str) -> Users:
    """Return the users of a file, which may be empty. Raises TrustError."""
    hashes: dict[str, Hash] = {}
    for number, line in enumerate(_lines(Path(path)), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, text = line.partition(":")
        try:
            check_name(name)
        except BadValue:
            raise TrustError(f"{path}:{number}: does not begin with a user's name and ':'") from None
        if name in hashes:
            raise TrustError(f"{path}:{number}: is a second line for the user {name}: remove one")
        hashes[name] = _parse(text.strip(), f"{path}:{number}: {name}")
    return Users(hashes)


def put_user(path: Path, name: str, entry: Hash) -> bool:
    """Add a user, or replace a user's password. Creates the file when there is none.

    Returns True for a new user. Raises TrustError, and then has not changed the file.
    """
    line = f"{check_name(name)}:{entry.text()}"
    lines = _lines(path) if path.exists() else []
    new = not lines or name not in load_users(path).hashes
    _write(path, [*lines, line] if new else [line if _is_of(old, name) else old for old in lines])
    return new


def remove_user(path: Path, name: str) -> None:
    """Remove a user. Raises TrustError, also when there is no such user."""
    if name not in load_users(path).hashes:
        raise TrustError(f"{path}: has no user {name}")
    _write(path, [line for line in _lines(path) if not _is_of(line, name)])


def _is_of(line: str, name: str) -> bool:
    return line.startswith(name + ":")


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise TrustError(f"{path}: is far too long for a file of users: give the file that `rtunnel user` writes")
        return data.decode().splitlines()
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror or error}") from None
    except ValueError:
        raise TrustError(f"{path}: is not UTF-8 text") from None


def _write(path: Path, lines: list[str]) -> None:
    """Replace the file atomically, with mode 0600.

    An existing file keeps its owner and group rights.
    """
    path = path.resolve()
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        old = path.stat() if path.exists() else None
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                if old is not None:
                    _keep(file.fileno(), old)
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            with suppress(OSError):
                fresh.unlink()
            raise
    except OSError as error:
        raise TrustError(f"{path}: can't be written: {error.strerror or error}") from None


def _keep(descriptor: int, old: os.stat_result) -> None:
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        # Otherwise the gateway cannot read it any more.
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, old.st_mode & 0o660 | 0o600)


# --- hashes ---------------------------------------------------------------------------------------


def _scrypt(password: str, salt: bytes, cost: tuple[int, int, int], size: int) -> bytes:
    log_n, r, p = cost
    return hashlib.scrypt(
        password.encode(), salt=salt, n=1 << log_n, r=r, p=p, maxmem=_MAX_MEMORY + (1 << 20), dklen=size
    )


def _parse(text: str, where: str) -> Hash:
    found = _HASH.fullmatch(text)
    if not found:
        raise TrustError(f"{where}: the hash is not $scrypt$ln=..,r=..,p=..$salt$hash (`rtunnel user add` makes one)")
    log_n, r, p = cost = int(found[1]), int(found[2]), int(found[3])
    if not (log_n >= 10 and r >= 1 and 1 <= p <= _MAX_P and 128 * r * ((1 << log_n) + p + 2) <= _MAX_MEMORY):
        raise TrustError(f"{where}: ln={log_n}, r={r}, p={p} is too cheap, or takes more than 128 MiB")
    try:
        return Hash(cost, _decoded(found[4]), _decoded(found[5]))
    except binascii.Error:
        raise TrustError(f"{where}: the hash is damaged: it is not base64") from None


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
