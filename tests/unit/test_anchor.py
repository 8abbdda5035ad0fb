"""The anchor: lists come by file and from the authority, outlive its outages, and forged ones count for nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import trio

from rtunnel.trust import pki
from rtunnel.trust.certificates import new_key
from rtunnel.trust.keys import TrustError
from rtunnel.trust.tls import certificate_der
from rtunnel.wire.refusal import Refusal, Refused
from support.authority import Anchored, address, anchored, authority, change, enrol, renewal, token


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    pki.init(directory)
    return directory


async def test_it_follows_the_authority_and_keeps_what_it_heard(made: Path, tmp_path: Path) -> None:
    """A revocation arrives by itself, is told once, and is there at the next start without the authority."""
    pki.issue_agent(made, "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
    der = certificate_der(made / "a1.pem")
    kept = tmp_path / "trust"
    async with authority(made) as server, anchored(made / "ca.pem", kept, address(server)) as here:
        await here.until(lambda: here.anchor.roots.number > 0)
        here.anchor.roots.verify(der)
        change(made, lambda opened: opened.revoke("agent/default/a1"))
        await here.until(lambda: bool(here.anchor.roots.revoked))
        with pytest.raises(TrustError, match="revoked"):
            here.anchor.roots.verify(der)
        with trio.fail_after(10):
            while not kept.exists() or kept.read_bytes() != here.anchor.roots.signed:
                await trio.sleep(0.01)
        assert here.changes == sorted(set(here.changes)) and len(here.changes) == 2
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644
    later = Anchored(made / "ca.pem", kept).anchor
    with pytest.raises(TrustError, match="revoked"):
        later.roots.verify(der)


async def test_it_carries_enrols(made: Path) -> None:
    """Enrolled and Refused come through; the certificate is of a CA in force."""
    key = new_key()
    one = token(made)
    async with authority(made) as server, anchored(made / "ca.pem", None, address(server)) as here:
        answer = await here.anchor.enrol(enrol(one, key))
        who = here.anchor.roots.verify(answer.certificate)
        assert (who.subject, who.addresses) == ("agent/default/a1", {"10.1.0.7"})
        again = await here.anchor.enrol(renewal(answer.certificate, key))
        assert here.anchor.roots.verify(again.certificate).subject == who.subject
        with pytest.raises(Refused) as caught:
            await here.anchor.enrol(enrol(one))
        assert caught.value.code is Refusal.BAD_TOKEN and "used up" in caught.value.text
