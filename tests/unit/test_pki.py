"""`rtunnel pki`: tokens, certificates, revocations and another CA, from the command line."""

from __future__ import annotations

import os
import re
import stat
import time
from operator import methodcaller
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from rtunnel import cli
from rtunnel.errors import TrustError
from rtunnel.trust import keys, pki
from rtunnel.trust.authority import Authority
from rtunnel.trust.certificates import new_key
from rtunnel.trust.identity import TrustStore, load_private_key
from rtunnel.trust.pki import Directory, open_directory
from rtunnel.trust.tls import certificate_der
from support.authority import change, enrol, renewal, token


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    pki.init(directory)
    return directory


def run(directory: Path, *arguments: str, code: int = 0) -> Result:
    """`rtunnel pki ... --dir directory`, which ends with this code."""
    result = CliRunner().invoke(cli.cli, ["pki", *arguments, "--dir", str(directory)])
    assert result.exit_code == code, result.output
    return result


def roots_of(directory: Path) -> TrustStore:
    """Of somebody who has the CA file and the list."""
    trust_store = TrustStore((directory / "ca.pem").read_bytes())
    with open_directory(directory) as opened:
        trust_store.take(opened.signed)
    return trust_store


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("init",),
        ("shared-token",),
        ("token",),
        ("token", "create"),
        ("token", "list"),
        ("token", "revoke"),
        ("issue",),
        ("issue", "broker"),
        ("issue", "agent"),
        ("issue", "gateway"),
        ("request",),
        ("list",),
        ("revoke",),
        ("show",),
        ("export",),
        ("rotate",),
        ("rotate", "start"),
        ("rotate", "switch"),
        ("rotate", "finish"),
    ],
)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    """--help says what it is for, and each option has a text."""
    result = CliRunner().invoke(cli.cli, ["pki", *command, "--help"])
    assert result.exit_code == 0
    here: click.Command = cli.cli
    for word in ("pki", *command):
        assert isinstance(here, click.Group)
        here = here.commands[word]
    assert here.help and here.help.split("\n\n")[0].split()[:8] == result.output.split("\n\n")[1].split()[:8]
    assert all(option.help for option in here.params if isinstance(option, click.Option))


@pytest.mark.parametrize("command", [("list",), ("show",), ("token", "list"), ("rotate", "start")])
def test_a_folder_that_is_no_directory(tmp_path: Path, command: tuple[str, ...]) -> None:
    """2, and how one is made."""
    assert "`rtunnel pki init` makes one" in run(tmp_path, *command, code=2).stderr


def test_a_file_that_is_no_store(made: Path) -> None:
    """Damaged, or of another version: said with its name."""
    (made / "authority.db").write_bytes(b"x" * 5000)
    assert "authority.db: can't be used" in run(made, "list", code=2).stderr
    (made / "authority.db").write_bytes(b"")
    assert "authority.db: has version 0" in run(made, "list", code=2).stderr


