"""An agent_id and an address belong to one agent while its certificate is in force, unless a token takes over."""

from __future__ import annotations

import atexit
import itertools
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from rtunnel.cli_pki import pki_group
from rtunnel.trust import pki
from rtunnel.trust.authority import Granted
from rtunnel.trust.certificates import new_key, sign_renewal
from rtunnel.trust.keys import Token
from rtunnel.trust.pki import AddressHeld, open_directory
from rtunnel.trust.store import FILE, Store
from rtunnel.wire.messages import Enrol
from rtunnel.wire.refusal import Refusal, Refused
from support.authority import Clock, at, change, enrol, refusal, renewal, token, who
from support.effort import times

DAY = 86400


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    pki.init(directory)
    return directory


# --- addresses --------------------------------------------------------------------------------------------------------


def test_an_address_in_force_is_not_given_to_a_second_agent(made: Path) -> None:
    """The same token, another agent_id: refused with the holder's name and what to do; it costs no use."""
    by = token(made, uses=9)
    decide = at(made)
    decide.enrol(enrol(by, agent_id="a05"))
    code, text = refusal(decide, enrol(by, agent_id="other", addresses=["10.1.0.8", "10.1.0.7"]))
    assert code is Refusal.ADDRESS_TAKEN
    assert "10.1.0.7 is certified for agent/default/a05 until 20" in text
    assert "pki revoke agent/default/a05" in text and "--take-over" in text
    assert decide.directory.store.token(by.id).used == 1  # type: ignore[union-attr]
    decide.enrol(enrol(by, agent_id="other", addresses=["10.1.0.8"]))


def test_an_address_is_of_its_namespace(made: Path) -> None:
    """The same address in another namespace is another address."""
    decide = at(made)
    decide.enrol(enrol(token(made), agent_id="a1"))
    decide.enrol(enrol(token(made, namespace="blue"), agent_id="b1", namespace="blue"))


@pytest.mark.parametrize("how", ["revoked", "expired", "moved away"])
def test_an_address_without_a_certificate_in_force_is_free(made: Path, how: str) -> None:
    """Its holder is revoked, has not renewed in time, or has got a certificate for another address instead."""
    clock = Clock()
    by = token(made, uses=9, ends=int(clock.now) + 9 * DAY)
    decide = at(made, clock)
    key = new_key()
    first = decide.enrol(enrol(by, key, agent_id="a1"))
    if how == "revoked":
        change(made, lambda opened: opened.revoke("agent/default/a1"))
    elif how == "expired":
        clock.now = first.ends
    else:
        decide.enrol(enrol(by, key, agent_id="a1", addresses=["10.1.0.9"]))
    decide.enrol(enrol(by, agent_id="a2"))


def test_a_token_may_take_an_address_over(made: Path) -> None:
    """With take_over it is given, and said from whom; the earlier agent renews for it no more, and for others still."""
    decide = at(made)
    key = new_key()
    first = decide.enrol(enrol(token(made), key, agent_id="a1", addresses=["10.1.0.7", "10.1.0.8"]))
    taken = decide.enrol(enrol(token(made, take_over=True), agent_id="a2"))
    assert who(taken).addresses == {"10.1.0.7"} and taken.took_over == ("agent/default/a1",)
    old = first.answer.certificate
    code, text = refusal(decide, renewal(old, key, agent_id="a1", addresses=["10.1.0.7", "10.1.0.8"]))
    assert code is Refusal.ADDRESS_TAKEN and "10.1.0.7 is certified for agent/default/a2" in text
    decide.enrol(renewal(old, key, agent_id="a1", addresses=["10.1.0.8"]))
    code, _ = refusal(decide, enrol(token(made), agent_id="a1", addresses=["10.1.0.7"]))
    assert code in (Refusal.AGENT_ID_TAKEN, Refusal.ADDRESS_TAKEN)


