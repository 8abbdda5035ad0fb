"""The request of a client, and the log line of its stream or refusal. In the relay's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from rtunnel.config import format_endpoint
from rtunnel.counts import StreamCounts, StreamPermit
from rtunnel.histogram import Histogram, Histograms
from rtunnel.relay.join import Account, Ending
from rtunnel.relay.relay import Relay
from rtunnel.trust.policy import Question
from rtunnel.trust.users import Hash
from rtunnel_socks.access import Access
from rtunnel_socks.dial import ACCEPTED, Paths, Reached, Target, Tried
from rtunnel_socks.limits import Limits, Permit
from rtunnel_socks.trust import GatewayTrust


def told(tried: Sequence[Tried]) -> list[dict[str, object]]:
    """Return attempts as a log line has them."""
    return [msgspec.to_builtins(attempt) for attempt in tried]


class Auditor(Protocol):
    """The gateway, as `Asked` and `Joined` see it."""

    relay: Relay
    paths: Paths
    access: Access
    limits: Limits
    namespace: str
    trust: GatewayTrust
    setup_times: Histograms[str]  # seconds from a request to its answer, by code
    first_byte_times: Histogram  # seconds from the answer to the target's first byte

    @property
    def counts(self) -> StreamCounts:
        """The counts of streams and refusals."""

    def log(self, event: str, **fields: object) -> None:
        """Write a log line."""


@dataclass(eq=False, slots=True)
class Asked:
    """One request: client, user, target, and the verdict.

    It stays with the stream that is made for it.
    """

    peer: str  # the client's IP
    started: float  # in the loop's seconds
    via: str = "socks5"
    target: Target | None = None
    user: str | None = None
    entry: Hash | None = None  # of `user`, as it was checked
    rule: str = ""  # that allowed it, or the one that did not
    judged: int = -1  # the version of the rules when it was asked for
    is_name: bool = False
    permit: Permit | None = None  # of its source and user, from the look-up on

    def judge(self, access: Access) -> bool:
        """Return whether the rules and users in force now allow the request."""
        target = self.target
        assert target is not None
        verdict = access.judge(Question(self.user, self.peer, target.namespace, target.ip, target.port), self.entry)
        self.judged = access.version
        self.rule = verdict.rule
        return verdict.allowed

    def log(self, auditor: Auditor, event: str, **fields: object) -> None:
        """Write a log line about the request."""
        auditor.log(
            event, client=self.peer, user=self.user or "", target=str(self.target) if self.target else "",
            namespace=auditor.namespace, via=self.via, rule=self.rule, **fields,
        )  # fmt: skip


class Joined:
    """The owner of a client's pair, with the request and the path that serves it."""

    __slots__ = (
        "asked", "attempts", "auditor", "certificate", "identity", "permit", "requests", "setup", "times", "tried",
        "used",
    )  # fmt: skip

    def __init__(self, auditor: Auditor, asked: Asked, reached: Reached) -> None:
        self.auditor = auditor
        self.asked = asked
        self.used = reached.used
        self.attempts = reached.attempts
        self.times = reached.connected, reached.answered
        self.tried = reached.tried
        self.identity = reached.identity  # of the agent that proved it
        self.certificate = reached.certificate  # of the broker
        self.setup = auditor.relay.loop.now - asked.started
        auditor.setup_times.observe(ACCEPTED, self.setup)
        self.requests = 0  # that were forwarded; 0: it is a tunnel
        auditor.paths.opened(reached.used)
        self.permit = StreamPermit(auditor.counts)

    def review(self) -> Ending | None:
        """Check it by the trust list, the rules and the users in force."""
        auditor = self.auditor
        if not auditor.trust.allows(self.identity, self.certificate):
            return Ending.REVOKED
        return None if self.asked.judge(auditor.access) else Ending.NOT_ALLOWED

    def ended(self, account: Account) -> None:
        auditor, asked, used, identity = self.auditor, self.asked, self.used, self.identity
        auditor.paths.closed(used)
        if account.ending is Ending.TARGET_RESET:
            # the gateway sees the connection to the broker, and no target
            account.ending = Ending.PATH_RESET
        self.permit.release(account)
        if asked.permit is not None:
            asked.permit.release(auditor.relay.loop.now)
        more: dict[str, object] = {"requests": self.requests} if self.requests else {}
        if account.first:
            first = account.first - account.started
            auditor.first_byte_times.observe(first)
            more["first_byte_ms"] = round(first * 1000, 2)
        if self.tried:
            more["tried"] = told(self.tried)
        connected, answered = self.times
        asked.log(
            auditor, "stream_ended", reason=str(account.ending), bytes_up=account.up, bytes_down=account.down,
            seconds=round(account.seconds, 3), setup_ms=round(self.setup * 1000, 2), attempts=self.attempts,
            connect_ms=round(connected * 1000, 2), answer_ms=round(answered * 1000, 2),
            node=used.node, epoch=str(used.epoch), ps=format_endpoint(used.ps_ip, used.ps_port), agent=used.agent_id,
            proof="ok" if identity else "off", certificate=identity.subject if identity else "", **more,
        )  # fmt: skip
