"""The anchor: lists come by file and from the authority, outlive its outages, and forged ones count for nothing."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from rtunnel import watch
from rtunnel.config import format_endpoint
from rtunnel.errors import TrustError
from rtunnel.trust import follower as follower_module
from rtunnel.trust import pki
from rtunnel.trust.certificates import new_key
from rtunnel.trust.files import PUBLIC, replace
from rtunnel.trust.identity import TrustStore
from rtunnel.trust.pki import Directory, open_directory
from rtunnel.trust.tls import certificate_der, server_context
from rtunnel.wire.refusal import Refusal, Refused
from support.authority import Following, address, authority, change, enrol, following, renewal, token


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A cluster with an agent a1."""
    directory = tmp_path / "pki"
    pki.init(directory)
    pki.issue_agent(directory, "a1", agent_id="a1", namespace="default", addresses=["10.1.9.9"])
    return directory


#: What a follower waits for by itself, and so would each test.
PAUSES: list[tuple[Any, str]] = [(follower_module, "FOLLOW_SECONDS"), (watch, "LOOK_SECONDS")]
_OWN: list[float] = [getattr(module, name) for module, name in PAUSES]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the authority and look at files often."""
    for module, name in PAUSES:
        monkeypatch.setattr(module, name, 0.05)


@pytest.fixture
def own_pace(_quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask and look as rarely as the product does: for promises of how soon something is heard."""
    for (module, name), seconds in zip(PAUSES, _OWN, strict=True):
        monkeypatch.setattr(module, name, seconds)


def list_of(directory: Path) -> bytes:
    """The signed one that is in force."""
    with open_directory(directory) as opened:
        return opened.signed


def revoke_a1(directory: Path) -> None:
    change(directory, lambda opened: opened.revoke("agent/default/a1"))


async def until(true: Callable[[], Any]) -> None:
    with trio.fail_after(15):
        while not true():
            await trio.sleep(0.01)


# --- the authority ----------------------------------------------------------------------------------------------------


async def test_it_follows_the_authority_and_keeps_what_it_heard(made: Path, tmp_path: Path, own_pace: None) -> None:
    """A revocation arrives within 5 s, is told once, and is there at the next start without the authority."""
    der = certificate_der(made / "a1.pem")
    kept = tmp_path / "trust"
    async with authority(made) as server, following(made / "ca.pem", kept, address(server)) as here:
        await here.until(lambda: here.follower.trust_store.number > 0)
        here.follower.trust_store.verify(der)
        revoke_a1(made)
        with trio.fail_after(5):
            await here.until(lambda: bool(here.follower.trust_store.revoked))
        with pytest.raises(TrustError, match="revoked"):
            here.follower.trust_store.verify(der)
        await until(lambda: kept.exists() and kept.read_bytes() == here.follower.trust_store.signed)
        assert here.changes == sorted(set(here.changes)) and len(here.changes) == 2
        assert here.follower.status() == {
            "number": here.follower.trust_store.number,
            "generation": here.follower.trust_store.generation,
            "revoked": 1,
            "authority": "ok",
            "kept": "ok",
        }
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644
    later = Following(made / "ca.pem", kept).follower
    with pytest.raises(TrustError, match="revoked"):
        later.trust_store.verify(der)


async def test_it_carries_enrols(made: Path) -> None:
    """Enrolled and Refused come through; the certificate is of a CA in force."""
    key = new_key()
    one = token(made)
    async with authority(made) as server, following(made / "ca.pem", None, address(server)) as here:
        answer = await here.follower.enrol(enrol(one, key, agent_id="a2"))
        who = here.follower.trust_store.verify(answer.certificate)
        assert (who.subject, who.addresses) == ("agent/default/a2", frozenset({"10.1.0.7"}))
        again = await here.follower.enrol(renewal(answer.certificate, key, agent_id="a2"))
        assert here.follower.trust_store.verify(again.certificate).subject == who.subject
        with pytest.raises(Refused) as caught:
            await here.follower.enrol(enrol(one))
        assert caught.value.code is Refusal.BAD_TOKEN and "used up" in caught.value.text