def test_secrets_stay_private(made: Path) -> None:
    """The store and what SQLite keeps beside it, a new CA's key, requests' keys: 0600 whatever the umask."""
    before = os.umask(0)
    try:
        with open_directory(made) as opened, opened.change():
            opened.publish()
            beside = sorted(made.glob("authority.db*"))
            assert len(beside) == 3
            modes = {stat.S_IMODE(path.stat().st_mode) for path in beside}
        run(made, "rotate", "start")
        result = CliRunner().invoke(cli.cli, ["pki", "request", "broker", "b2", "--into", str(made)])
        assert result.exit_code == 0
    finally:
        os.umask(before)
    modes |= {stat.S_IMODE((made / name).stat().st_mode) for name in ("ca-2.key", "b2.key")}
    assert modes == {0o600}
    assert stat.S_IMODE((made / "ca.pem").stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_is_the_owners(made: Path) -> None:
    """The authority runs as the directory's owner: the new CA's key, and what SQLite keeps, must be its own."""
    for path in (made, *made.iterdir()):
        os.chown(path, 4321, 4321)
    run(made, "rotate", "start")
    with open_directory(made) as opened, opened.change():
        opened.publish()
        assert {path.name for path in made.iterdir() if path.stat().st_uid != 4321} == set()
    assert {path.name for path in made.iterdir() if path.stat().st_uid != 4321} == set()


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens(made: Path) -> None:
    """A token is printed once, alone on stdout; the list has no secret; a revoked one is marked so."""
    networks = ("--cidr", "10.1.0.0/16", "--cidr", "fd00::/8")
    result = run(made, "token", "create", "--id", "web", "--uses", "3", "--cert-lifetime", "90m", *networks)
    (made / "token").write_text(result.stdout)
    token = keys.load_token(made / "token")
    assert token.id == "web" and "lets 3 agents of default in 10.1.0.0/16, fd00::/8 enrol" in result.stderr
    listed = run(made, "token", "list").output
    assert re.search(r"web +good +0/3 .* default +10\.1\.0\.0/16, fd00::/8 +90m", listed)
    assert result.stdout.strip().rpartition(".")[2] not in listed
    run(made, "token", "revoke", "web")
    assert re.search(r"web +revoked", run(made, "token", "list").output)
    assert "no token 'app'" in run(made, "token", "revoke", "app", code=2).stderr
    again = run(made, "token", "create", "--id", "web", *networks, code=2)
    assert "a token web exists already" in again.stderr and not again.stdout


def test_a_token_in_a_file(made: Path, tmp_path: Path) -> None:
    """For its owner only, and not on the screen. A file that is there stays, and then there is no token."""
    file = tmp_path / "host-7.token"
    create = ("token", "create", "--cidr", "10.1.0.7/32", "--file", str(file), "--id")
    result = run(made, *create, "a")
    token = keys.load_token(file)
    assert token.id == "a" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token.line() not in result.output
    assert "exists, and is not overwritten" in run(made, *create, "b", code=2).stderr
    assert keys.load_token(file) == token
    listed = run(made, "token", "list").output
    assert re.search(r"^a +good", listed, re.M) and not re.search(r"^b ", listed, re.M)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((), "--cidr"),
        (("--cidr", "10.1.0.7/16"), "write 10.1.0.0/16"),
        (("--cidr", "x"), "is not a network"),
        (("--cidr", "10.1.0.0/16", "--lifetime", "1"), "write it like 30m, 24h or 7d"),
        (("--cidr", "10.1.0.0/16", "--lifetime", "0h"), "not a duration"),
        (("--cidr", "10.1.0.0/16", "--uses", "0"), "--uses"),
        (("--cidr", "10.1.0.0/16", "--id", "a.b"), "can't be a token's id"),
        (("--cidr", "10.1.0.0/16", "--namespace", "a b"), "has a space"),
    ],
)
def test_tokens_that_cant_be(made: Path, wrong: tuple[str, ...], words: str) -> None:
    """2, the reason, and no token."""
    result = CliRunner().invoke(cli.cli, ["pki", "token", "create", "--dir", str(made), *wrong])
    assert result.exit_code == 2 and words in result.stderr
    with open_directory(made) as opened:
        assert opened.store.tokens() == []


# --- certificates -----------------------------------------------------------------------------------------------------


def test_certificates_by_hand_are_remembered(made: Path, tmp_path: Path) -> None:
    """Brokers and agents are listed with their addresses; files may go elsewhere."""
    run(made, "issue", "broker", "b2", "--name", "vip.example", "--into", str(tmp_path / "there"))
    run(made, "issue", "agent", "a1", "--namespace", "blue", "--address", "10.1.0.7", "--address", "fd00::7")
    lines = run(made, "list").output.splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == ["agent/blue/a1", "broker/b2", "broker/broker"]
    assert "10.1.0.7, fd00::7" in lines[0]
    assert roots_of(made).verify(certificate_der(tmp_path / "there" / "b2.pem")).subject == "broker/b2"
    assert "needs an address" in run(made, "issue", "agent", "a2", code=2).stderr
    assert "a1.pem: exists" in run(made, "issue", "agent", "a1", "--address", "10.1.0.8", code=2).stderr
    assert len(run(made, "list").output.splitlines()) == 4, "what was not written is not remembered"


