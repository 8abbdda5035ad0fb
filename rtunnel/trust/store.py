"""The authority's records: `authority.db`, an SQLite file beside the CA's key.

The authority and `rtunnel pki` use it at the same time, each in its own transactions
(`Store.change`). It holds the secrets of tokens, which check MACs, so that only its owner may read
it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rtunnel.errors import TrustError

FILE: Final = "authority.db"
# Seconds to wait for the file; other processes lock it for milliseconds.
_PATIENCE: Final = 5.0
_VERSION: Final = 2

# Since version 2. An address has one holder: the last agent that it was certified for, as long as a
# certificate of that agent is recorded.
_HOLDERS: Final = """
CREATE TABLE holders (
    namespace TEXT NOT NULL, address TEXT NOT NULL, subject TEXT NOT NULL, PRIMARY KEY (namespace, address))
    WITHOUT ROWID;
CREATE INDEX holders_by_subject ON holders (subject);
CREATE TRIGGER holder_forgotten AFTER DELETE ON issued
    WHEN NOT EXISTS (SELECT 1 FROM issued WHERE subject = OLD.subject)
    BEGIN DELETE FROM holders WHERE subject = OLD.subject; END;
"""
_SCHEMA: Final = f"""
CREATE TABLE cas (
    number INTEGER PRIMARY KEY, role TEXT NOT NULL, certificate BLOB NOT NULL, key_file TEXT NOT NULL);
CREATE TABLE list (number INTEGER NOT NULL, generation INTEGER NOT NULL, signed BLOB NOT NULL);
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, secret BLOB NOT NULL, namespace TEXT NOT NULL, networks TEXT NOT NULL, uses INTEGER NOT NULL,
    used INTEGER NOT NULL, ends INTEGER NOT NULL, lifetime INTEGER NOT NULL, revoked INTEGER NOT NULL,
    take_over INTEGER NOT NULL DEFAULT 0);
CREATE TABLE issued (
    subject TEXT NOT NULL, key BLOB NOT NULL, ca INTEGER NOT NULL, addresses TEXT NOT NULL, token TEXT NOT NULL,
    issued INTEGER NOT NULL, ends INTEGER NOT NULL, forget INTEGER NOT NULL, PRIMARY KEY (subject, key, ca));
