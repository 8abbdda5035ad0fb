"""The cluster's directory: the CAs, their keys, the authority's store, and what they issue.

`init` makes a directory. `Directory` is an existing one: it issues, revokes, and hands over from
one CA to the next. Every change of the CAs or the revocations makes a new trust list in the same
transaction.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from rtunnel.errors import TrustError
from rtunnel.trust import keys
from rtunnel.trust.certificates import DAY, Ca, Term, key_hash, key_pem, new_ca, new_key, pem
from rtunnel.trust.files import PUBLIC, SECRET, Made, replace, write_new
from rtunnel.trust.identity import (
    MAX_SIGNATURES,
    PublicKey,
    TrustList,
    TrustStore,
    ca_id,
    load_private_key,
    read_certificate,
    sign_list,
)
from rtunnel.trust.store import FILE, CaRecord, Issued, Store
from rtunnel.wire.messages import MAX_CERTIFICATE

CA_FILE: Final = "ca.pem"
BROKER_DAYS: Final = 365
# Roles of CAs in force, in the order of a list: the one that issues comes first.
_IN_FORCE: Final = ("issuing", "next", "old")
#: Lifetime of a certificate that is issued by hand; one from enrolment has the token's lifetime.
AGENT_DAYS: Final = 90


class KeyRevoked(TrustError):
    """A certificate for this key was revoked, so that the key gets no other certificate."""


class AddressHeld(TrustError):
    """An address is certified for another agent; the text says which, and what to do."""


def init(directory: Path, *, names: Sequence[str] = (), ips: Sequence[str] = ()) -> list[Made]:
    """Make everything that a new cluster needs, or nothing, and return what was written.

    `names` and `ips` go into the broker's certificate. Raises TrustError; never overwrites a file.
    """
    now = time.time()
    ca = new_ca(1, now)
    key = new_key()
    broker = ca.certify_broker(key.public_key(), "broker", names, ips, Term(now, BROKER_DAYS * DAY))
    cluster_key = keys.new_cluster_key()
    return write_new(
        directory,
        [
            (CA_FILE, PUBLIC, pem(ca.certificate), f"CA, for everybody; valid until {_until(ca.certificate)}"),
            ("ca.key", SECRET, key_pem(ca.key), "the CA's key: for the authority only"),
            (FILE, SECRET, _first_store(ca, broker), "tokens, certificates, revocations: for the authority only"),
            ("broker.pem", PUBLIC, pem(broker), f"broker certificate; valid until {_until(broker)}"),
            ("broker.key", SECRET, key_pem(key), "its key, for brokers"),
            ("cluster.key", SECRET, _text(keys.cluster_key_line(cluster_key)), "for brokers: makes gateways' keys"),
            _gateway_file("gateway", cluster_key),
            ("join.token", SECRET, _text(keys.new_token().line()), "shared token, for trying out without an authority"),
        ],
    )  # fmt: skip


def _first_store(ca: Ca, broker: x509.Certificate) -> bytes:
    """Return the bytes of a new store, so that its file can be written as a whole."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / FILE
        store = Store.create(path)
        record = CaRecord(1, "issuing", _der(ca.certificate), "ca.key")
        with store.change():
            store.put_ca(record)
            _record(store, broker, record.number)
            _publish(store, [record], [ca], time.time(), for_agents=True)
        store.close()
        return path.read_bytes()


def issue_broker(
    directory: Path,
    name: str,
    *,
    names: Sequence[str] = (),
    ips: Sequence[str] = (),
    key: PublicKey | None = None,
    into: Path | None = None,
) -> list[Made]:
    """Write a broker's certificate and key as `name`.pem and `name`.key, in `directory` or `into`.

    Also renews one. With `key` the certificate is for that key, and only `name`.pem is written.
    Raises TrustError; never overwrites a file.
    """
    with open_directory(directory) as opened, opened.change():
        return _issue_pair(
            into or directory, name, key, "broker", lambda k: opened.issue_broker(name, k, names=names, ips=ips)
        )