def test_keys_can_stay_where_they_are(made: Path, tmp_path: Path) -> None:
    """A request's key never reaches the authority; its names must be those that are said here."""
    host = tmp_path / "host"
    for kind, more in (("agent", ("--address", "10.1.0.7", "--namespace", "blue")), ("broker", ())):
        made_there = CliRunner().invoke(cli.cli, ["pki", "request", kind, f"{kind}-1", *more, "--into", str(host)])
        assert made_there.exit_code == 0, made_there.output
    csr = ("--csr", str(host / "agent-1.csr"))
    assert "not for agent/default/agent-1" in run(made, "issue", "agent", "agent-1", *csr, code=2).stderr
    blue = ("--namespace", "blue", *csr)
    assert "not for 10.9" in run(made, "issue", "agent", "agent-1", *blue, "--address", "10.9.0.1", code=2).stderr
    assert "agent/blue/agent-1 for 10.1.0.7" in run(made, "issue", "agent", "agent-1", *blue).output
    run(made, "issue", "broker", "broker-1", "--csr", str(host / "broker-1.csr"))
    for name in ("agent-1", "broker-1"):
        assert not (made / f"{name}.key").exists()
        holder = roots_of(made).verify(certificate_der(made / f"{name}.pem"))
        assert holder.public_key == load_private_key(host / f"{name}.key").public_key()
    for file, words in (("ca.pem", "is not a certificate request"), ("none", "can't be read")):
        assert words in run(made, "issue", "broker", "b", "--csr", str(made / file), code=2).stderr


# --- revocation -------------------------------------------------------------------------------------------------------


def test_revoking(made: Path, tmp_path: Path) -> None:
    """The list says so; the certificate leaves `list`; a new one of the same second is good; another key is needed."""
    CliRunner().invoke(cli.cli, ["pki", "request", "agent", "a1", "--address", "10.1.0.7", "--into", str(tmp_path)])
    csr = ("--csr", str(tmp_path / "a1.csr"))
    run(made, "issue", "agent", "a1", *csr)
    number = roots_of(made).number
    assert "agent/default/a1 is revoked: 1 certificate " in run(made, "revoke", "default/a1").output
    trust_store = roots_of(made)
    assert trust_store.number > number and trust_store.generation < trust_store.number
    with pytest.raises(TrustError, match="revoked"):
        trust_store.verify(certificate_der(made / "a1.pem"))
    assert "agent/default/a1" not in run(made, "list").output
    assert "revoked: agent/default/a1" in run(made, "show").output
    again = ("issue", "agent", "a1", "--into", str(tmp_path / "new"))
    assert "make another key" in run(made, *again, *csr, code=2).stderr
    run(made, *again, "--address", "10.1.0.7")
    trust_store.verify(certificate_der(tmp_path / "new" / "a1.pem"))


def test_what_can_be_revoked(made: Path) -> None:
    """Known subjects; gateways' keys, which are issued without a record; unknown ones only by force."""
    assert "`rtunnel pki list`" in run(made, "revoke", "agent/default/typo", code=2).stderr
    run(made, "revoke", "agent/default/typo", "--force")
    run(made, "revoke", "gateway/g1")
    run(made, "revoke", "broker/broker")
    for wrong in ("a1", "", "agent/a/b/c", "broker/", "nobody/x/y"):
        assert "is not agent/NAMESPACE/ID" in run(made, "revoke", wrong, code=2).stderr
    assert set(roots_of(made).revoked) == {"agent/default/typo", "gateway/g1", "broker/broker"}


def test_revocations_leave_the_list_when_they_are_over(made: Path) -> None:
    """When everything that they made void has expired; those of gateways and forced ones never."""
    pki.issue_agent(made, "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"], days=1)
    pki.issue_agent(made, "a2", agent_id="a2", namespace="default", addresses=["10.1.0.8"], days=9)
    with open_directory(made) as opened, opened.change():
        for subject in ("agent/default/a1", "agent/default/a2", "gateway/g1"):
            opened.revoke(subject)
        for subject in ("agent/default/typo", "agent/default/a3"):
            opened.revoke(subject, force=True)
        opened.issue_agent("a3", new_key().public_key(), namespace="default", addresses=["10.1.0.9"], seconds=60)
        opened.revoke("agent/default/a3")
        assert len(opened.trust_store.revoked) == 5
        later = opened.now() + 2 * 86400
        opened.now = lambda: later
        opened.publish()
        assert set(opened.trust_store.revoked) == {
            "agent/default/a2",
            "agent/default/a3",
            "agent/default/typo",
            "gateway/g1",
        }


