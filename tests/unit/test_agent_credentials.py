"""The parts of an agent's credentials that need no network: which token counts, and when to renew."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from rtunnel.errors import TrustError
from rtunnel.trust.identity import Identity
from rtunnel.trust.keys import Token
from rtunnel_agent.enrolment import AgentIdentity
from rtunnel_agent.schedule import CA_SPREAD, RENEW_AT, RENEW_JITTER, WARN_AT, Schedule
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


def identity() -> AgentIdentity:
    """An identity of one day, of which only the times are looked at."""
    who = Identity("agent", "default", "a1", frozenset(), ISSUED, ENDS, cast(Any, None))
    return AgentIdentity(b"", cast(Any, None), who)


def test_a_certificate_is_renewed_in_time_and_a_warning_is_due_once() -> None:
    """At two thirds of its life, with jitter; each new certificate has a warning of its own."""
    schedule, life = Schedule(), ENDS - ISSUED
    assert not schedule.warns(ENDS)
    for _ in range(2):
        schedule.begin(identity())
        assert RENEW_AT - RENEW_JITTER <= (schedule.renew_at - ISSUED) / life <= RENEW_AT + RENEW_JITTER
        assert not schedule.warns(ISSUED + WARN_AT * life - 1)
        assert schedule.warns(ISSUED + WARN_AT * life) and not schedule.warns(ENDS)


def test_other_cas_bring_the_renewal_forward() -> None:
    """Within some minutes, and never later than before."""
    schedule = Schedule()
    schedule.begin(identity())
    schedule.hurry(identity(), ISSUED + 10.0)
    assert ISSUED + 10 <= schedule.renew_at <= ISSUED + 10 + CA_SPREAD
    before = schedule.renew_at
    schedule.hurry(identity(), ENDS)
    assert schedule.renew_at == before