def issue_agent(
    directory: Path,
    name: str,
    *,
    agent_id: str,
    namespace: str,
    addresses: Sequence[str],
    days: float = AGENT_DAYS,
    key: PublicKey | None = None,
    into: Path | None = None,
    take_over: bool = False,
) -> list[Made]:
    """Write an agent's certificate and key as `name`.pem and `name`.key, in `directory` or `into`.

    With `key` the certificate is for that key, and only `name`.pem is written. Raises TrustError
    (AddressHeld unless `take_over`); never overwrites a file.
    """
    with open_directory(directory) as opened, opened.change():
        return _issue_pair(
            into or directory, name, key, "agent",
            lambda k: opened.issue_agent(
                agent_id, k, namespace=namespace, addresses=addresses, seconds=days * DAY, take_over=take_over
            ),
        )  # fmt: skip


def issue_gateway(directory: Path, name: str) -> list[Made]:
    """Write a gateway's key as `name`.key, derived from the newest cluster key. Also renews one.

    The id is the name and a random part, so that a revoked key never comes back. Raises TrustError;
    never overwrites a file.
    """
    check_file_name(name)
    return write_new(directory, [_gateway_file(name, keys.load_cluster_keys(directory / "cluster.key")[0])])


def _gateway_file(name: str, cluster_key: bytes) -> tuple[str, int, bytes, str]:
    try:
        key = keys.gateway_key(cluster_key, f"{name}-{token_hex(2)}")
    except ValueError as error:
        raise TrustError(str(error)) from None
    return f"{name}.key", SECRET, _text(key.line()), f"for one gateway: authenticates its Dials; its id is {key.id}"


def _issue_pair(
    directory: Path, name: str, key: PublicKey | None, kind: str, issue: Callable[[PublicKey], x509.Certificate]
) -> list[Made]:
    check_file_name(name)
    private = None if key is not None else new_key()
    public = key if private is None else private.public_key()
    assert public is not None
    certificate = issue(public)
    files = [(f"{name}.pem", PUBLIC, pem(certificate), f"{kind} certificate; valid until {_until(certificate)}")]
    if private is not None:
        files.append((f"{name}.key", SECRET, key_pem(private), f"its key, for the {kind}"))
    return write_new(directory, files)


def check_file_name(name: str) -> None:
    """Raise TrustError unless `name` can be the name of a file, without a folder."""
    if not name or "/" in name or name.startswith("."):
        raise TrustError(f"{name!r} can't be a file's name: use one without '/' that does not begin with '.'")


# --- an existing directory ------------------------------------------------------------------------


