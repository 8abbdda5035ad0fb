"""The authority: who gets a certificate and who does not, and a server that nobody can block."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from rtunnel import roles
from rtunnel.config import ConfigError, load
from rtunnel.errors import TrustError
from rtunnel.trust import pki
from rtunnel.trust.authority import Authority
from rtunnel.trust.certificates import AUTHORITY_NAME, load_request, new_key, read_request, requested_key
from rtunnel.trust.identity import TrustStore, load_private_key, read_certificate
from rtunnel.trust.keys import Token, token_mac
from rtunnel.trust.pki import Directory, open_directory
from rtunnel.trust.tls import certificate_der, client_context
from rtunnel.wire.messages import (
    MAX_UNAUTHENTICATED,
    VERSION,
    Decoder,
    Enrol,
    Enrolled,
    Follow,
    Message,
    Refuse,
    Trust,
    encode,
)
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_authority import server as server_module
from rtunnel_authority.server import Server
from support.authority import Clock, at, authority, change, csr, enrol, refusal, renewal, token, who
from support.effort import times
from support.messages import decoder_of
from support.plumbing import kept

DAY = 86400


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    pki.init(directory)
    return directory


# --- enrolment --------------------------------------------------------------------------------------------------------


def test_a_token_gives_what_it_allows(made: Path) -> None:
    """Names and addresses as asked, for the asked key, as long as the token says, with the list in force."""
    key = new_key()
    by = token(made, networks=("10.1.0.0/16", "fd00::/8"), lifetime=3600)
    granted = at(made).enrol(enrol(by, key, addresses=["10.1.0.7", "fd00::7"]))
    trust_store = TrustStore((made / "ca.pem").read_bytes())
    holder = trust_store.verify(granted.answer.certificate)
    assert (holder.subject, holder.addresses) == ("agent/default/a1", frozenset({"10.1.0.7", "fd00::7"}))
    assert holder.public_key == key.public_key()
    assert holder.ends - holder.issued == 3600
    assert trust_store.take(granted.answer.trust)
    assert (granted.token_id, granted.ends) == (by.id, holder.ends)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"addresses": ["10.2.0.7"]}, "is not for 10.2.0.7, only for 10.1.0.0/16"),
        ({"addresses": ["10.1.0.7", "192.0.2.1"]}, "is not for 192.0.2.1"),
        ({"addresses": ["fd00::1"]}, "is not for fd00::1"),
        ({"namespace": "blue"}, "is for namespace 'default', not for 'blue'"),
    ],
)
def test_more_than_the_token_allows_is_refused(made: Path, asked: dict[str, Any], words: str) -> None:
    """A foreign address or namespace; and the token has lost no use."""
    by = token(made)
    decide = at(made)
    code, text = refusal(decide, enrol(by, **asked))
    assert code is Refusal.NOT_AUTHORISED and words in text
    decide.enrol(enrol(by))


def test_a_mapped_address_is_the_one_it_maps(made: Path) -> None:
    """::ffff:10.1.0.7 is 10.1.0.7 in the certificate, and judged as that: it opens no way around the networks."""
    for mapped, networks, good in (("10.1.0.7", ("10.1.0.0/16",), True), ("10.2.0.7", ("::/0",), False)):
        names = x509.SubjectAlternativeName(
            [
                x509.UniformResourceIdentifier("rtunnel:agent/default/a1"),
                x509.IPAddress(ipaddress.IPv6Address(f"::ffff:{mapped}")),
            ]
        )
        key = new_key()
        by = token(made, networks=networks)
        question = _signed(by, _request(key, names))
        if good:
            assert who(at(made).enrol(question)).addresses == {mapped}
        else:
            assert refusal(at(made), question)[0] is Refusal.NOT_AUTHORISED


def _request(key: ec.EllipticCurvePrivateKey, names: x509.SubjectAlternativeName | None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _signed(by: Token, request: bytes) -> Enrol:
    return Enrol(VERSION, request, by.id, token_mac(by.secret, b"rtunnel enrol 1", request))


def _uri(*uris: str, ips: tuple[str, ...] = ("10.1.0.7",)) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
    return x509.SubjectAlternativeName(names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "names no agent"),
        (_uri(), "names no agent"),
        (_uri("https://example.org/"), "names no agent"),
        (_uri("rtunnel:agent/default"), "names no agent"),
        (_uri("rtunnel:agent/default/a%20b"), "malformed"),
        (_uri("rtunnel:agent/default/a%2Fb"), "malformed"),
        (_uri("rtunnel:agent//a1"), "malformed"),
        (_uri("rtunnel:agent/default/a1", ips=()), "0 addresses"),
        (_uri("rtunnel:agent/default/a1", ips=tuple(f"10.1.0.{n}" for n in range(1, 66))), "65 addresses"),
        (_uri("rtunnel:agent/default/a1", ips=("0.0.0.0",)), "not the address of one host"),
        (_uri("rtunnel:agent/default/a1", ips=("224.0.0.1",)), "not the address of one host"),
        (x509.SubjectAlternativeName([x509.DNSName("broker.rtunnel")]), "not for an agent"),
        (x509.SubjectAlternativeName([x509.DNSName("authority.rtunnel")]), "not for an agent"),
    ],
)
def test_malformed_requests(made: Path, names: x509.SubjectAlternativeName | None, words: str) -> None:
    """What is no agent's request is refused whatever the token allows."""
    by = token(made, networks=("0.0.0.0/0",))
    code, text = refusal(at(made), _signed(by, _request(new_key(), names)))
    assert code is Refusal.BAD_REQUEST and words in text


