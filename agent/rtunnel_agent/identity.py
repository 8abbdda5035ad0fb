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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from ssl import SSLContext
from typing import Final

import trio

from rtunnel.clock import CHECK_CLOCK, lasting, utc
from rtunnel.config import AgentConfig
from rtunnel.errors import TrustError
from rtunnel.logs import get_logger
from rtunnel.trust.files import SECRET, keep_trust_list
from rtunnel.trust.identity import (
    Identity,
    PrivateKey,
    TrustStore,
    load_pair,
    load_trust_store,
    void_cas,
)
from rtunnel.trust.keys import Token, load_token
from rtunnel.trust.tls import link_context
from rtunnel.watch import Watched, watch
from rtunnel.wire.refusal import Refused
from rtunnel_agent.addresses import OwnAddresses
from rtunnel_agent.enrolment import AgentIdentity, Ask, Enroller
from rtunnel_agent.schedule import Schedule
from rtunnel_agent.token import FIX, JoinToken

#: Seconds between two requests: the first pause doubles up to the longest, or to a tenth of the
#: certificate's remaining life.
FIRST_PAUSE: Final = 0.25
LONGEST_PAUSE: Final = 600.0
#: Seconds between two looks at the clock, which may be set, on a machine that may sleep.
LOOK_SECONDS: Final = 30.0


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


@dataclass(frozen=True, slots=True)
class LinkContexts:
    """The TLS of links to brokers; None where links are plain."""

    sessions: SSLContext | None = None
    enrolments: SSLContext | None = None  # they show no certificate


class Credentials:
    """Keeps the certificate, key and CAs of one agent current while `run` runs. In trio's thread.

    Links use `tls`, and proofs use `identity`.
    """

    def __init__(
        self,
        config: AgentConfig,
        agent_id: str,
        own: OwnAddresses,
        *,
        ask: Ask,
        put: Callable[[AgentIdentity], object],
    ) -> None:
        """Read the files. Raises TrustError.

        `ask`: as of `Enroller`. `put` gets each new identity, the first one now.
        """
        self.identity: AgentIdentity | None = None
        self.failure = ""  # why the last request failed; empty when it did not
        # when the last new certificate came, in seconds since 1970; 0: none since the start
        self.renewed = 0.0
        self.tls = LinkContexts()
        self._config = config
        self._agent_id = agent_id
        self._own = own
        self._on_put = put
        self._log = get_logger("agent").bind(agent=agent_id)
        self._directory = Path(config.identity) if config.identity else None
        self._pair = Path(config.certificate), Path(config.key)
        self._enroller: Enroller | None = None
        if self._directory is not None:
            self._pair = self._directory / "agent.pem", self._directory / "agent.key"
            self._enroller = Enroller(agent_id, config.namespace, self._directory, ask)
        present = load_token(config.join_token) if config.join_token else None
        self._token = JoinToken(present, self._directory, self._log)
        self._trust_store = load_trust_store(config.ca) if config.security == "tls" or config.identity else None
        self._schedule = Schedule()
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
        if self._token.revoke():
            self._tell()

    def accepted(self) -> None:
        """Hear that a broker has accepted the certificate."""
        self._token.accept()

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
            self._schedule.hurry(self.identity, time.time())
        self._tell()
        self._log.info("trust_loaded", number=self._trust_store.number, generation=self._trust_store.generation)

    def moved(self) -> None:
        """Hear that the wanted addresses have changed: a certificate that does not name them is
        replaced.
        """
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
            "renews": self._schedule.renew_at if who is not None and self._directory is not None else 0,
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
        if self._token.void:
            return "the certificate is revoked"
        if foreign := [address for address in self._own.wanted if address not in who.addresses]:
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
        missing = [address for address in self._own.wanted if address not in identity.who.addresses]
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
        self.identity = identity
        if self._enroller is not None:
            self._enroller.certified()
        self._on_put(identity)
        self._token.certified()
        self._schedule.begin(identity)

    def _make_contexts(self) -> None:
        if self._config.security == "plain" or self._trust_store is None:
            return
        cas, pair = self._trust_store.pem, self._pair if self.identity is not None else ("", "")
        self.tls = LinkContexts(link_context(cas, *pair), link_context(cas))

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # Files.

    def _open_directory(self, directory: Path) -> None:
        """Make the directory, or read its files. Raises TrustError."""
        _make(directory)
        assert self._trust_store is not None and self._enroller is not None
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
        if self._pair[0].exists():
            try:
                self._enroller.finish(self._pair)
                self._enroller.former = AgentIdentity(*load_pair(*self._pair))
                self._put(self._enroller.former)
            except TrustError as error:
                self._log.warning("identity_rejected", reason=str(error), hint="a new one is enrolled for")
        if self._token.present is None and (missing := self._fault()):
            raise TrustError(f"{directory}: {missing}, and agent.join_token is not given: {FIX}")

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
        self._token.put(token)
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
            pause = 0.0 if self._fault() else self._schedule.renew_at - time.time()
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
        enroller, trust_store, present = self._enroller, self._trust_store, self.identity
        assert enroller is not None and trust_store is not None
        if renewing:
            assert present is not None
            answer, key = await enroller.renew(self._own.wanted, present)
        else:
            answer, key = await enroller.enrol(self._own.wanted, self._token, present)
        if answer.trust:
            self.take(answer.trust)
        who = trust_store.verify(answer.certificate)
        if who.public_key != key.public_key():
            raise TrustError("the authority's certificate is for another key")
        identity = AgentIdentity(answer.certificate, key, who)
        self._check(identity)
        enroller.keep(identity, self._pair)
        self._put(identity)
        self._make_contexts()
        self.renewed = time.time()
        self._tell()
        self._log.info(
            "certificate_renewed" if renewing else "certificate_issued",
            ends=_day(who.ends),
            addresses=sorted(who.addresses),
        )

    async def _warn_in_time(self) -> None:
        """Log warnings about a certificate that ends or has ended, and has no successor."""
        schedule = self._schedule
        while True:
            identity, now = self.identity, time.time()
            if identity is not None and schedule.warns(now):
                ends, reason = identity.who.ends, self.failure or "it is not renewed by itself"
                if now < ends:
                    left = lasting(ends - now)
                    self._log.warning("certificate_not_renewed", ends=_day(ends), left=left, reason=reason)
                else:
                    hint = f"no broker takes it: give the agent a new one ({CHECK_CLOCK})"
                    self._log.error("certificate_expired", ends=_day(ends), reason=reason, hint=hint)
            await self.changed(min(max(schedule.warn_at - now, 1.0), LOOK_SECONDS))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
