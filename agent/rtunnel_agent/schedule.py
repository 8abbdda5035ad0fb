"""The times at which a certificate is renewed, and at which a warning is due. Reads no clock."""

from __future__ import annotations

import random
from typing import Final

from rtunnel_agent.enrolment import AgentIdentity

#: The part of its life after which a certificate is renewed, and the jitter: agents that were
#: started at the same time must not renew at the same time.
RENEW_AT: Final = 2 / 3
RENEW_JITTER: Final = 0.05
#: The part of its life after which a warning is logged.
WARN_AT: Final = 5 / 6
#: Seconds over which agents spread their renewals after the CAs have changed.
CA_SPREAD: Final = 600.0


class Schedule:
    """The times of one certificate, in seconds since 1970; `begin` is called for each new one."""

    def __init__(self) -> None:
        self.renew_at = 0.0
        self.warn_at = 0.0
        self._warned = False

    def begin(self, identity: AgentIdentity) -> None:
        """Set the times of a new certificate."""
        self._warned = False
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311
        self.renew_at = identity.who.issued + identity.life * share
        self.warn_at = identity.who.issued + identity.life * WARN_AT

    def hurry(self, identity: AgentIdentity, now: float) -> None:
        """Renew soon, because the CAs have changed."""
        soon = random.uniform(0, min(CA_SPREAD, identity.life / 6))  # noqa: S311
        self.renew_at = min(self.renew_at, now + soon)

    def warns(self, now: float) -> bool:
        """Return whether a warning is due. It is due once for each certificate."""
        due = 0.0 < self.warn_at <= now and not self._warned
        self._warned = self._warned or due
        return due
