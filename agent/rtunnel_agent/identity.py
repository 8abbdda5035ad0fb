"""The agent's identity: certificate, key, trusted CAs, enrolment and renewal. trio's side.

An agent that enrols has a directory of its own for its identity:

    agent.key, agent.pem   the key, which never leaves this host, and the certificate
    next.key               the key of a pending request; it stays the same until there is an answer,
                           so that a repeated request does not use the token up again
    trust.list             the newest trust list
    token.id               the id of the join token with which a broker accepted it last: after a
                           revocation only another token counts
    host.secret            a part of the host id (`host`)
    lock                   held by the agent's process: two would overwrite each other's keys
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from ssl import SSLContext
from typing import Final

import trio
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate
from msgspec.structs import replace as replace_fields
from structlog.typing import FilteringBoundLogger

from rtunnel.clock import CHECK_CLOCK, utc
from rtunnel.config import AgentConfig
from rtunnel.errors import TrustError
from rtunnel.trust.certificates import ENROL_LABEL, agent_request, key_pem, new_key, pem, sign_renewal
from rtunnel.trust.files import SECRET, keep_trust_list, replace
from rtunnel.trust.identity import (
    Identity,
    PrivateKey,
    TrustStore,
    load_pair,
    load_private_key,
    load_trust_store,
    void_cas,
)
from rtunnel.trust.keys import Token, load_token, token_mac
from rtunnel.trust.tls import link_context
from rtunnel.watch import Watched, watch
from rtunnel.wire.messages import VERSION, Enrol, Enrolled
from rtunnel.wire.refusal import Refusal, Refused

#: The part of its life after which a certificate is renewed, and the jitter: agents that were
#: started at the same time must not renew at the same time.
RENEW_AT: Final = 2 / 3
RENEW_JITTER: Final = 0.05
#: The part of its life after which a warning is logged.
WARN_AT: Final = 5 / 6
#: Seconds between two requests: the first pause doubles up to the longest, or to a tenth of the
#: certificate's remaining life.
FIRST_PAUSE: Final = 0.25
LONGEST_PAUSE: Final = 600.0
#: Seconds between two looks at the clock, which may be set, on a machine that may sleep.
LOOK_SECONDS: Final = 30.0

#: Seconds over which agents spread their renewals after the CAs have changed.
CA_SPREAD: Final = 600.0

_FIX: Final = "make one with `rtunnel pki token create`, and give it to the agent"

Ask = Callable[[Enrol], Awaitable[Enrolled]]


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """A certificate and its key."""

    certificate: bytes  # DER
    key: PrivateKey
    who: Identity


@contextmanager
def locked(identity: str) -> Iterator[None]:
    """Hold the lock of an identity directory, which no other process may have. "": no directory.

    Raises TrustError.
    """
    if not identity:
        yield
        return
    directory = Path(identity)
    _make(directory)
    lock = directory / "lock"
    try:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET)
    except OSError as error:
        raise TrustError(f"{lock}: can't be opened: {error.strerror}") from None
    try:
        _lock(file, directory)
        yield
    finally:
        os.close(file)


def _lock(file: int, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fix = "give this one a directory of its own (agent.identity), or stop the other one"
        raise TrustError(f"{directory}: another agent that runs has this identity: {fix}") from None
    except OSError as error:
        raise TrustError(f"{directory}: can't be locked: {error.strerror} (is it on a local disk?)") from None


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TrustError(f"{directory}: can't be made: {error.strerror}") from None


class Credentials:
    """Keeps the certificate, key and CAs of one agent current, while `run` runs. In trio's thread.

    `ask` sends a request to the authority; it raises Refused, or OSError with a text.
    """

    def __init__(
        self,
        config: AgentConfig,
        agent_id: str,
        addresses: Sequence[str],
        *,
        ask: Ask,
        put: Callable[[AgentIdentity], object],
        log: FilteringBoundLogger,
    ) -> None:
        """`put` gets each new identity, the first one now. Raises TrustError."""
        self.identity: AgentIdentity | None = None
        self.failure = ""  # why the last request failed; empty when it did not
        # when the last new certificate came, in seconds since 1970; 0: none since the start
        self.renewed = 0.0
        self.context: SSLContext | None = None  # of links
        self.anonymous: SSLContext | None = None  # of links that show no certificate
        self._config = config
        self._agent_id = agent_id
        self._addresses = tuple(addresses)
        self._ask = ask
        self._on_put = put
        self._log = log.bind(agent=agent_id)
        self._directory = Path(config.identity) if config.identity else None
        self._pair = Path(config.certificate), Path(config.key)
        if self._directory is not None:
            self._pair = self._directory / "agent.pem", self._directory / "agent.key"
        self._token = load_token(config.join_token) if config.join_token else None
        self._trust_store = load_trust_store(config.ca) if config.security == "tls" or config.identity else None
        self._renew_at = 0.0
        self._warned = False
        self._revoked = False  # a broker says that the certificate is revoked
        self._void = False  # and another token has come since then: the agent enrols anew
        self._old_token = ""  # the id of the token that does not count as another one
        # A certificate of this agent that lacks one of its addresses: beside a new token it proves
        # the agent_id.
        self._former: AgentIdentity | None = None
        self._proves_former = False  # the authority has asked for it
        self._changed = trio.Event()
        if self._directory is not None:
            self._open_directory(self._directory)
        elif config.certificate:
            self._put(AgentIdentity(*load_pair(*self._pair)))
        self._make_contexts()

    # Questions of the agent.

    @property
    def generation(self) -> int:
        """The generation of the trust list; 0 without one."""
        return self._trust_store.generation if self._trust_store is not None else 0

    @property
    def by_certificate(self) -> bool:
        """Whether sessions are proved by certificate instead of by the join token."""
        return self._config.security == "tls" and bool(self._config.identity or self._config.certificate)

    @property
    def missing(self) -> str:
        """Why the agent can have no session at present; empty when it can."""
        if not self.by_certificate or not (fault := self._fault()):
            return ""
        return f"{fault}; {self.failure}" if self.failure else fault

    def fault_of(self, certificate: bytes | None) -> str:
        """Return why a broker's certificate (DER) of a trusted CA is not good; empty when it is."""
        return self._trust_store.fault_of(certificate) if self._trust_store is not None else ""

    def revoked(self) -> None:
        """Hear that a broker calls the certificate revoked.

        Another token lets the agent enrol anew.
        """
        self._revoked = True
        # it came while the agent was down
        if self._token is not None and self._old_token not in ("", self._token.id):
            self._void = True
            self._tell()

    def accepted(self) -> None:
        """Hear that a broker has accepted the certificate."""
        if self._directory is None or self._token is None or self._token.id == self._old_token:
            return  # nothing to remember, or remembered already
        self._old_token = self._token.id
        try:
            replace(self._directory / "token.id", SECRET, self._old_token.encode())
        except TrustError as error:
            self._log.warning("token_id_not_kept", reason=str(error))

    def take(self, signed: bytes) -> None:
        """Take a trust list, from any source: its signatures count."""
        if self._trust_store is None:
            return  # this agent checks no certificates
        cas = self._trust_store.pem
        try:
            if not self._trust_store.take(signed):
                return
            self._make_contexts()
        except Exception as error:  # TrustError is expected; but no list may stop the agent
            self._log.error("trust_rejected", reason=str(error) or type(error).__name__)
            return
        if self._directory is not None:
            keep_trust_list(self._directory / "trust.list", SECRET, signed, self._log)
        if self._trust_store.pem != cas and self.identity is not None:
            life = self.identity.who.ends - self.identity.who.issued
            soon = random.uniform(0, min(CA_SPREAD, life / 6))  # noqa: S311
            self._renew_at = min(self._renew_at, time.time() + soon)
        self._tell()
        self._log.info("trust_loaded", number=self._trust_store.number, generation=self._trust_store.generation)

    def answer_for(self, addresses: Sequence[str]) -> None:
        """Answer for these addresses from now on: a certificate that does not name them is
        replaced.
        """
        self._addresses = tuple(addresses)
        self._tell()

    async def run(self) -> None:
        """Follow the files, renew the certificate and warn, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, self._files(), self._log)
            if self.identity is not None or self._directory is not None:
                nursery.start_soon(self._warn_in_time)
            if self._directory is not None:
                nursery.start_soon(self._keep_fresh)

    async def changed(self, patience: float) -> None:
        """Wait up to `patience` seconds for another certificate or other CAs."""
        with trio.move_on_after(patience):
            await self._changed.wait()

    def status(self) -> dict[str, object] | None:
        """Return what `/statusz` shows; None without a certificate."""
        if self.identity is None and not self.by_certificate:
            return None
        who = self.identity.who if self.identity is not None else None
        return {
            "subject": who.subject if who is not None else "",
            "ends": who.ends if who is not None else 0,
            "renews": self._renew_at if who is not None and self._directory is not None else 0,
            "renewed": self.renewed,
            "failure": self.failure,
            "fault": self._fault(),
            "trust": {"number": self._trust_store.number, "generation": self.generation}
            if self._trust_store is not None
            else None,
        }

    # The certificate.

    def _fault(self) -> str:
        """Return why the certificate can't be used; empty when it can."""
        if self.identity is None:
            return "there is no certificate yet"
        who, trust_store = self.identity.who, self._trust_store
        if time.time() >= who.ends:
            return f"the certificate has expired: it ended {utc(who.ends)} ({CHECK_CLOCK})"
        if self._void:
            return "the certificate is revoked"
        if foreign := [address for address in self._addresses if address not in who.addresses]:
            return f"the certificate does not name {foreign[0]}, which is this host's address now"
        if trust_store is None or trust_store.is_revoked(who):
            return ""  # the broker's refusal says more
        try:
            trust_store.verify(self.identity.certificate)
        except TrustError as error:
            return str(error)
        return ""

    def _check(self, identity: AgentIdentity) -> None:
        """Raise TrustError unless the certificate is this agent's, with all its addresses."""
        wanted = f"agent/{self._config.namespace}/{self._agent_id}"
        missing = [address for address in self._addresses if address not in identity.who.addresses]
        if identity.who.subject != wanted:
            raise TrustError(
                f"{self._pair[0]}: is the certificate of {identity.who.subject}, and this is {wanted} (agent.agent_id)"
            )
        if missing:
            has = ", ".join(sorted(identity.who.addresses))
            raise TrustError(
                f"{self._pair[0]}: has not the address {missing[0]} of this agent, but {has}: "
                "change agent.addresses, or have another certificate made"
            )

    def _put(self, identity: AgentIdentity) -> None:
        self._check(identity)
        self.identity, self._former, self._proves_former = identity, None, False
        self._on_put(identity)
        self._warned = self._revoked = self._void = False
        life = identity.who.ends - identity.who.issued
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311
        self._renew_at = identity.who.issued + life * share

    def _make_contexts(self) -> None:
        if self._config.security == "plain" or self._trust_store is None:
            return
        cas, pair = self._trust_store.pem, self._pair if self.identity is not None else ("", "")
        self.anonymous, self.context = link_context(cas), link_context(cas, *pair)

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # Files.

    def _open_directory(self, directory: Path) -> None:
        """Make the directory, or read its files. Raises TrustError."""
        _make(directory)
        assert self._trust_store is not None
        trust = directory / "trust.list"
        if trust.exists():
            try:
                self._trust_store.take(data := trust.read_bytes())
            except TrustError as error:
                # It was good when it was written: the stolen CAs that it names stay void.
                self._trust_store.must_not_be(void_cas(data), self._config.ca)
                self._log.warning("trust_rejected", file=str(trust), reason=str(error))
            except OSError as error:
                self._log.warning("trust_rejected", file=str(trust), reason=str(error))
        with suppress(OSError, ValueError):
            self._old_token = (directory / "token.id").read_text()
        if self._pair[0].exists():
            try:
                self._finish_exchange(directory)
                self._former = AgentIdentity(*load_pair(*self._pair))
                self._put(self._former)
            except TrustError as error:
                self._log.warning("identity_rejected", reason=str(error), hint="a new one is enrolled for")
        if self._token is None and (missing := self._fault()):
            raise TrustError(f"{directory}: {missing}, and agent.join_token is not given: {_FIX}")

    def _finish_exchange(self, directory: Path) -> None:
        """Finish an exchange that ended between its two files: the certificate is that of
        `next.key`.
        """
        pending = directory / "next.key"
        if pending.exists() and not _fits(*self._pair) and _fits(self._pair[0], pending):
            pending.rename(self._pair[1])

    def _files(self) -> list[Watched]:
        files: list[Watched] = []
        if self._trust_store is not None:
            files.append(
                Watched("ca", [Path(self._config.ca)], lambda: load_trust_store(self._config.ca), self._put_cas)
            )
        if self._directory is not None and self._config.join_token:
            token = Path(self._config.join_token)
            files.append(Watched("join_token", [token], lambda: load_token(token), self._put_token))
        if self._config.certificate:
            files.append(Watched("certificate", self._pair, lambda: load_pair(*self._pair), self._put_pair))
        return files

    async def _put_cas(self, fresh: TrustStore) -> dict[str, object]:
        """Apply a changed CA file."""
        assert self._trust_store is not None
        self._trust_store.begin_again(fresh.pem.encode())
        self._make_contexts()
        self._tell()
        return {"number": self._trust_store.number}

    async def _put_token(self, token: Token) -> dict[str, object]:
        self._token = token
        self._void = self._revoked
        if not self._revoked:
            self.accepted()
        self._tell()
        return {"id": token.id}

    async def _put_pair(self, pair: tuple[bytes, PrivateKey, Identity]) -> dict[str, object]:
        self._put(AgentIdentity(*pair))
        self._make_contexts()
        self._tell()
        self.renewed = time.time()
        return {"ends": _day(pair[2].ends)}

    # Enrolling and renewing.

    async def _keep_fresh(self) -> None:
        failures = 0
        while True:
            pause = 0.0 if self._fault() else self._renew_at - time.time()
            if pause > 0:
                failures = 0
                await self.changed(min(pause, LOOK_SECONDS))
            elif not await self._get():
                failures += 1
                left = self.identity.who.ends - time.time() if self.identity is not None else 0.0
                cap = max(self._config.backoff_cap, min(LONGEST_PAUSE, left / 10))
                pause = random.uniform(0.5, 1.0) * min(cap, FIRST_PAUSE * 2.0 ** min(failures, 16))  # noqa: S311
                await self.changed(pause)

    async def _get(self) -> bool:
        """Ask once, by the certificate while it is good, else by the token.

        Return whether a certificate came.
        """
        renewing = self.identity is not None and not self._fault()
        try:
            await self._exchange(renewing)
        except Exception as error:  # after any answer the agent tries again
            known = isinstance(error, TrustError | OSError)
            kind = "" if known else f"{error.code if isinstance(error, Refused) else type(error).__name__}: "
            failure = kind + str(error)
            if failure != self.failure:
                event = "renewal_failed" if renewing else "enrolment_failed"
                ends = _day(self.identity.who.ends) if self.identity is not None else ""
                self._log.warning(event, reason=failure, certificate_ends=ends)
            self.failure = failure
            return False
        self.failure = ""
        return True

    async def _exchange(self, renewing: bool) -> None:
        assert self._directory is not None and self._trust_store is not None
        pending = self._directory / "next.key"
        key = _pending_key(pending)
        try:
            answer = await self._ask(self._request(key, renewing))
        except Refused as error:
            if error.code is Refusal.REVOKED and not renewing:
                # The key was certified, the answer was lost, and then the key was revoked: no token
                # can renew it.
                pending.unlink(missing_ok=True)
            self._proves_former = error.code is Refusal.AGENT_ID_TAKEN
            raise
        if answer.trust:
            self.take(answer.trust)
        who = self._trust_store.verify(answer.certificate)
        if who.public_key != key.public_key():
            raise TrustError("the authority's certificate is for another key")
        identity = AgentIdentity(answer.certificate, key, who)
        self._check(identity)
        # The certificate first: after a crash between the two, `_finish_exchange` finds the key.
        replace(self._pair[0], SECRET, pem(load_der_x509_certificate(answer.certificate)))
        pending.rename(self._pair[1])
        self._put(identity)
        self._make_contexts()
        self.renewed = time.time()
        self._tell()
        self._log.info(
            "certificate_renewed" if renewing else "certificate_issued",
            ends=_day(who.ends),
            addresses=sorted(who.addresses),
        )

    def _request(self, key: PrivateKey, renewing: bool) -> Enrol:
        names = agent_request(key, self._agent_id, self._config.namespace, self._addresses)
        request = names.public_bytes(Encoding.DER)
        if renewing:
            assert self.identity is not None
            signature = sign_renewal(self.identity.key, request)
            return Enrol(VERSION, request, certificate=self.identity.certificate, signature=signature)
        if self._token is None:
            raise TrustError(f"agent.join_token is not given: {_FIX}")
        if self._revoked and not self._void:
            raise TrustError("the certificate was revoked: agent.join_token needs another token")
        enrol = Enrol(VERSION, request, self._token.id, token_mac(self._token.secret, ENROL_LABEL, request))
        former = self.identity or self._former
        if former is None or not self._proves_former:
            return enrol
        # The first request is without it: an authority of an older version would take it for a
        # renewal.
        signature = sign_renewal(former.key, request)
        return replace_fields(enrol, certificate=former.certificate, signature=signature)

    async def _warn_in_time(self) -> None:
        """Log one warning for each certificate of which WARN_AT is over and that has
        no successor.
        """
        while True:
            identity = self.identity
            warn_at = 0.0
            if identity is not None:
                warn_at = identity.who.issued + WARN_AT * (identity.who.ends - identity.who.issued)
                if time.time() >= warn_at and not self._warned:
                    self._warned = True
                    reason = self.failure or "it is not renewed by itself"
                    self._log.warning("certificate_not_renewed", ends=_day(identity.who.ends), reason=reason)
            await self.changed(min(max(warn_at - time.time(), 1.0), LOOK_SECONDS))


def _pending_key(path: Path) -> PrivateKey:
    """Return the key of the pending request, or a new one. Raises TrustError."""
    if path.exists():
        try:
            return load_private_key(path)
        except TrustError:
            pass  # a damaged one can be replaced: no certificate is for it
    key = new_key()
    replace(path, SECRET, key_pem(key))
    return key


def _fits(certificate: Path, key: Path) -> bool:
    try:
        load_pair(certificate, key)
    except TrustError:
        return False
    return True


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
