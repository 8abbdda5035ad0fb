"""The times at which a certificate is renewed, and at which warnings are due. Reads no clock."""

from __future__ import annotations

import random
from typing import Final

from rtunnel.clock import DAY
from rtunnel_agent.enrolment import AgentIdentity

#: The part of its life after which a certificate is renewed, and the jitter: agents that were
#: started at the same time must not renew at the same time.
RENEW_AT: Final = 2 / 3
RENEW_JITTER: Final = 0.05
#: The part of its life after which warnings are logged: a certificate that is renewed in time has
#: none, however short its life is.
WARN_AT: Final = 5 / 6
HOUR: Final = 3600
#: Seconds before the end at which further warnings are due: a week, a day, and each hour of the
#: last day.
WARN_LEFT: Final = (7 * DAY, *range(DAY, 0, -HOUR))
#: Seconds over which agents spread their renewals after the CAs have changed.
CA_SPREAD: Final = 600.0


class Schedule:
    """The times of one certificate, in seconds since 1970; `begin` is called for each new one."""

    def __init__(self) -> None:
        self.renew_at = 0.0
        self.warn_at = 0.0  # when the next warning is due; 0: never
        self._ends = 0.0

    def begin(self, identity: AgentIdentity) -> None:
        """Set the times of a new certificate."""
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311
        self.renew_at = identity.who.issued + identity.life * share
        self.warn_at = identity.who.issued + identity.life * WARN_AT
        self._ends = identity.who.ends

    def hurry(self, identity: AgentIdentity, now: float) -> None:
        """Renew soon, because the CAs have changed."""
        soon = random.uniform(0, min(CA_SPREAD, identity.life / 6))  # noqa: S311
        self.renew_at = min(self.renew_at, now + soon)

    def warns(self, now: float) -> bool:
        """Return whether a warning is due, and set the time of the next one.

        The last ones before the end are hourly; one at the end and one each day follow.
        """
        if not 0.0 < self.warn_at <= now:
            return False
        before = [self._ends - left for left in WARN_LEFT if self._ends - left > now]
        after = self._ends + DAY * max(0, (now - self._ends) // DAY + 1)
        self.warn_at = min([*before, after])
        return True