def test_by_hand_it_takes_a_flag_as_well(made: Path) -> None:
    """`pki issue agent` for an address of another agent: only with --take-over."""
    pki.issue_agent(made, "one", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
    with pytest.raises(AddressHeld, match=r"certified for agent/default/a1 .*--take-over"):
        pki.issue_agent(made, "two", agent_id="a2", namespace="default", addresses=["10.1.0.7"])
    said = CliRunner().invoke(pki_group, ["issue", "agent", "a2", "--address", "10.1.0.7", "--dir", str(made)])
    assert said.exit_code != 0 and "certified for agent/default/a1" in said.output
    argv = ["issue", "agent", "a2", "--address", "10.1.0.7", "--dir", str(made), "--take-over"]
    assert CliRunner().invoke(pki_group, argv).exit_code == 0


def test_the_commands_take_over(made: Path) -> None:
    """`token create --take-over` is in the store and in the list."""
    argv = ["token", "create", "--dir", str(made), "--id", "mover", "--cidr", "10.1.0.0/16", "--take-over"]
    assert CliRunner().invoke(pki_group, argv).exit_code == 0
    with open_directory(made) as opened:
        assert [(t.id, t.take_over) for t in opened.store.tokens()] == [("mover", True)]
    listed = CliRunner().invoke(pki_group, ["token", "list", "--dir", str(made)]).output.splitlines()
    assert listed[0].endswith("TAKE OVER") and listed[1].split()[-1] == "yes"


# --- agent_ids --------------------------------------------------------------------------------------------------------


def test_another_tenants_token_takes_no_agent_id(made: Path) -> None:
    """A good token for other networks, the agent_id of somebody else: refused. Revoking the thief's voids nothing."""
    decide = at(made)
    mine, theirs = token(made, id="mine"), token(made, id="theirs", networks=("10.2.0.0/16",), uses=50)
    first = decide.enrol(enrol(mine, agent_id="db"))
    code, text = refusal(decide, enrol(theirs, agent_id="db", addresses=["10.2.0.7"]))
    assert code is Refusal.AGENT_ID_TAKEN
    assert "agent/default/db has a certificate in force until 20" in text and "by join token 'mine'" in text
    assert "choose another agent.agent_id" in text and "pki revoke agent/default/db" in text
    decide.enrol(enrol(theirs, agent_id="thief", addresses=["10.2.0.7"]))
    change(made, lambda opened: opened.revoke("agent/default/thief"))
    assert not decide.directory.trust_store.is_revoked(who(first))


def test_a_renewed_certificate_is_of_the_same_token(made: Path) -> None:
    """The origin outlives the renewal: the token lets the agent in again, and no other token does."""
    by = token(made, id="mine", uses=2)
    decide = at(made)
    key, renewed = new_key(), new_key()
    first = decide.enrol(enrol(by, key))
    decide.enrol(renewal(first.answer.certificate, key, renewed))
    assert {item.token for item in decide.directory.in_force("agent/default/a1")} == {"mine"}
    assert refusal(decide, enrol(token(made)))[0] is Refusal.AGENT_ID_TAKEN
    decide.enrol(enrol(by))  # its host has lost the directory


def test_with_its_present_certificate_an_agent_comes_with_another_token(made: Path) -> None:
    """More addresses need a token: the agent proves beside it that the agent_id is its own. Nobody else can."""
    decide = at(made)
    key = new_key()
    first = decide.enrol(enrol(token(made), key))
    stranger = decide.enrol(enrol(token(made), other := new_key(), agent_id="a2", addresses=["10.1.0.9"]))
    by = token(made)
    question = enrol(by, addresses=["10.1.0.7", "10.1.0.8"])

    def proved(certificate: bytes, by_key: ec.EllipticCurvePrivateKey) -> Enrol:
        signature = sign_renewal(by_key, question.request)
        return Enrol(question.version, question.request, question.token_id, question.mac, certificate, signature)

    for bad in (
        question,
        proved(stranger.answer.certificate, other),
        proved(first.answer.certificate, other),
        proved(b"\x30\x00", key),
    ):
        assert refusal(decide, bad)[0] is Refusal.AGENT_ID_TAKEN
    granted = decide.enrol(proved(first.answer.certificate, key))
    assert who(granted).addresses == {"10.1.0.7", "10.1.0.8"} and not granted.took_over


def test_a_token_may_take_an_agent_id_over_within_its_networks(made: Path) -> None:
    """The older certificates are void then, the new one is good; an agent elsewhere is out of its reach."""
    decide = at(made)
    first = decide.enrol(enrol(token(made), agent_id="a1"))
    abroad = token(made, networks=("10.2.0.0/16",), take_over=True)
    code, text = refusal(decide, enrol(abroad, agent_id="a1", addresses=["10.2.0.7"]))
    assert code is Refusal.AGENT_ID_TAKEN and "it does not allow 10.1.0.7" in text
    key = new_key()
    by = token(made, take_over=True)
    taken = decide.enrol(enrol(by, key, agent_id="a1"))
    assert taken.took_over == ("agent/default/a1",)
    trust_store = decide.directory.trust_store
    assert trust_store.is_revoked(who(first)) and not trust_store.is_revoked(who(taken))
    again = decide.enrol(enrol(by, key, agent_id="a1"))  # the answer was lost
    assert not decide.directory.trust_store.is_revoked(who(again)) and not again.took_over


# --- a file of before -------------------------------------------------------------------------------------------------


def test_a_store_of_version_1_gets_its_holders(made: Path) -> None:
    """Tokens, and the newest certificate of each address, are taken along; then the rules hold for them."""
    decide = at(made)
    by = token(made, uses=9)
    decide.enrol(enrol(by, agent_id="a1", addresses=["10.1.0.7", "10.1.0.8"]))
    decide.directory.close()
    db = sqlite3.connect(made / FILE)
    db.executescript(
        "DROP TRIGGER holder_forgotten; DROP TABLE holders; ALTER TABLE tokens DROP COLUMN take_over;"
        "PRAGMA user_version = 1;"
    )
    db.close()
    decide = at(made)
    assert decide.directory.store.holder("default", "10.1.0.8") == "agent/default/a1"
    assert refusal(decide, enrol(by, agent_id="a2"))[0] is Refusal.ADDRESS_TAKEN
    decide.enrol(enrol(by, agent_id="a2", addresses=["10.1.0.9"]))


def test_what_is_forgotten_holds_nothing(made: Path) -> None:
    """Holders go with the last record of their agent: the table does not outgrow the other."""
    store = Store(made / FILE)
    decide = at(made, clock := Clock())
    decide.enrol(enrol(token(made, ends=int(clock.now) + 60), agent_id="a1"))
    assert store.holder("default", "10.1.0.7") == "agent/default/a1"
    store.forget(clock.now + 2 * DAY)
    assert store.holder("default", "10.1.0.7") == ""
    store.close()


# --- any order --------------------------------------------------------------------------------------------------------


@dataclass
class Certified:
    """A certificate that was given out, as the model remembers it."""

    agent_id: str
    address: str
    origin: str
    issued: float
    ends: float
    key: ec.EllipticCurvePrivateKey
    certificate: bytes


@cache
def _fresh() -> Path:
    """A directory that nothing was issued from; to make one takes 0.4 s."""
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    made = Path(scratch.name) / "pki"
    pki.init(made)
    return made


AGENTS = st.sampled_from(["a1", "a2"])
ADDRESSES = st.sampled_from(["10.1.0.7", "10.1.0.8"])


class Claims(RuleBasedStateMachine):
    """Two agents, two addresses, three tokens, any order: each answer is what a simple model says."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        made = Path(self._scratch.name) / "pki"
        shutil.copytree(_fresh(), made)
        self.clock = Clock()
        self.made = made
        self.tokens: list[Token] = [
            token(made, id=name, uses=10**6, ends=int(self.clock.now) + 900 * DAY, take_over=name == "taker")
            for name in ("one", "two", "taker")
        ]
        self.decide = at(made, self.clock)
        self.given: list[Certified] = []
        self.revoked: dict[str, float] = {}
        self.holder: dict[str, str] = {}

    def teardown(self) -> None:
        self.decide.directory.close()
        self._scratch.cleanup()

    def good(self, agent_id: str) -> list[Certified]:
        at, now = self.revoked.get(agent_id, 0.0), self.clock.now
        return [c for c in self.given if c.agent_id == agent_id and c.issued > at and c.ends > now]

    def held(self, agent_id: str, address: str) -> bool:
        holder = self.holder.get(address, agent_id)
        return holder != agent_id and any(c.address == address for c in self.good(holder))

    def ask(self, question: Enrol) -> Granted | Refusal:
        try:
            return self.decide.enrol(question)
        except Refused as error:
            return error.code

    def give(
        self, granted: Granted | Refusal, agent_id: str, address: str, origin: str, key: ec.EllipticCurvePrivateKey
    ) -> None:
        assert isinstance(granted, Granted), granted
        identity = who(granted)
        self.holder[address] = agent_id
        self.given.append(
            Certified(agent_id, address, origin, identity.issued, identity.ends, key, granted.answer.certificate)
        )

    @rule(agent_id=AGENTS, address=ADDRESSES, by=st.integers(0, 2))
    def enrols(self, agent_id: str, address: str, by: int) -> None:
        used, key = self.tokens[by], new_key()
        answer = self.ask(enrol(used, key, agent_id=agent_id, addresses=[address]))
        others = [c for c in self.good(agent_id) if c.origin != used.id]
        if used.id != "taker" and others:
            assert answer is Refusal.AGENT_ID_TAKEN
        elif used.id != "taker" and self.held(agent_id, address):
            assert answer is Refusal.ADDRESS_TAKEN
        else:
            if others:
                self.revoked[agent_id] = max(self.clock.now, *(c.issued for c in self.given if c.agent_id == agent_id))
            self.give(answer, agent_id, address, used.id, key)

    @rule(which=st.integers(0, 99))
    def renews(self, which: int) -> None:
        good = [c for agent_id in ("a1", "a2") for c in self.good(agent_id)]
        if not good:
            return
        present, key = good[which % len(good)], new_key()
        question = renewal(
            present.certificate, present.key, key, agent_id=present.agent_id, addresses=[present.address]
        )
        answer = self.ask(question)
        if self.held(present.agent_id, present.address):
            assert answer is Refusal.ADDRESS_TAKEN
        else:
            self.give(answer, present.agent_id, present.address, present.origin, key)

    @rule(agent_id=AGENTS)
    def revokes(self, agent_id: str) -> None:
        if self.good(agent_id):
            with self.decide.directory.change():
                self.decide.directory.revoke(f"agent/default/{agent_id}")
            self.revoked[agent_id] = max(self.clock.now, *(c.issued for c in self.given if c.agent_id == agent_id))

    @rule(seconds=st.sampled_from([1, DAY // 2, 2 * DAY]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def nobody_shares(self) -> None:
        """Without a token that takes over: one agent for an address, one token for an agent_id."""
        for agent_id in ("a1", "a2"):
            assert len({c.origin for c in self.good(agent_id)}) <= 1
        if not any(c.origin == "taker" for c in self.given):
            for one, two in itertools.product(self.good("a1"), self.good("a2")):
                assert one.address != two.address


Claims.TestCase.settings = settings(
    max_examples=times(8), stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestClaims = Claims.TestCase