async def test_a_list_that_comes_while_the_authority_is_dialled(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TLS context of before is gone then; the request goes on with one of the CAs in force now."""
    dial = trio.open_tcp_stream
    async with authority(made) as server, following(made / "ca.pem", None, address(server)) as here:

        async def dial_slowly(host: str, port: int) -> trio.SocketStream:
            stream = await dial(host, port)
            here.follower._context = None
            return stream

        monkeypatch.setattr(trio, "open_tcp_stream", dial_slowly)
        assert (await here.follower.enrol(enrol(token(made), agent_id="a2"))).certificate


async def test_who_is_no_ca_is_none(made: Path) -> None:
    """A CA file with somebody's certificate is refused at once, and not met by the first Enrol; from lists as well."""
    with pytest.raises(TrustError, match=r"broker\.pem: .* is not of a CA"):
        Following(made / "broker.pem")
    with pytest.raises(TrustError, match="CAs in force"):
        server_context(made / "broker.pem", made / "broker.key", clients="noise")


async def test_a_list_is_kept_as_soon_as_it_can_be(made: Path, tmp_path: Path) -> None:
    """The disk was full: the next start must not begin with the list of before."""
    file = tmp_path / "folder" / "trust"
    async with authority(made) as server, following(made / "ca.pem", file, address(server)) as here:
        await until(lambda: "can't be written" in str(here.follower.status()["kept"]))
        file.parent.mkdir()
        await until(file.exists)
        await until(lambda: here.follower.status()["kept"] == "ok")
        assert file.read_bytes() == here.follower.trust_store.signed


async def test_a_storm_of_enrols(made: Path) -> None:
    """Many at once are all answered, over a few connections."""
    by = token(made, uses=100)
    async with authority(made) as server, following(made / "ca.pem", None, address(server)) as here:
        done: list[bytes] = []

        async def one(number: int) -> None:
            answer = await here.follower.enrol(enrol(by, agent_id=f"b{number}", addresses=[f"10.1.0.{number}"]))
            done.append(answer.certificate)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
        assert len(set(done)) == 100
        assert server.connections <= follower_module.MAX_LINES + 1


async def test_it_outlives_the_authority(made: Path) -> None:
    """Away from the start, there, away, back: what was in force stays, enrolling is refused meanwhile, then goes on."""
    reserved = socket.create_server(("127.0.0.1", 0))
    where = format_endpoint(*reserved.getsockname())
    reserved.close()
    by = token(made, uses=5)
    with capture_logs() as lines:
        async with following(made / "ca.pem", None, where) as here:
            with pytest.raises(Refused) as caught:
                await here.follower.enrol(enrol(by, agent_id="a2"))
            assert caught.value.code is Refusal.AUTHORITY_UNAVAILABLE and "refused" in caught.value.text
            await until(lambda: "refused" in str(here.follower.status()["authority"]))
            async with authority(made, where):
                await here.until(lambda: here.follower.trust_store.number > 0)
                await here.follower.enrol(enrol(by, agent_id="a2"))
                revoke_a1(made)
                await here.until(lambda: bool(here.follower.trust_store.revoked))
            number = here.follower.trust_store.number
            await until(lambda: here.follower.status()["authority"] != "ok")
            with pytest.raises(Refused):
                await here.follower.enrol(enrol(by, agent_id="a2"))
            assert (here.follower.trust_store.number, len(here.follower.trust_store.revoked)) == (number, 1)
            async with authority(made, where):
                await here.follower.enrol(enrol(by, agent_id="a2"))
                await until(lambda: here.follower.status()["authority"] == "ok")
    events = [line["event"] for line in lines]
    assert events.count("authority_reached") == 2
    assert 2 <= events.count("authority_unavailable") <= 4, "an outage is told when it begins, or looks different"


async def test_a_silent_authority_is_given_up(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes connections and answers nothing is unavailable after its time."""
    monkeypatch.setattr(follower_module, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        here = Following(made / "ca.pem", None, format_endpoint(*mute.getsockname()))
        with pytest.raises(Refused) as caught:
            await here.follower.enrol(enrol(token(made), agent_id="a2"))
    assert caught.value.code is Refusal.AUTHORITY_UNAVAILABLE and "no answer within" in caught.value.text


async def test_an_authority_of_another_cluster_is_none(made: Path, tmp_path: Path) -> None:
    """Its certificate is not good: nothing of it is taken, no token is shown to it."""
    pki.init(tmp_path / "theirs")
    async with authority(tmp_path / "theirs") as server, following(made / "ca.pem", None, address(server)) as here:
        with pytest.raises(Refused) as caught:
            await here.follower.enrol(enrol(token(made), agent_id="a2"))
        assert "certificate is not good" in caught.value.text
        await until(lambda: "certificate is not good" in str(here.follower.status()["authority"]))
        assert here.follower.trust_store.number == 0 and here.changes == []
        assert server.status()["refused"] == {}


async def test_a_broker_is_no_authority(made: Path) -> None:
    """A certificate of the right CA, but a broker's: the name decides."""
    context = server_context(made / "broker.pem", made / "broker.key")

    async def serve(tcp: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await trio.SSLStream(tcp, context, server_side=True).do_handshake()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        here = Following(made / "ca.pem", None, format_endpoint(*listeners[0].socket.getsockname()))
        with pytest.raises(Refused) as caught:
            await here.follower.enrol(enrol(token(made), agent_id="a2"))
        assert "certificate is not good" in caught.value.text
        nursery.cancel_scope.cancel()


async def test_without_an_authority(made: Path) -> None:
    """Lists come by file only, and nobody enrols."""
    here = Following(made / "ca.pem")
    with pytest.raises(Refused) as caught:
        await here.follower.enrol(enrol(token(made), agent_id="a2"))
    assert caught.value.code is Refusal.AUTHORITY_UNAVAILABLE and "no authority is configured" in caught.value.text
    assert here.follower.status() | {"authority": "none", "kept": "no file", "number": 0} == here.follower.status()


async def test_a_list_that_cant_be_kept_is_in_force(made: Path, tmp_path: Path) -> None:
    """The folder is not there: said, and nothing else."""
    async with (
        authority(made) as server,
        following(made / "ca.pem", tmp_path / "no" / "trust", address(server)) as here,
    ):
        await until(lambda: "can't be written" in str(here.follower.status()["kept"]))
        assert here.follower.trust_store.number > 0
        revoke_a1(made)
        await here.until(lambda: bool(here.follower.trust_store.revoked))


# --- files ------------------------------------------------------------------------------------------------------------


async def test_a_list_by_hand(made: Path, tmp_path: Path) -> None:
    """A newer list in the file counts as soon as it is there; an older one changes nothing."""
    file = tmp_path / "trust"
    old = list_of(made)
    replace(file, PUBLIC, old)
    async with following(made / "ca.pem", file) as here:
        number = here.follower.trust_store.number
        assert number > 0
        revoke_a1(made)
        replace(file, PUBLIC, list_of(made))
        await here.until(lambda: here.follower.trust_store.number > number)
        assert here.follower.trust_store.revoked
        with capture_logs() as lines:
            replace(file, PUBLIC, old)
            await until(lambda: [line for line in lines if line["event"] == "trust_loaded"])
        assert here.follower.trust_store.number > number and len(here.changes) == 1


@pytest.mark.parametrize("fault", ["garbage", "tampered", "theirs", "gone"])
async def test_bad_lists_change_nothing(made: Path, tmp_path: Path, fault: str) -> None:
    """While it runs: told, and what was in force stays. At the start: it does not start."""
    revoke_a1(made)
    good = list_of(made)
    file = tmp_path / "trust"
    pki.init(tmp_path / "theirs")
    change(tmp_path / "theirs", lambda opened: opened.publish())
    bad = {
        "garbage": b"garbage",
        "tampered": good.replace(b"agent/default/a1", b"agent/default/a2"),
        "theirs": _later(tmp_path / "theirs"),
    }.get(fault)
    replace(file, PUBLIC, good)
    async with following(made / "ca.pem", file) as here:
        change(made, lambda opened: opened.publish())
        with capture_logs() as lines:
            if bad is None:
                file.unlink()
            else:
                replace(file, PUBLIC, bad if fault != "tampered" else _tampered(made))
            await until(lambda: [line for line in lines if line["event"] == "trust_rejected"])
        (line,) = [line for line in lines if line["event"] == "trust_rejected"]
        assert str(file) in line["reason"]
        assert here.follower.trust_store.signed == good and here.changes == []
    if bad is not None:
        with pytest.raises(TrustError, match=str(file)):
            Following(made / "ca.pem", file)


def _tampered(directory: Path) -> bytes:
    """A newer list, with somebody else revoked."""
    return list_of(directory).replace(b"agent/default/a1", b"agent/default/a2")


def _later(directory: Path) -> bytes:
    """A list with a number above all that this test knows."""
    with open_directory(directory) as opened, opened.change():
        opened.now = lambda: 4e9
        opened.publish()
    return list_of(directory)


async def test_another_ca_file(made: Path, tmp_path: Path) -> None:
    """Put into place while it runs, it counts: a list of the new CA is taken, one of the old is not any more."""
    file, ca = tmp_path / "trust", tmp_path / "ca.pem"
    replace(ca, PUBLIC, (made / "ca.pem").read_bytes())
    replace(file, PUBLIC, list_of(made))
    pki.init(tmp_path / "other")
    async with following(ca, file) as here:
        assert here.follower.trust_store.number > 0
        replace(ca, PUBLIC, (tmp_path / "other" / "ca.pem").read_bytes())
        await here.until(lambda: bool(here.changes))
        assert here.follower.trust_store.number == 0
        with pytest.raises(TrustError):
            here.follower.trust_store.verify(certificate_der(made / "a1.pem"))
        replace(file, PUBLIC, list_of(tmp_path / "other"))
        await here.until(lambda: here.follower.trust_store.number > 0)
        here.follower.trust_store.verify(certificate_der(tmp_path / "other" / "broker.pem"))


def test_the_list_in_force_survives_a_ca_file_of_its_own_ca(made: Path) -> None:
    """Roots.begin_again: a list that one of the CAs has signed stays; else only its revocations do."""
    revoke_a1(made)
    trust_store = TrustStore((made / "ca.pem").read_bytes())
    trust_store.take(list_of(made))
    number, revoked = trust_store.number, trust_store.revoked
    trust_store.begin_again((made / "ca.pem").read_bytes())
    assert (trust_store.number, trust_store.revoked) == (number, revoked)
    with pytest.raises(TrustError, match="no PEM"):
        trust_store.begin_again(b"")
    assert trust_store.number == number
    other = made.parent / "other"
    pki.init(other)
    trust_store.begin_again((other / "ca.pem").read_bytes())
    assert (trust_store.number, trust_store.revoked) == (0, revoked)


def test_files_that_cant_be_used(made: Path, tmp_path: Path) -> None:
    """Named at the start."""
    with pytest.raises(TrustError, match="none: can't be read"):
        Following(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(TrustError, match="empty: has no PEM"):
        Following(tmp_path / "empty")
    (tmp_path / "long").write_bytes(b"x" * 70_000)
    with pytest.raises(TrustError, match="long: is longer than 65536 bytes"):
        Following(made / "ca.pem", tmp_path / "long")


# --- from CA to CA ----------------------------------------------------------------------------------------------------


async def test_through_a_whole_rotation(made: Path, tmp_path: Path) -> None:
    """A follower trusts the new CA before anything comes from it, and the old one until the end; it starts again with
    the CA file of before; and so does one that was away all the time."""
    ca, file = tmp_path / "ca.pem", tmp_path / "trust"
    replace(ca, PUBLIC, (made / "ca.pem").read_bytes())
    old = certificate_der(made / "a1.pem")
    async with authority(made) as server:
        async with following(ca, file, address(server)) as here:
            await here.until(lambda: here.follower.trust_store.number > 0)

            async def heard() -> None:
                number = number_of(made)
                await here.until(lambda: here.follower.trust_store.number == number)

            change(made, lambda opened: opened.start_rotation())
            await heard()
            here.follower.trust_store.verify(old)
            change(made, lambda opened: opened.switch_rotation())
            pki.issue_agent(made, "n1", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
            pki.issue_broker(made, "broker", into=tmp_path / "new")
            new = certificate_der(made / "n1.pem")
            for der in (old, new):
                here.follower.trust_store.verify(der)
            await heard()
            change(made, lambda opened: opened.finish_rotation())
            await heard()
            here.follower.trust_store.verify(new)
            with pytest.raises(TrustError, match="not from a CA in force"):
                here.follower.trust_store.verify(old)
            assert len(set(here.changes)) == len(here.changes) == 4
        change(made, lambda opened: opened.publish())
        async with following(ca, file, address(server)) as again:
            again.follower.trust_store.verify(new)
            number = number_of(made)
            await again.until(lambda: again.follower.trust_store.number == number)
        away = Following(ca)
        assert away.follower.trust_store.take(list_of(made))
        away.follower.trust_store.verify(new)


async def test_it_finds_the_authority_of_the_new_ca(made: Path) -> None:
    """Which starts again after the rotation: the anchor, which does not, trusts it for new connections."""
    reserved = socket.create_server(("127.0.0.1", 0))
    where = format_endpoint(*reserved.getsockname())
    reserved.close()
    async with following(made / "ca.pem", None, where) as here:
        for step in (Directory.start_rotation, Directory.switch_rotation, _finish):
            async with authority(made, where):
                change(made, step)
                await here.until(partial(_has, here, number_of(made)))


def _finish(directory: Directory) -> None:
    directory.finish_rotation(force=True)


def _has(here: Following, number: int) -> bool:
    return here.follower.trust_store.number == number


def number_of(directory: Path) -> int:
    with open_directory(directory) as opened:
        return opened.number
