"""Access: users, logins, and the rules in force, which change while the gateway runs.

The relay's thread asks, and worker threads hash passwords, which takes 0.15 s of a core: few at a
time, for a short queue that no source can fill alone. Each answer is remembered for a minute under
a keyed digest, so that no password is kept; also for a wrong password, so that a client that
repeats it costs nothing.

Both files are watched. A changed file that is good is in force at once, also for open streams
(`changed`). A bad one changes nothing, and is reported in the log and in `/statusz`.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import trio
from structlog.typing import FilteringBoundLogger

from rtunnel.bridge import Bridge
from rtunnel.config import GatewayConfig
from rtunnel.trust.policy import LOCAL_ONLY, Networks, Policy, Question, Verdict, load_policy
from rtunnel.trust.users import Hash, Users, load_users
from rtunnel.watch import Watched, watch
from rtunnel.wire.refusal import Refusal, Refused

#: Seconds after which a password is checked again, and the number of remembered answers.
REMEMBER_SECONDS: Final = 60.0
MAX_REMEMBERED: Final = 4096
#: Different passwords that wait to be checked: some seconds of work; and of one source.
MAX_WAITING: Final = 64
MAX_WAITING_OF_SOURCE: Final = 8
#: Checks at once. Half of the cores stay free for streams while passwords are guessed.
CHECKS: Final = max(1, (os.cpu_count() or 1) // 2)

#: The verdict for a user whose line was removed, or has another password now.
NO_USER: Final = Verdict(False, 0, "users")


class Asker(Protocol):
    """A client that logs in."""

    over: bool

    @property
    def peer(self) -> str:
        """The IP of the client."""

    def logged_in(self, name: str, entry: Hash | Refused) -> None:
        """Take the answer: the user's hash, which fits the password, or the refusal."""


@dataclass(eq=False, slots=True)
class _Check:
    """One password that is being checked, and the clients that wait for the answer."""

    name: str
    password: str = field(repr=False)
    source: str
    waiting: list[Asker]

    @property
    def wanted(self) -> bool:
        """Whether a client still waits."""
        return not all(asker.over for asker in self.waiting)

    def run(self, users: Users | None) -> bool | None:
        """Return whether the password fits; None, without work, when no client waits.

        In a worker thread.
        """
        return users.check(self.name, self.password) if users is not None and self.wanted else None


class Access:
    """The rules and users of one gateway.

    Made in trio's thread; `watch` runs there, all else in the relay's.
    """

    def __init__(
        self, config: GatewayConfig, bridge: Bridge, log: FilteringBoundLogger, changed: Callable[[], None]
    ) -> None:
        """`changed` is called in the relay's thread, after every change. Raises TrustError."""
        self.version = 0  # grows with every change
        self._bridge = bridge
        self._relay = bridge.relay
        self._log = log
        self._changed = changed
        self._files: list[Watched] = []
        self.policy = LOCAL_ONLY
        self.users: Users | None = None
        if config.policy:
            self.policy = self._watched("policy", config.policy, load_policy, self._put_policy)
        if config.users:
            self.users = self._watched("users", config.users, load_users, self._put_users)
        self._no_auth = Networks(config.no_auth)
        self._key = secrets.token_bytes(32)
        self._remembered: dict[bytes, tuple[Hash | None, float]] = {}
        self._checks: dict[bytes, _Check] = {}
        self._limiter = trio.CapacityLimiter(CHECKS)

    # Users.

    def anonymous(self, peer: str) -> bool:
        """Return whether a client of this IP need not log in."""
        return self.users is None or peer in self._no_auth

    def login(self, asker: Asker, name: str, password: str) -> None:
        """Check a password, and call `asker.logged_in`, now or later.

        Raises Refused when too many wait.
        """
        digest = hmac.digest(self._key, f"{name}\0{password}".encode(), "sha256")
        entry, until = self._remembered.get(digest, (None, 0.0))
        if until > self._relay.loop.now:
            asker.logged_in(name, entry or Refused(Refusal.BAD_CREDENTIALS))
        elif check := self._checks.get(digest):
            check.waiting.append(asker)
        else:
            self._bound(asker.peer)
            check = self._checks[digest] = _Check(name, password, asker.peer, [asker])
            self._bridge.spawn(self._run_check, digest, check)

    def known(self, name: str) -> bool:
        """Return whether there is such a user.

        Other names are never logged: one may be a password by mistake.
        """
        return self.users is not None and name in self.users.hashes

    def _bound(self, peer: str) -> None:
        of_source = sum(check.source == peer for check in self._checks.values())
        if len(self._checks) >= MAX_WAITING or of_source >= MAX_WAITING_OF_SOURCE:
            raise Refused(Refusal.OVERLOADED, "too many passwords wait to be checked")

    async def _run_check(self, digest: bytes, check: _Check) -> None:
        users = self.users
        try:
            fits = await trio.to_thread.run_sync(check.run, users, limiter=self._limiter)
        except Exception as error:  # no memory or no thread: the next check may have them
            self._log.error("password_check_failed", reason=f"{type(error).__name__}: {error}")
            self._relay.call(lambda: self._done(digest, check, None, Refusal.INTERNAL))
        else:
            self._relay.call(lambda: self._answer(digest, check, users, fits))

    def _answer(self, digest: bytes, check: _Check, users: Users | None, fits: bool | None) -> None:
        if check.wanted and (fits is None or users is not self.users):
            # A client joined after the others had gone, or the file has changed since the check
            # began.
            self._bridge.spawn(self._run_check, digest, check)
            return
        entry = users.hashes[check.name] if fits and users is not None else None
        if fits is not None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[digest] = entry, self._relay.loop.now + REMEMBER_SECONDS
        self._done(digest, check, entry, Refusal.BAD_CREDENTIALS)

    def _done(self, digest: bytes, check: _Check, entry: Hash | None, otherwise: Refusal) -> None:
        del self._checks[digest]
        for asker in check.waiting:
            asker.logged_in(check.name, entry or Refused(otherwise))

    # Rules.

    def judge(self, question: Question, entry: Hash | None) -> Verdict:
        """Return the verdict of the rules in force. A user needs the `entry` that is
        in force, too.
        """
        if question.user is not None and not self._stands(question.user, entry):
            return NO_USER
        return self.policy.verdict(question)

    def _stands(self, name: str, entry: Hash | None) -> bool:
        return self.users is not None and entry is not None and self.users.hashes.get(name) == entry

    # Files that change.

    def _watched(self, what: str, file: str, load: Callable[[Path], Any], put: Callable[[Any], int]) -> Any:
        path = Path(file)

        async def in_force(loaded: Any) -> dict[str, object]:
            return {"count": await self._bridge.run(lambda: self._put(put, loaded))}

        self._files.append(Watched(what, [path], lambda: load(path), in_force))
        return load(path)

    async def watch(self) -> None:
        """Read changed files, until cancelled."""
        await watch(self._files, self._log)

    def _put(self, put: Callable[[Any], int], loaded: Any) -> int:
        count = put(loaded)
        self.version += 1
        self._changed()
        return count

    def _put_policy(self, policy: Policy) -> int:
        self.policy = policy
        return len(policy.rules)

    def _put_users(self, users: Users) -> int:
        self.users = users
        self._remembered.clear()
        return len(users.hashes)

    def status(self) -> dict[str, object]:
        """Return what `/statusz` shows."""
        return {
            "rules": len(self.policy.rules),
            "users": None if self.users is None else len(self.users.hashes),
            "passwords_waiting": len(self._checks),
            "rejected": {file.what: file.rejected for file in self._files if file.rejected},
        }