class Directory:
    """The CAs with their keys, and the store. One thread at a time may use it.

    Other processes may change the files: values here are of the last `refresh` or `change`. Every
    method raises TrustError.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self.now = now
        self.store = Store(path / FILE)
        self.cas: list[CaRecord] = []
        self.number = 0
        self.generation = 0
        self.signed = b""  # the trust list in force
        self.trust_store: TrustStore
        self._signers: dict[int, Ca] = {}
        self._version = -1
        try:
            self.refresh()
        except TrustError:
            self.close()
            raise

    def close(self) -> None:
        """Close the store, which must not be used any more."""
        self.store.close()

    def refresh(self) -> None:
        """Load what other processes have changed."""
        version = self.store.version()
        if version != self._version:
            self._load()
            self._version = version

    def _load(self) -> None:
        self.cas = self.store.cas()
        self._signers = {}
        for record in self.cas:
            path = self.path / record.key_file
            if record.role in _IN_FORCE or path.exists():
                self._signers[record.number] = _load_ca(record, path)
        self.number, self.generation, self.signed = self.store.trust_list()
        self.trust_store = TrustStore(self.pem)
        self.trust_store.take(self.signed)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Run the block, which may change the store, in one transaction."""
        with self.store.change():
            try:
                self.refresh()
                yield
            except BaseException:
                self._version = -1  # what was loaded may have been rolled back
                raise

    def ca(self, role: str) -> CaRecord | None:
        """Return the CA with this role, or None."""
        return next((record for record in self.cas if record.role == role), None)

    @property
    def issuing(self) -> Ca:
        """The CA that issues certificates."""
        return self._signers[self._issuing.number]

    @property
    def _issuing(self) -> CaRecord:
        record = self.ca("issuing")
        if record is None:
            raise TrustError(f"{self.store.path}: is damaged: no CA issues; restore it from a backup")
        return record

    @property
    def pem(self) -> bytes:
        """The CAs in force as PEM text, the one that issues first."""
        return b"".join(pem(x509.load_der_x509_certificate(record.certificate)) for record in _in_force(self.cas))

    # Certificates. These methods must run inside `change`.

    def issue_agent(
        self,
        agent_id: str,
        key: PublicKey,
        *,
        namespace: str,
        addresses: Sequence[str],
        seconds: float,
        token: str = "",
        remember: int = 0,
        take_over: bool = False,
    ) -> x509.Certificate:
        """Return a new agent certificate, issued for a `token` or by hand ("").

        The record is kept until `remember` (seconds since 1970) at least. `seconds`: the lifetime.
        `take_over`: accept addresses that are certified for another agent. Raises KeyRevoked,
        AddressHeld.
        """
        if not take_over:
            self.check_addresses(f"agent/{namespace}/{agent_id}", namespace, addresses)
        issued = self._issue_time(f"agent/{namespace}/{agent_id}", key)
        made = self.issuing.certify_agent(key, agent_id, namespace, addresses, Term(issued, seconds))
        if len(_der(made)) > MAX_CERTIFICATE:
            size = len(_der(made))
            raise TrustError(f"the certificate would have {size} bytes, over {MAX_CERTIFICATE}: use fewer addresses")
        _record(self.store, made, self._issuing.number, token, remember)
        self.store.put_holder(f"agent/{namespace}/{agent_id}", namespace, addresses)
        self.store.forget(self.now())
        return made

    def in_force(self, subject: str) -> list[Issued]:
        """Return the subject's valid certificates: not expired or revoked, and of a CA in force."""
        now, at = self.now(), self.store.revoked_at(subject)
        good = {record.number for record in _in_force(self.cas)}
        items = self.store.issued_to(subject)
        return [item for item in items if item.ends > now and item.issued > at and item.ca in good]

    def held_by_others(self, subject: str, namespace: str, addresses: Sequence[str]) -> dict[str, Issued]:
        """Return the addresses that another agent holds, each with its certificate in force."""
        held: dict[str, Issued] = {}
        for address in addresses:
            holder = self.store.holder(namespace, address)
            if holder not in ("", subject):
                items = [item for item in self.in_force(holder) if address in item.addresses]
                if items:
                    held[address] = max(items, key=lambda item: item.ends)
        return held

    def check_addresses(self, subject: str, namespace: str, addresses: Sequence[str]) -> None:
        """Raise AddressHeld when one of the addresses is certified for another agent.

        May run outside `change`.
        """
        for address, item in self.held_by_others(subject, namespace, addresses).items():
            raise AddressHeld(
                f"{address} is certified for {item.subject} until {utc(item.ends)}: if it has moved for good, revoke "
                f"that agent (rtunnel pki revoke {item.subject}) or use --take-over "
                "(rtunnel pki token create, rtunnel pki issue agent)"
            )

    def issue_broker(self, name: str, key: PublicKey, *, names: Sequence[str], ips: Sequence[str]) -> x509.Certificate:
        """Return a new broker certificate. Raises KeyRevoked."""
        issued = self._issue_time(f"broker/{name}", key)
        made = self.issuing.certify_broker(key, name, names, ips, Term(issued, BROKER_DAYS * DAY))
        _record(self.store, made, self._issuing.number)
        return made

    def check_key(self, key: PublicKey) -> None:
        """Raise KeyRevoked when a certificate for this key was revoked.

        May run outside `change`.
        """
        for item in self.store.issued_for(key_hash(key)):
            if item.issued <= self.store.revoked_at(item.subject):
                raise KeyRevoked(f"this key's certificate for {item.subject} is revoked: make another key")

    def _issue_time(self, subject: str, key: PublicKey) -> int:
        self.check_key(key)
        # A certificate of the second of the revocation counts as issued before it.
        return max(int(self.now()), self.store.revoked_at(subject) + 1)

    # Revocations. These methods must run inside `change`.

    def revoke(self, subject: str, *, force: bool = False) -> list[Issued]:
        """Revoke all certificates that were issued to the subject until now, and return them.

        Raises TrustError when none is known, unless `force`: then the revocation stays on the list
        for ever. The revocation of a gateway's key stays for ever too, because keys do not expire.
        """
        now = int(self.now())
        known = self.store.issued_to(subject)
        void = [item for item in known if item.ends > now and item.issued > self.store.revoked_at(subject)]
        if not (void or force or subject.startswith("gateway/")):
            raise TrustError(f"no valid certificate was issued to {subject}: see `rtunnel pki list`")
        until = max(item.ends for item in void) if void else None
        self.store.revoke(subject, max([now, *(item.issued for item in known)]), until)
        self.publish(for_agents=subject.startswith("broker/"))
        return void

    # The steps from one CA to the next. These methods must run inside `change`.

    def start_rotation(self) -> None:
        """Put a new CA in force beside the present one, which goes on issuing certificates."""
        if self.ca("next") is not None:
            raise TrustError("a rotation has been started already: continue with `rtunnel pki rotate switch`")
        if self.ca("old") is not None:
            raise TrustError("the last rotation is not complete: continue with `rtunnel pki rotate finish`")
        self._check_room(len(self._signers) + 1)
        number = max(record.number for record in self.cas) + 1
        ca = new_ca(number, self.now())
        key_file = f"ca-{number}.key"
        # An existing file was left by a start that failed: its key was never in force.
        replace(self.path / key_file, SECRET, key_pem(ca.key))
        self.store.put_ca(CaRecord(number, "next", _der(ca.certificate), key_file))
        self._handed_over()

    def _check_room(self, signers: int) -> None:
        """Raise TrustError when a list would have more signatures than a receiver accepts."""
        if signers > MAX_SIGNATURES:
            past = [r.key_file for r in self.cas if r.role not in _IN_FORCE and r.number in self._signers]
            raise TrustError(
                f"{self.path}: there would be {signers} CAs with a key, and a trust list has room for {MAX_SIGNATURES} "
                f"signatures: delete key files of CAs that no process starts with any more ({', '.join(past)})"
            )

    def switch_rotation(self) -> None:
        """Let the new CA issue certificates. The old one stays in force."""
        coming = self.ca("next")
        if coming is None:
            reason = (
                "is not complete: continue with `rtunnel pki rotate finish`"
                if self.ca("old")
                else "was not started: begin with `rtunnel pki rotate start`"
            )
            raise TrustError(f"the rotation {reason}")
        self._give_role(self._issuing, "old")
        self._give_role(coming, "issuing")
        self._handed_over()

    def waiting(self) -> list[Issued]:
        """Return certificates of the old CA whose holders have none of the new one."""
        old = self.ca("old")
        if old is None:
            return []
        items = self.store.issued(self.now())
        renewed = {item.subject for item in items if item.ca != old.number}
        left = [item for item in items if item.ca == old.number and item.subject not in renewed]
        return [item for item in left if item.issued > self.store.revoked_at(item.subject)]

    def finish_rotation(self, *, force: bool = False, stolen: bool = False) -> None:
        """Retire the old CA. Raises TrustError while a certificate depends on it.

        `force`: retire it all the same. `stolen`: the old CA and all retired ones become void,
        sessions accepted by their certificates end, and all join tokens are revoked.
        """
        leaving = [record for record in self.cas if record.role == "old" or (stolen and record.role == "retired")]
        if not leaving:
            step = (
                "continue with `rtunnel pki rotate switch`"
                if self.ca("next")
                else "begin with `rtunnel pki rotate start`"
            )
            raise TrustError(f"there is no rotation to finish: {step}")
        if (left := self.waiting()) and not force and not stolen:
            some = ", ".join(sorted(item.subject for item in left)[:5]) + (", ..." if len(left) > 5 else "")
            raise TrustError(
                f"certificates of the old CA are in use, {len(left)} of them ({some}): wait until they are renewed "
                "(brokers: `rtunnel pki issue broker`), revoke those of removed hosts, or use --force"
            )
        for record in leaving:
            self._give_role(record, "void" if stolen else "retired")
        if stolen:  # a thief of the key may have the store, and the secrets of tokens in it
            for token in self.store.tokens():
                self.store.revoke_token(token.id)
        self._handed_over()

    def _give_role(self, record: CaRecord, role: str) -> None:
        self.store.put_ca(CaRecord(record.number, role, record.certificate, record.key_file))

    def _handed_over(self) -> None:
        self._load()
        self.publish(for_agents=True)
        replace(self.path / CA_FILE, PUBLIC, self.pem)

    def publish(self, *, for_agents: bool = False) -> None:
        """Make a new trust list of the store's state. Must run inside `change`.

        `for_agents`: the list has something that agents must know.
        """
        self._check_room(len(self._signers))
        _publish(self.store, self.cas, list(self._signers.values()), self.now(), for_agents=for_agents)
        self._load()


