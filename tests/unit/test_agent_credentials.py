"""The parts of an agent's credentials that need no network: which token counts, and when to renew."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from rtunnel.clock import DAY
from rtunnel.errors import TrustError
from rtunnel.trust.identity import Identity
from rtunnel.trust.keys import Token
from rtunnel_agent.enrolment import AgentIdentity
from rtunnel_agent.schedule import CA_SPREAD, HOUR, RENEW_AT, RENEW_JITTER, WARN_AT, Schedule
from rtunnel_agent.token import JoinToken

ONE, TWO = Token("one", b"1" * 32), Token("two", b"2" * 32)
ISSUED, ENDS = 1_800_000_000, 1_800_086_400


def token(present: Token | None, directory: Path | None) -> JoinToken:
    """A join token with a log of its own."""
    return JoinToken(present, directory, structlog.get_logger())


def test_after_a_revocation_only_another_token_counts(tmp_path: Path) -> None:
    """The one with which a broker accepted the agent is remembered; the next one lets it enrol anew."""
    join = token(ONE, tmp_path)
    join.accept()
    assert join.for_request() is ONE
    assert not join.revoke() and not join.void
    with pytest.raises(TrustError, match="needs another token"):
        join.for_request()
    join.put(TWO)
    assert join.void and join.for_request() is TWO
    join.certified()
    assert not join.revoked and not join.void


@pytest.mark.parametrize(("present", "enrols"), [(ONE, False), (TWO, True), (None, False)])
def test_a_token_that_came_while_the_agent_was_down_counts(tmp_path: Path, present: Token | None, enrols: bool) -> None:
    """The id that is remembered in the directory decides."""
    token(ONE, tmp_path).accept()
    join = token(present, tmp_path)
    assert join.revoke() is join.void is enrols


def test_without_a_token_the_message_says_how_to_get_one() -> None:
    """And without a directory nothing is remembered."""
    join = token(None, None)
    join.accept()
    with pytest.raises(TrustError, match="is not given: make one with `rtunnel pki token create`"):
        join.for_request()


def identity(life: int = ENDS - ISSUED) -> AgentIdentity:
    """An identity of one day, of which only the times are looked at."""
    who = Identity("agent", "default", "a1", frozenset(), ISSUED, ISSUED + life, cast(Any, None))
    return AgentIdentity(b"", cast(Any, None), who)


def test_a_certificate_is_renewed_in_time_and_warned_of_later() -> None:
    """At two thirds of its life, with jitter; each new certificate has warnings of its own."""
    schedule, life = Schedule(), ENDS - ISSUED
    assert not schedule.warns(ENDS)
    for _ in range(2):
        schedule.begin(identity())
        assert RENEW_AT - RENEW_JITTER <= (schedule.renew_at - ISSUED) / life <= RENEW_AT + RENEW_JITTER
        assert not schedule.warns(ISSUED + WARN_AT * life - 1)
        assert schedule.warns(ISSUED + WARN_AT * life) and not schedule.warns(ISSUED + WARN_AT * life + 1)


def test_warnings_come_more_often_towards_the_end_and_daily_after_it() -> None:
    """Of a certificate of a year: at five sixths, a week and a day before the end, then each hour; bounded."""
    schedule, year = Schedule(), 365 * DAY
    schedule.begin(identity(year))
    ends = ISSUED + year
    due = []
    while schedule.warn_at < ends + 3 * DAY:
        due.append(schedule.warn_at)
        assert schedule.warns(schedule.warn_at)
    assert due[0] == ISSUED + year * WARN_AT
    assert [round(ends - at) for at in due[1:]] == [7 * DAY, *range(DAY, 0, -HOUR), 0, -DAY, -2 * DAY]


def test_a_certificate_that_ended_while_the_agent_was_down_is_warned_of_at_once() -> None:
    """Once, and again at the end of the next whole day after the end."""
    schedule = Schedule()
    schedule.begin(identity())
    assert schedule.warns(ENDS + 5 * DAY + 1) and not schedule.warns(ENDS + 6 * DAY - 1)
    assert schedule.warns(ENDS + 6 * DAY)


def test_other_cas_bring_the_renewal_forward() -> None:
    """Within some minutes, and never later than before."""
    schedule = Schedule()
    schedule.begin(identity())
    schedule.hurry(identity(), ISSUED + 10.0)
    assert ISSUED + 10 <= schedule.renew_at <= ISSUED + 10 + CA_SPREAD
    before = schedule.renew_at
    schedule.hurry(identity(), ENDS)
    assert schedule.renew_at == before