def test_an_open_token_is_named_when_its_agent_is_revoked(made: Path) -> None:
    """Or the agent would be back with it."""
    by = token(made, id="web", uses=3)
    directory = Directory(made)
    Authority(directory).enrol(enrol(by))
    directory.close()
    assert "`rtunnel pki token revoke web`" in run(made, "revoke", "default/a1").output


def test_an_open_token_is_named_when_its_agent_has_renewed_since(made: Path) -> None:
    """Its certificate is by no token then, and the one that was by a token is over."""
    by, key = token(made, id="web", uses=3, lifetime=90), new_key()
    start = time.time()
    directory = Directory(made, lambda: start - 100)
    first = Authority(directory).enrol(enrol(by, key)).answer.certificate
    directory.now = lambda: start - 30
    Authority(directory).enrol(renewal(first, key))
    directory.close()
    assert "`rtunnel pki token revoke web`" in run(made, "revoke", "default/a1").output


def test_a_list_has_room(made: Path) -> None:
    """1000 revocations fit; when there are too many the one that does not fit is refused, and nothing has changed."""
    name = "agent/default/" + "x" * 30
    with open_directory(made) as opened, opened.change():
        for number in range(1000):
            opened.store.revoke(f"{name}{number}", 1, None)
        opened.publish()
    before = roots_of(made)
    assert len(before.revoked) == 1000
    with (
        open_directory(made) as opened,
        pytest.raises(TrustError, match="too many revocations"),
        opened.change(),
    ):
        for number in range(1000, 1500):
            opened.store.revoke(f"{name}{number}", 1, None)
        opened.publish()
    assert roots_of(made).revoked == before.revoked


def test_after_a_backup_lists_are_newer(made: Path) -> None:
    """A store from yesterday gives out lists that count today: numbers are times."""
    backup = (made / "authority.db").read_bytes()
    for _ in range(3):
        change(made, lambda opened: opened.publish())
    seen = roots_of(made)
    (made / "authority.db").write_bytes(backup)
    with open_directory(made) as opened, opened.change():
        later = opened.now() + 60
        opened.now = lambda: later
        opened.revoke("gateway/g1")
        assert seen.take(opened.signed)


# --- another CA -------------------------------------------------------------------------------------------------------