@contextmanager
def open_directory(path: Path) -> Iterator[Directory]:
    """Open a directory of `init` for one block. Raises TrustError."""
    directory = Directory(path)
    try:
        yield directory
    finally:
        directory.close()


def _publish(store: Store, cas: Sequence[CaRecord], signers: Sequence[Ca], now: float, *, for_agents: bool) -> None:
    number, generation, _ = store.trust_list()
    # The number is at least the time, so that after the store was restored from a backup the next
    # list is still newer than every list before it.
    number = max(number + 1, int(now))
    content = TrustList(
        number=number,
        generation=number if for_agents else generation,
        cas=[record.certificate for record in _in_force(cas)],
        revoked=store.revocations(now),
        void=[ca_id(x509.load_der_x509_certificate(record.certificate)) for record in cas if record.role == "void"],
    )
    # Retired CAs sign too, so that a process that missed a rotation, or starts with an older CA
    # file, accepts the list.
    store.put_trust_list(number, content.generation, sign_list(content, [(ca.certificate, ca.key) for ca in signers]))


def _in_force(cas: Sequence[CaRecord]) -> list[CaRecord]:
    return sorted((r for r in cas if r.role in _IN_FORCE), key=lambda record: _IN_FORCE.index(record.role))


def _record(store: Store, made: x509.Certificate, ca: int, token: str = "", remember: int = 0) -> None:
    who = read_certificate(_der(made))
    ends = int(who.ends)
    addresses = tuple(sorted(who.addresses))
    key = key_hash(who.public_key)
    store.record(Issued(who.subject, key, ca, addresses, token, int(who.issued), ends, max(ends, remember)))


def _load_ca(record: CaRecord, path: Path) -> Ca:
    certificate = x509.load_der_x509_certificate(record.certificate)
    key = load_private_key(path)
    if key.public_key() != certificate.public_key():
        raise TrustError(f"{path}: is not the key of CA {record.number}: restore it from a backup")
    return Ca(certificate, key)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _until(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.strftime("%Y-%m-%d")


def utc(seconds: float) -> str:
    """Return a time (seconds since 1970) as text in UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _text(line: str) -> bytes:
    return f"{line}\n".encode()