def test_requests_with_keys_that_are_not_the_askers(made: Path) -> None:
    """Garbage, a request of another curve, and one whose signature does not fit its key."""
    by = token(made)
    good = csr(new_key())
    weak = _request(ec.generate_private_key(ec.SECP384R1()), _uri("rtunnel:agent/default/a1"))
    for request, words in ((b"", "not a certificate request"), (b"\x30\x00", "not a"), (weak, "P-256")):
        code, text = refusal(at(made), _signed(by, request))
        assert code is Refusal.BAD_REQUEST and words in text
    forged = good[:-1] + bytes([good[-1] ^ 1])
    assert refusal(at(made), _signed(by, forged))[0] is Refusal.BAD_REQUEST


def test_a_signature_of_another_kind_of_key_is_not_checked() -> None:
    """Whoever makes an RSA key decides what that costs, and anybody may send one."""

    class Costly:
        is_signature_valid = property(lambda self: pytest.fail("it was checked"))

        def public_key(self) -> object:
            return rsa.generate_private_key(65537, 2048).public_key()

    with pytest.raises(TrustError, match="P-256"):
        requested_key(Costly())  # type: ignore[arg-type]


SAN = _uri("rtunnel:agent/default/a1", ips=("10.1.0.7", "fd00::7")).public_bytes()