def test_another_ca(made: Path, tmp_path: Path) -> None:
    """Three steps in their order and no other; what is trusted and what signs at each."""
    for step, words in (("switch", "was not started"), ("finish", "begin with `rtunnel pki rotate start`")):
        assert words in run(made, "rotate", step, code=2).stderr
    pki.issue_agent(made, "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
    old = (made / "ca.pem").read_bytes()
    follower = TrustStore(old)
    a1 = certificate_der(made / "a1.pem")

    assert "`rtunnel pki rotate switch`" in run(made, "rotate", "start").output
    assert count(made) == 2 and (made / "ca.pem").read_bytes().startswith(old)
    for step, words in (("start", "started already"), ("finish", "continue with `rtunnel pki rotate switch`")):
        assert words in run(made, "rotate", step, code=2).stderr
    assert take(follower, made) and len(follower.pem.split("BEGIN")) == 3
    run(made, "issue", "broker", "still-old")
    TrustStore(old).verify(certificate_der(made / "still-old.pem"))

    assert "from the old CA: 3 certificates" in run(made, "rotate", "switch").output
    for step, words in (
        ("start", "continue with `rtunnel pki rotate finish`"),
        ("switch", "continue with `rtunnel pki rotate finish`"),
    ):
        assert words in run(made, "rotate", step, code=2).stderr
    for name in ("broker", "still-old"):
        run(made, "issue", "broker", name, "--into", str(tmp_path / "new"))
    new = certificate_der(tmp_path / "new" / "broker.pem")
    with pytest.raises(TrustError):
        TrustStore(old).verify(new)
    follower.verify(new)
    refused = run(made, "rotate", "finish", code=2).stderr
    assert "1 of them (agent/default/a1)" in refused and "--force" in refused
    run(made, "issue", "agent", "a1", "--address", "10.1.0.7", "--into", str(tmp_path / "new"))
    follower.verify(a1)

    run(made, "rotate", "finish")
    assert count(made) == 1 and (made / "ca.pem").read_bytes() != old
    assert take(follower, made)
    follower.verify(new)
    with pytest.raises(TrustError, match="not from a CA in force"):
        follower.verify(a1)
    assert "CA 1: not in force" in run(made, "show").output
    listed = run(made, "list").output
    assert all(line.split()[-1] == "2" for line in listed.splitlines()[1:])
    assert take(TrustStore(old), made), "who was away all the time can't follow"
    (made / "ca.key").unlink()
    run(made, "revoke", "agent/default/a1")
    with pytest.raises(TrustError, match="not signed"):
        take(TrustStore(old), made)
    run(made, "rotate", "start")


def test_finishing_by_force(made: Path) -> None:
    """Says how many are left behind. The revoked don't count."""
    pki.issue_agent(made, "a1", agent_id="a1", namespace="default", addresses=["10.1.0.7"])
    run(made, "revoke", "default/a1")
    run(made, "rotate", "start")
    run(made, "rotate", "switch")
    assert "1 of them (broker/broker)" in run(made, "rotate", "finish", code=2).stderr
    assert "1 certificate became void" in run(made, "rotate", "finish", "--force").output


def test_a_ca_whose_key_was_stolen(made: Path) -> None:
    """The list says so, also when that is found out after the rotation; who has verified by it sees it."""
    follower = roots_of(made)
    who = follower.verify(certificate_der(made / "broker.pem"))
    assert "no rotation to finish" in run(made, "rotate", "finish", "--stolen", code=2).stderr
    for step in ("start", "switch"):
        run(made, "rotate", step)
        assert take(follower, made)
    run(made, "rotate", "finish", "--force")
    assert take(follower, made) and not follower.is_void(who)
    run(made, "rotate", "finish", "--stolen")
    assert take(follower, made) and follower.is_void(who)
    assert "CA 1: not in force; it was stolen" in run(made, "show").output
    assert "broker/broker" not in run(made, "list").output


def test_no_list_has_more_signatures_than_anybody_takes(made: Path) -> None:
    """The CA that would be one too many is not made, and the error says which files to delete."""
    follower = roots_of(made)
    for _ in range(15):
        for step in ("start_rotation", "switch_rotation"):
            change(made, methodcaller(step))
        change(made, lambda opened: opened.finish_rotation(force=True))
    assert take(follower, made)
    refused = run(made, "rotate", "start", code=2).stderr
    assert "there would be 17 CAs with a key" in refused and "(ca.key, ca-2.key, " in refused
    assert not (made / "ca-17.key").exists()
    (made / "ca.key").unlink()
    run(made, "rotate", "start")
    assert take(follower, made)


def test_a_rotation_that_fails_is_not_begun(made: Path) -> None:
    """The key of the present CA is not there: nothing changes."""
    (made / "ca.key").rename(made / "away")
    assert "ca.key: can't be read" in run(made, "rotate", "start", code=2).stderr
    (made / "away").rename(made / "ca.key")
    assert count(made) == 1
    run(made, "rotate", "start")


def test_export(made: Path, tmp_path: Path) -> None:
    """The list in a file, which replaces the one that is there."""
    file = tmp_path / "trust"
    file.write_text("old")
    run(made, "export", str(file))
    trust_store = TrustStore((made / "ca.pem").read_bytes())
    assert trust_store.take(file.read_bytes())
    assert "can't be written" in run(made, "export", str(tmp_path / "no" / "trust"), code=2).stderr


def count(directory: Path) -> int:
    """CAs in the file."""
    return len(x509.load_pem_x509_certificates((directory / "ca.pem").read_bytes()))


def take(trust_store: TrustStore, directory: Path) -> bool:
    with open_directory(directory) as opened:
        return trust_store.take(opened.signed)