CREATE INDEX issued_by_key ON issued (key);
CREATE INDEX issued_by_forget ON issued (forget);
CREATE TABLE revocations (subject TEXT PRIMARY KEY, at INTEGER NOT NULL, until INTEGER);
{_HOLDERS}
PRAGMA user_version = {_VERSION};
"""


class StoreFault(TrustError):
    """The file cannot be read or written at present."""


@dataclass(frozen=True, slots=True)
class CaRecord:
    """One CA, whose key is in a file.

    Role `issuing` issues certificates; `next` and `old` are in force beside it. `retired` only
    signs trust lists, for processes that have missed a rotation; so does `void`, whose key was
    stolen.
    """

    number: int
    role: str
    certificate: bytes  # DER
    key_file: str


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A join token, and the limits of what it allows. Times are seconds since 1970."""

    id: str
    secret: bytes = field(repr=False)
    namespace: str
    networks: tuple[str, ...]
    uses: int
    used: int
    ends: int
    lifetime: int  # of a certificate, in seconds
    revoked: bool = False
    take_over: bool = False  # it may give an agent what is certified for another agent


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that was issued. Times are seconds since 1970."""

    subject: str
    key: bytes  # `certificates.key_hash`
    ca: int
    addresses: tuple[str, ...]
    token: str  # the token with which its agent first enrolled; "" when it was issued by hand
    issued: int
    ends: int
    forget: int  # the record can be deleted after this time


class Store:
    """The open file `authority.db`.

    One thread at a time may use it. Every method raises TrustError, which names the file.
    """

    def __init__(self, path: Path) -> None:
        """Open a file that `create` has made."""
        self.path = path
        try:
            with path.open("r+b"):
                pass
        except OSError as error:
            fix = "`rtunnel pki init` makes one; name its directory with --dir, or authority.directory"
            raise TrustError(f"{path}: can't be opened: {error.strerror} ({fix})") from None
        self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            with self._translate_errors():
                # FULL: a power cut must not undo a revocation or a token's use that was reported.
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 1:
                version = self._add_holders()
            if version != _VERSION:
                raise TrustError(
                    f"{path}: has version {version}, this rtunnel reads {_VERSION}: use the version that made it"
                )
        except TrustError:
            self._db.close()
            raise

    def _add_holders(self) -> int:
        """Upgrade a file of version 1 to version 2, and return the file's version.

        When several agents have one address, the newest one holds it.
        """
        with self.change():
            # Another process may have upgraded it.
            (version,) = self._run("PRAGMA user_version").fetchone()
            if version == 1:
                self._run("ALTER TABLE tokens ADD COLUMN take_over INTEGER NOT NULL DEFAULT 0")
                for statement in _statements(_HOLDERS):
                    self._run(statement)
                for item in map(_issued, self._run("SELECT * FROM issued ORDER BY issued").fetchall()):
                    kind, namespace, *_ = item.subject.split("/")
                    if kind == "agent":
                        self.put_holder(item.subject, namespace, item.addresses)
                self._run("PRAGMA user_version = 2")
            return 2 if version == 1 else int(version)

    @staticmethod
    def create(path: Path) -> Store:
        """Create a new file, and open it."""
        try:
            db = sqlite3.connect(path)
            db.executescript(_SCHEMA)
            db.close()
        except sqlite3.Error as error:
            raise StoreFault(f"{path}: can't be created ({error}): make its directory writable") from None
        return Store(path)

    def close(self) -> None:
        """Close the file, which must not be used any more."""
        self._db.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Run the block in one transaction, during which no other process can change the file."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            self._db.rollback()
            raise

    def version(self) -> int:
        """Return a number that differs after another process has changed the file."""
        return int(self._run("PRAGMA data_version").fetchone()[0])

    # CAs and the trust list.

    def cas(self) -> list[CaRecord]:
        """Return all CAs, also retired ones, the oldest first."""
        rows = self._run("SELECT number, role, certificate, key_file FROM cas ORDER BY number")
        return [CaRecord(*row) for row in rows]

    def put_ca(self, ca: CaRecord) -> None:
        """Add a CA, or give it another role."""
        values = (ca.number, ca.role, ca.certificate, ca.key_file)
        self._run("INSERT OR REPLACE INTO cas VALUES (?, ?, ?, ?)", *values)

    def trust_list(self) -> tuple[int, int, bytes]:
        """Return (number, generation, signed) of the list in force; zeros before the first one."""
        row = self._run("SELECT number, generation, signed FROM list").fetchone()
        return (0, 0, b"") if row is None else (row[0], row[1], row[2])

    def put_trust_list(self, number: int, generation: int, signed: bytes) -> None:
        """Replace the list in force."""
        self._run("DELETE FROM list")
        self._run("INSERT INTO list VALUES (?, ?, ?)", number, generation, signed)

    # Tokens.

    def tokens(self) -> list[TokenRecord]:
        """Return all tokens, the one that ends last first."""
        return [_token(row) for row in self._run("SELECT * FROM tokens ORDER BY ends DESC, id")]

    def token(self, token_id: str) -> TokenRecord | None:
        """Return the token with this id, or None."""
        row = self._run("SELECT * FROM tokens WHERE id = ?", token_id).fetchone()
        return None if row is None else _token(row)

    def add_token(self, token: TokenRecord) -> None:
        """Add a token. Raises TrustError when its id is in use."""
        if self.token(token.id) is not None:
            raise TrustError(f"a token {token.id} exists already: choose another id")
        values = (token.id, token.secret, token.namespace, " ".join(token.networks), token.uses, token.used)
        rest = (token.ends, token.lifetime, int(token.revoked), int(token.take_over))
        self._run("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *values, *rest)

    def use_token(self, token_id: str) -> None:
        """Count one use of a token."""
        self._run("UPDATE tokens SET used = used + 1 WHERE id = ?", token_id)

    def revoke_token(self, token_id: str) -> bool:
        """Revoke a token. Returns False when there is none with this id."""
        return self._run("UPDATE tokens SET revoked = 1 WHERE id = ?", token_id).rowcount > 0

    # Certificates.

    def record(self, item: Issued) -> None:
        """Record a certificate.

        When several have one subject, key and CA, the last one is kept, with the token of the
        first.
        """
        values = (item.subject, item.key, item.ca, " ".join(item.addresses), item.token)
        self._run(
            "INSERT INTO issued VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (subject, key, ca) DO UPDATE SET"
            " addresses = excluded.addresses,"
            " token = CASE excluded.token WHEN '' THEN token ELSE excluded.token END, issued = excluded.issued,"
            " ends = max(ends, excluded.ends), forget = max(forget, excluded.forget)",
            *values, item.issued, item.ends, item.forget,
        )  # fmt: skip

    def forget(self, now: float) -> None:
        """Delete the certificates that are of no use after `now` (seconds since 1970)."""
        self._run("DELETE FROM issued WHERE forget < ?", int(now))

    def issued(self, now: float) -> list[Issued]:
        """Return the certificates that have not expired."""
        rows = self._run("SELECT * FROM issued WHERE ends > ? ORDER BY subject, issued", int(now))
        return [_issued(row) for row in rows]

    def issued_to(self, subject: str) -> list[Issued]:
        """Return every recorded certificate of one subject."""
        return [_issued(row) for row in self._run("SELECT * FROM issued WHERE subject = ?", subject)]

    def issued_for(self, key: bytes) -> list[Issued]:
        """Return every recorded certificate for one key (`certificates.key_hash`)."""
        return [_issued(row) for row in self._run("SELECT * FROM issued WHERE key = ?", key)]

    # The holders of addresses.

    def put_holder(self, subject: str, namespace: str, addresses: Iterable[str]) -> None:
        """Record that these addresses are certified for this agent, and for no other any more."""
        for address in addresses:
            self._run("INSERT OR REPLACE INTO holders VALUES (?, ?, ?)", namespace, address, subject)

    def holder(self, namespace: str, address: str) -> str:
        """Return the subject that the address was last certified for, or "" when none is recorded.

        Its certificates may have expired, be void, or be without this address by now.
        """
        sql = "SELECT subject FROM holders WHERE namespace = ? AND address = ?"
        row = self._run(sql, namespace, address).fetchone()
        return "" if row is None else str(row[0])

    # Revocations.

    def revoke(self, subject: str, at: int, until: int | None) -> None:
        """Record that certificates issued up to `at` are revoked, and would end at `until`.

        `until` None: they do not end. An earlier record of the subject only becomes stricter.
        """
        self._run(
            "INSERT INTO revocations VALUES (?, ?, ?) ON CONFLICT (subject) DO UPDATE SET"
            # Max is NULL when one is NULL.
            " at = max(at, excluded.at), until = max(until, excluded.until)",
            subject, at, until,
        )  # fmt: skip

    def revoked_at(self, subject: str) -> int:
        """Return the time up to which the subject's certificates are revoked; 0 when never."""
        row = self._run("SELECT at FROM revocations WHERE subject = ?", subject).fetchone()
        return 0 if row is None else int(row[0])

    def revocations(self, now: float) -> dict[str, int]:
        """Return the revocations that still make a certificate invalid, as subject -> time."""
        rows = self._run("SELECT subject, at FROM revocations WHERE until IS NULL OR until > ?", int(now))
        return dict(rows.fetchall())

    def _run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        with self._translate_errors():
            return self._db.execute(sql, values)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreFault(f"{self.path}: can't be used: {error}") from None


def _token(row: tuple[Any, ...]) -> TokenRecord:
    token_id, secret, namespace, networks, uses, used, ends, lifetime, revoked, take_over = row
    return TokenRecord(
        token_id, secret, namespace, tuple(networks.split()), uses, used, ends, lifetime, bool(revoked), bool(take_over)
    )


def _statements(script: str) -> list[str]:
    """Cut a script into statements, because `executescript` would commit the open transaction."""
    found, statement = [], ""
    for line in script.splitlines(keepends=True):
        statement += line
        if statement.strip() and sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return found


def _issued(row: tuple[Any, ...]) -> Issued:
    subject, key, ca, addresses, *rest = row
    return Issued(subject, key, ca, tuple(addresses.split()), *rest)