@settings(max_examples=times(60), deadline=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(st.integers(0, len(SAN) - 1), st.integers(0, 255)).map(
            lambda at: SAN[: at[0]] + bytes([at[1]]) + SAN[at[0] + 1 :]
        ),
    )
)
@example(b"\x30\x06\xa3\x04\x30\x02\x05\x00")  # x400Address: a kind of name that the library does not know
@example(b"\x30\x0a\x87\x08\x0a\x00\x00\x00\xff\x00\x00\x00")  # a network where an address should be
def test_odd_names_are_refused(names: bytes) -> None:
    """Whatever stands where the names should be, well signed: a request, or a TrustError and nothing else."""
    odd = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, names)
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(odd, critical=False)
    der = builder.sign(_ODD_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    try:
        read_request(load_request(der))
    except TrustError:
        pass


_ODD_KEY = new_key()


ODD = csr(_ODD_KEY)


@settings(max_examples=times(100), deadline=None)
@given(st.integers(0, 9999), st.integers(0, 255), st.sampled_from(("set", "cut", "double")))
def test_odd_requests_are_refused(place: int, value: int, how: str) -> None:
    """Any byte of a request changed, cut or doubled."""
    at = place % len(ODD)
    put = {"set": bytes([value]), "cut": b"", "double": ODD[at : at + 1] * 2}[how]
    try:
        read_request(load_request(ODD[:at] + put + ODD[at + 1 :]))
    except TrustError:
        pass


def test_tokens_that_do_not_count(made: Path) -> None:
    """Unknown, not proved, over, revoked: each is told, the last two only to who has it."""
    clock = Clock()
    decide = at(made, clock)
    by = token(made, id="web", ends=int(clock.now) + 60)
    question = enrol(by)
    for other in (
        msgspec.structs.replace(question, token_id="app"),
        msgspec.structs.replace(question, token_id=""),
    ):
        code, text = refusal(decide, other)
        assert code is Refusal.BAD_TOKEN and "is known here" in text
    stranger = enrol(Token("web", b"\0" * 32))
    for wrong in (stranger, msgspec.structs.replace(question, mac=b""), _over(question, csr(new_key()))):
        code, text = refusal(decide, wrong)
        assert code is Refusal.BAD_TOKEN and "proof" in text
    clock.now += 60
    assert "expired at" in refusal(decide, question)[1]
    assert "proof" in refusal(decide, stranger)[1]
    clock.now -= 1
    change(made, lambda opened: opened.store.revoke_token("web"))
    assert "is revoked" in refusal(decide, question)[1]


def _over(question: Enrol, request: bytes) -> Enrol:
    """With another request under the same MAC."""
    return msgspec.structs.replace(question, request=request)


def test_a_lost_answer_costs_no_use(made: Path) -> None:
    """The same key for the same agent again: another certificate. Another key, or another name: used up."""
    by = token(made)
    key = new_key()
    decide = at(made)
    first, again = decide.enrol(enrol(by, key)), decide.enrol(enrol(by, key))
    assert who(first).public_key == who(again).public_key
    for other in (enrol(by), enrol(by, key, agent_id="a2")):
        code, text = refusal(decide, other)
        assert code is Refusal.BAD_TOKEN and "used up: it was for one agent" in text
    assert decide.directory.store.token(by.id).used == 1  # type: ignore[union-attr]


def test_an_expired_agent_needs_a_token(made: Path) -> None:
    """Its certificate renews nothing any more; another token lets it in, with the same key too."""
    clock = Clock()
    decide = at(made, clock)
    key = new_key()
    granted = decide.enrol(enrol(token(made), key))
    question = renewal(granted.answer.certificate, key)
    clock.now += DAY
    code, text = refusal(decide, question)
    assert code is Refusal.BAD_CERTIFICATE and "expired" in text and "join token" in text
    fresh = decide.enrol(enrol(token(made, ends=int(clock.now) + 60), key))
    assert who(fresh).ends == clock.now + DAY


def test_who_proves_nothing_locks_nothing(made: Path) -> None:
    """A flood of such requests kept `rtunnel pki revoke` waiting for seconds. They need no lock."""
    by, key = token(made), new_key()
    decide = at(made)
    granted = decide.enrol(enrol(by, key))
    with pki.open_directory(made) as opened, opened.change():
        unproven = msgspec.structs.replace(enrol(by), mac=bytes(32))
        assert refusal(decide, unproven)[0] is Refusal.BAD_TOKEN
        stolen = renewal(granted.answer.certificate, new_key())
        assert refusal(decide, stolen)[0] is Refusal.BAD_CERTIFICATE


def test_who_gets_nothing_locks_nothing(made: Path) -> None:
    """Nor does who proves a token that allows nothing more, or asks for a key or an address that it can't have."""
    decide, key = at(made), new_key()
    used, over, gone, good = token(made), token(made, ends=int(time.time()) - 1), token(made), token(made, uses=9)
    decide.enrol(enrol(used, agent_id="a0", addresses=["10.1.0.6"]))
    granted = decide.enrol(enrol(good, key))
    change(made, lambda opened: opened.store.revoke_token(gone.id))
    change(made, lambda opened: opened.revoke("agent/default/a1"))
    with pki.open_directory(made) as opened, opened.change():
        for by in (used, over, gone):
            assert refusal(decide, enrol(by))[0] is Refusal.BAD_TOKEN
        assert refusal(decide, enrol(good, addresses=["10.9.0.7"]))[0] is Refusal.NOT_AUTHORISED
        assert refusal(decide, enrol(good, addresses=["10.1.0.6"]))[0] is Refusal.ADDRESS_TAKEN
        assert refusal(decide, enrol(good, agent_id="a0"))[0] is Refusal.AGENT_ID_TAKEN
        assert refusal(decide, enrol(good, key))[0] is Refusal.REVOKED
        assert refusal(decide, renewal(granted.answer.certificate, key))[0] is Refusal.REVOKED
    assert decide.enrol(enrol(good)).answer.certificate


def test_uses_are_counted_across_processes(made: Path) -> None:
    """Eight askers at once, in two processes, and a token for three: three get in."""
    by = token(made, uses=3)
    (made / "token").write_text(by.line())
    script = (
        "import sys, pathlib\n"
        "from rtunnel.trust import keys\n"
        "from rtunnel.trust.authority import Authority\n"
        "from rtunnel.trust.pki import Directory\n"
        "from rtunnel.wire.refusal import Refused\n"
        "from support.authority import enrol\n"
        "made = pathlib.Path(sys.argv[1])\n"
        "by = keys.load_token(made / 'token')\n"
        "questions = [enrol(by) for _ in range(4)]\n"
        "decide = Authority(Directory(made))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for question in questions:\n"
        "    try:\n"
        "        decide.enrol(question); print('in')\n"
        "    except Refused as refused:\n"
        "        print(refused.code)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", script, str(made)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environ}
    with subprocess.Popen(run, **pipes) as one, subprocess.Popen(run, **pipes) as two:
        for process in (one, two):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        words = [word for process in (one, two) for word in process.communicate()[0].split()]
    assert sorted(words) == ["bad_token"] * 5 + ["in"] * 3


def test_uses_are_counted_across_threads(made: Path) -> None:
    """The same inside one process, with a store each."""
    by = token(made, uses=2)
    questions = [enrol(by) for _ in range(6)]
    start = threading.Barrier(len(questions))
    answers: list[str] = []

    def ask(question: Enrol) -> None:
        decide = at(made)
        start.wait()
        try:
            decide.enrol(question)
            answers.append("in")
        except Refused as error:
            answers.append(error.code)
        finally:
            decide.directory.close()

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["bad_token"] * 4 + ["in"] * 2


# --- renewal ----------------------------------------------------------------------------------------------------------


def test_a_certificate_renews_itself(made: Path) -> None:
    """With another key, for as long as before, without a token; fewer addresses are possible."""
    clock = Clock()
    decide = at(made, clock)
    key, next_key = new_key(), new_key()
    granted = decide.enrol(enrol(token(made, lifetime=3600), key, addresses=["10.1.0.7", "10.1.0.8"]))
    clock.now += 1800
    renewed = decide.enrol(renewal(granted.answer.certificate, key, next_key, addresses=["10.1.0.8"]))
    holder = who(renewed)
    assert (holder.subject, holder.addresses) == ("agent/default/a1", frozenset({"10.1.0.8"}))
    assert holder.public_key == next_key.public_key()
    assert (holder.issued, holder.ends) == (clock.now, clock.now + 3600)
    assert renewed.token_id == ""


def test_a_renewal_changes_nobody(made: Path) -> None:
    """Another name, namespace or address; a request that the present key has not signed; a broker's certificate."""
    decide = at(made)
    key = new_key()
    present = decide.enrol(enrol(token(made), key)).answer.certificate
    for asked in ({"agent_id": "a2"}, {"namespace": "blue"}, {"addresses": ["10.1.0.7", "10.1.0.8"]}):
        code, text = refusal(decide, renewal(present, key, **asked))
        assert code is Refusal.NOT_AUTHORISED and "join token" in text
    for question in (
        renewal(present, new_key()),
        _over(renewal(present, key), csr(new_key())),
        msgspec.structs.replace(renewal(present, key), signature=b""),
    ):
        assert refusal(decide, question)[0] is Refusal.BAD_CERTIFICATE
    broker = certificate_der(made / "broker.pem")
    code, text = refusal(decide, renewal(broker, load_private_key(made / "broker.key")))
    assert code is Refusal.BAD_CERTIFICATE and "is not an agent" in text


def test_a_stranger_renews_nothing(made: Path, tmp_path: Path) -> None:
    """A certificate of another CA with all the right names, its own key, and garbage."""
    pki.init(tmp_path / "theirs")
    pki.issue_agent(tmp_path / "theirs", "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
    theirs = certificate_der(tmp_path / "theirs" / "a1.pem")
    key = load_private_key(tmp_path / "theirs" / "a1.key")
    code, text = refusal(at(made), renewal(theirs, key))
    assert code is Refusal.BAD_CERTIFICATE and "not from a CA in force" in text
    assert refusal(at(made), renewal(b"\x30", key))[0] is Refusal.BAD_CERTIFICATE


def test_what_was_not_given_out_here_is_not_renewed(made: Path, tmp_path: Path) -> None:
    """Who has stolen the CA's key signs what he likes: it does not become a certificate of the next CA by renewal.

    After an older copy of the store was put back it may, for as long as the configuration says so.
    """
    thiefs = tmp_path / "copy"
    shutil.copytree(made, thiefs)
    pki.issue_agent(thiefs, "db", agent_id="db", namespace="default", addresses=["10.9.9.9"], days=3000)
    question = renewal(
        certificate_der(thiefs / "db.pem"), load_private_key(thiefs / "db.key"), agent_id="db", addresses=["10.9.9.9"]
    )
    code, text = refusal(at(made), question)
    assert code is Refusal.BAD_CERTIFICATE and "agent/default/db is not recorded here" in text
    assert "authority.renew = all" in text
    renewed = Authority(kept(Directory(made)), renew_unknown=True).enrol(question)
    assert who(renewed).subject == "agent/default/db"


def test_tokens_go_with_a_stolen_ca(made: Path) -> None:
    """Their secrets were beside its key."""
    by = token(made)
    with open_directory(made) as opened, opened.change():
        opened.start_rotation()
        opened.switch_rotation()
    at(made).enrol(enrol(token(made, id="used")))
    with open_directory(made) as opened, opened.change():
        opened.finish_rotation(stolen=True)
    code, text = refusal(at(made), enrol(by))
    assert code is Refusal.BAD_TOKEN and "revoked" in text


def test_a_certificate_by_hand_renews_too(made: Path) -> None:
    """For its own lifetime."""
    pki.issue_agent(made, "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"], days=90)
    key = load_private_key(made / "a1.key")
    holder = who(at(made).enrol(renewal(certificate_der(made / "a1.pem"), key)))
    assert holder.ends - holder.issued == 90 * DAY


# --- revocation -------------------------------------------------------------------------------------------------------


def test_the_revoked_do_not_come_back(made: Path) -> None:
    """No renewal, no repetition of the old Enrol, no old key under any token; only another key and a token."""
    clock = Clock()
    decide = at(made, clock)
    key = new_key()
    by = token(made, uses=5)
    first = enrol(by, key)
    present = decide.enrol(first).answer.certificate
    question = renewal(present, key)
    change(made, lambda opened: opened.revoke("agent/default/a1"))
    assert refusal(decide, question)[0] is Refusal.REVOKED
    code, text = refusal(decide, first)
    assert code is Refusal.REVOKED and "another key" in text
    assert refusal(decide, enrol(token(made), key, agent_id="a2"))[0] is Refusal.REVOKED
    fresh = decide.enrol(enrol(by))
    trust_store = TrustStore((made / "ca.pem").read_bytes())
    assert trust_store.take(fresh.answer.trust)
    trust_store.verify(fresh.answer.certificate)
    with pytest.raises(TrustError, match="revoked"):
        trust_store.verify(present)


def test_the_old_enrol_stays_void_when_its_certificate_has_expired(made: Path) -> None:
    """As long as the token could be used: the record of the revoked key outlives the certificate."""
    clock = Clock()
    decide = at(made, clock)
    by = token(made, uses=5, lifetime=60, ends=int(clock.now) + 30 * DAY)
    first = enrol(by)
    decide.enrol(first)
    change(made, lambda opened: opened.revoke("agent/default/a1"))
    clock.now += 2 * DAY
    decide.enrol(enrol(by, agent_id="a2"))  # records are dropped with each new one
    assert refusal(decide, first)[0] is Refusal.REVOKED


def test_a_certificate_of_the_second_of_the_revocation_is_good(made: Path) -> None:
    """Before and after it in one second: the first is void, the second is not; and again."""
    clock = Clock()
    decide = at(made, clock)
    directory = decide.directory
    certificates = []
    for _ in range(3):
        certificates.append(decide.enrol(enrol(token(made))).answer.certificate)
        with directory.change():
            directory.revoke("agent/default/a1")
    certificates.append(decide.enrol(enrol(token(made))).answer.certificate)
    void = [directory.trust_store.is_revoked(read_certificate(der)) for der in certificates]
    assert void == [True, True, True, False]
    directory.trust_store.verify(certificates[-1], clock)


# --- the server -------------------------------------------------------------------------------------------------------


async def dialled(server: Server, made: Path) -> trio.SSLStream[trio.SocketStream]:
    tcp = await trio.open_tcp_stream(*server.bound)
    context = client_context(made / "ca.pem")
    return trio.SSLStream(tcp, context, server_hostname=AUTHORITY_NAME, https_compatible=True)


async def ask(stream: trio.SSLStream[trio.SocketStream], question: Message) -> Any:
    decoder = decoder_of(Enrolled | Trust | Refuse, 1 << 16)
    await stream.send_all(encode(question))
    with trio.fail_after(10):
        while (answer := decoder.next()) is None:
            data = await stream.receive_some()
            assert data, "closed without an answer"
            decoder.feed(data)
    return answer


async def test_many_questions_on_one_connection(made: Path) -> None:
    """Follow and Enrol in any order; a list comes only when it is newer."""
    by = token(made)
    async with authority(made) as server, await dialled(server, made) as stream:
        news = await ask(stream, Follow(VERSION))
        trust_store = TrustStore((made / "ca.pem").read_bytes())
        assert trust_store.take(news.signed)
        assert await ask(stream, Follow(VERSION, trust_store.number)) == Trust()
        assert isinstance(await ask(stream, enrol(by)), Enrolled)
        assert (await ask(stream, enrol(by))).code == Refusal.BAD_TOKEN
        assert (await ask(stream, Follow(VERSION))).signed == news.signed
        for question in (Follow(VERSION + 1), Enrol(VERSION + 1, b"")):
            assert (await ask(stream, question)).code == Refusal.VERSION
        assert server.status()["enrolled"] == 1 and server.status()["refused"] == {"bad_token": 1, "version": 1}


async def test_what_is_no_question_ends_the_connection(made: Path) -> None:
    """A word about it, then the end: garbage, too long a message, one that only an authority may send."""
    async with authority(made) as server:
        long = (MAX_UNAUTHENTICATED + 1).to_bytes(4, "big")
        for data in (encode(Trust()), b"\0\0\0\1\xc1", long):
            async with await dialled(server, made) as stream:
                await stream.send_all(data)
                decoder = Decoder(Refuse)
                with trio.fail_after(10):
                    async for piece in stream:
                        decoder.feed(piece)
                answer = decoder.next()
                assert answer is not None and answer.code == Refusal.PROTOCOL_ERROR


async def test_the_slow_are_closed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing, half a message, or never shakes hands, has its time and no more."""
    monkeypatch.setattr(server_module, "DEADLINE", 0.2)
    async with authority(made) as server:
        mute = await trio.open_tcp_stream(*server.bound)
        silent, slow = await dialled(server, made), await dialled(server, made)
        await silent.do_handshake()
        await slow.send_all(encode(Follow(VERSION))[:5])
        with trio.fail_after(10):
            assert await mute.receive_some() == b""
            for stream in (silent, slow):
                assert await stream.receive_some() == b""
                await trio.aclose_forcefully(stream)
        await mute.aclose()


async def test_one_source_cant_take_all_connections(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above its share it is closed at once; below it is served again."""
    monkeypatch.setattr(server_module, "MAX_OF_SOURCE", 2)
    async with authority(made) as server:
        held = [await dialled(server, made) for _ in range(2)]
        for stream in held:
            assert isinstance(await ask(stream, Follow(VERSION)), Trust)
        more = await trio.open_tcp_stream(*server.bound)
        with trio.fail_after(10):
            assert await more.receive_some() == b""
        await more.aclose()
        assert isinstance(await ask(held[0], Follow(VERSION)), Trust)
        for stream in held:
            await trio.aclose_forcefully(stream)
        with trio.fail_after(10):
            while server.connections:
                await trio.sleep(0.01)
        async with await dialled(server, made) as stream:
            assert isinstance(await ask(stream, Follow(VERSION)), Trust)


async def test_silent_connections_make_room(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places are taken, by connections that say nothing or stall: one of them ends for a broker's."""
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 3)
    async with authority(made) as server:
        held = [await trio.open_tcp_stream(*server.bound) for _ in range(3)]
        with trio.fail_after(10):
            while server.connections < 3:
                await trio.sleep(0.01)
        async with await dialled(server, made) as stream:
            assert isinstance(await ask(stream, Follow(VERSION)), Trust)
        with trio.fail_after(10):
            assert await held[0].receive_some() == b""
        for tcp in held:
            await tcp.aclose()


async def test_silence_and_huge_handshakes_end_soon(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first byte comes soon or never, and a ClientHello above 32 KiB is not waited for."""
    monkeypatch.setattr(server_module, "FIRST_BYTES", 0.1)
    monkeypatch.setattr(server_module, "DEADLINE", 60.0)
    async with authority(made) as server:
        mute, huge = [await trio.open_tcp_stream(*server.bound) for _ in range(2)]
        body = b"\x01" + (120_000).to_bytes(3, "big") + b"\x03\x03" + bytes(16_000)
        record = b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body
        rest = b"\x16\x03\x01" + (16_000).to_bytes(2, "big") + bytes(16_000)
        with trio.fail_after(10):
            await huge.send_all(record + rest)
            try:
                await huge.send_all(rest)
                assert await huge.receive_some() == b""
            except trio.BrokenResourceError:
                pass  # a reset: it closed with bytes unread
            assert await mute.receive_some() == b""
            while server.connections:
                await trio.sleep(0.01)
        await mute.aclose()
        await huge.aclose()


async def test_everything_is_written_down_and_no_secret(made: Path) -> None:
    """enrolled, renewed, enrol_refused: who, which addresses, by which token, from where."""
    by = token(made, id="web")
    key = new_key()
    async with authority(made) as server, await dialled(server, made) as stream:
        with capture_logs() as lines:
            first = await ask(stream, enrol(by, key))
            await ask(stream, renewal(first.certificate, key))
            await ask(stream, enrol(by, agent_id="a2"))
            await ask(stream, Enrol(VERSION, b"\0", "web"))
        peer = stream.transport_stream.socket.getsockname()
    told = [line for line in lines if line["event"] in ("certificate_issued", "certificate_renewed", "enrol_refused")]
    assert [line["event"] for line in told] == [
        "certificate_issued",
        "certificate_renewed",
        "enrol_refused",
        "enrol_refused",
    ]
    assert {line["peer"] for line in told} == {f"127.0.0.1:{peer[1]}"}
    assert told[0]["subject"] == told[1]["subject"] == "agent/default/a1"
    assert told[0]["token"] == "web" and told[0]["addresses"] == ["10.1.0.7"]
    assert (told[2]["code"], told[2]["subject"], told[2]["token"]) == ("bad_token", "agent/default/a2", "web")
    assert told[3]["subject"] == ""
    text = str(lines)
    assert by.line().rpartition(".")[2] not in text and by.secret.hex() not in text and repr(by.secret) not in text


async def test_a_broken_store_is_said(made: Path) -> None:
    """The key file of the CA is gone: enrolling is refused with a word to try later; lists are still given."""
    by = token(made)
    async with authority(made) as server, await dialled(server, made) as stream:
        (made / "ca.key").rename(made / "away")
        with sqlite3.connect(made / "authority.db") as db:  # so that the directory is read anew
            db.execute("UPDATE tokens SET uses = uses + 1")
        db.close()
        answer = await ask(stream, enrol(by))
        assert answer.code == Refusal.AUTHORITY_UNAVAILABLE
        assert server.reasons() and "ca.key" in server.reasons()[0]
        assert (await ask(stream, Follow(VERSION))).signed
        (made / "away").rename(made / "ca.key")
        assert isinstance(await ask(stream, enrol(by)), Enrolled)


async def test_a_certificate_that_cant_be_made_ends_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left when its own is due: said, the one before is shown still, and the next try succeeds."""

    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    by = token(made)
    async with authority(made) as server:
        before = server._tls
        monkeypatch.setattr(server_module, "OWN_DAYS", 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", full)
            with trio.fail_after(15):
                while not server.reasons():
                    await trio.sleep(0.01)
            assert "Too many open files" in server.reasons()[0] and server._tls is before
        monkeypatch.setattr(server_module, "OWN_DAYS", 7)
        with trio.fail_after(15):
            while server.reasons():
                await trio.sleep(0.01)
        async with await dialled(server, made) as stream:
            assert isinstance(await ask(stream, enrol(by)), Enrolled)


async def test_its_own_certificate_follows_the_ca(made: Path) -> None:
    """After the switch it shows one from the new CA, without a restart; then who knows only the new one is served."""
    async with authority(made) as server:
        change(made, lambda opened: opened.start_rotation())
        change(made, lambda opened: opened.switch_rotation())
        new = (made / "ca.pem").read_text().partition("-----END CERTIFICATE-----\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=new[0] + new[1])
        with trio.fail_after(15):
            while True:
                tcp = await trio.open_tcp_stream(*server.bound)
                stream = trio.SSLStream(tcp, context, server_hostname=AUTHORITY_NAME, https_compatible=True)
                try:
                    await stream.do_handshake()
                    break
                except trio.BrokenResourceError:
                    await trio.sleep(0.05)
                finally:
                    await trio.aclose_forcefully(stream)


def test_the_process(made: Path) -> None:
    """`rtunnel authority` says where it listens, answers, and ends in order at SIGTERM."""
    by = token(made)
    command = [sys.executable, "-m", "rtunnel", "authority", "--directory", str(made), "--listen", "127.0.0.1:0"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RTUNNEL_LOG_FORMAT": "json"}
    with subprocess.Popen([*command, "--admin", ""], stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        try:
            lines = map(json.loads, process.stderr)
            host, port = next(line for line in lines if line["event"] == "authority_started")["listen"].split(":")
            context = client_context(made / "ca.pem")
            with (
                socket.create_connection((host, int(port)), 10) as tcp,
                context.wrap_socket(tcp, server_hostname=AUTHORITY_NAME) as stream,
            ):
                stream.sendall(encode(enrol(by)))
                decoder = decoder_of(Enrolled | Refuse, 1 << 16)
                while (answer := decoder.next()) is None:
                    decoder.feed(stream.recv(1 << 16))
                assert isinstance(answer, Enrolled)
            process.send_signal(signal.SIGTERM)
            assert [line["event"] for line in lines][-1] == "process_stopped"
            assert process.wait() == 0
        finally:
            process.kill()


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    """It is said before a start."""
    with pytest.raises(ConfigError, match=r"authority\.directory: .*authority\.db: can't be opened"):
        roles.check(load(None, {}, {"authority.directory": str(tmp_path)}), "authority")


def test_keys_that_others_can_read_are_a_warning(made: Path) -> None:
    loaded = load(None, {}, {"authority.directory": str(made)})
    assert roles.check(loaded, "authority") == []
    (made / "ca.key").chmod(0o644)
    (note,) = roles.check(loaded, "authority")
    assert "ca.key has mode 0644" in note.reason
