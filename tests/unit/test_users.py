"""The file of users: hashes, the command that writes it, what is wrong with it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from rtunnel import cli
from rtunnel.config import BadValue
from rtunnel.errors import TrustError
from rtunnel.trust import users
from rtunnel.trust.users import Hash, Users, load_users, new_hash, put_user, remove_user
from support.effort import times

#: RFC 7914 section 12, the second vector, cut to 64 bytes as it is there.
VECTOR = bytes.fromhex(
    "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b3731622eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes for tests take a millisecond."""
    monkeypatch.setattr(users, "_COST", (10, 1, 1))


def test_the_hash_is_scrypt() -> None:
    """A published vector fits."""
    entry = Hash((10, 8, 16), b"NaCl", VECTOR)
    assert entry.fits("password")
    assert not entry.fits("Password")


def test_new_hashes_cost_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 2^14, r = 8, p = 5, with a salt of its own each time."""
    monkeypatch.undo()
    one, other = new_hash("secret"), new_hash("secret")
    assert one.cost == (14, 8, 5) and one.salt != other.salt and one.key != other.key
    assert one.fits("secret") and not one.fits("Secret")


@given(password=st.text(min_size=1, max_size=60), other=st.text(max_size=60))
@settings(max_examples=times(30), deadline=None)
def test_only_the_password_fits(password: str, other: str) -> None:
    """Any text is a password, up to 255 bytes; surrogates can't come from UTF-8."""
    # With an end of its own: Hypothesis also draws words of our sources, which stand in logs and are no secrets there.
    password, other = (text.encode("utf-8", "ignore").decode() + "Zq7!xW2#" for text in (password, other))
    assert new_hash(password).fits(password)
    assert new_hash(password).fits(other) == (other == password)


def test_users_are_checked() -> None:
    """Right, wrong, unknown."""
    known = Users({"alice": new_hash("secret")})
    assert known.check("alice", "secret")
    assert not known.check("alice", "wrong")
    assert not known.check("bob", "secret")
    assert not Users({}).check("bob", "secret")


def test_unknown_users_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash of the cost that the file's users have, known or not."""
    known = Users({"a": new_hash("x"), "b": new_hash("y"), "old": Hash((11, 1, 1), b"s" * 16, b"k" * 32)})
    costs: list[object] = []

    def scrypt(password: str, salt: bytes, cost: object, size: int) -> bytes:
        costs.append(cost)
        return b""

    monkeypatch.setattr(users, "_scrypt", scrypt)
    for name in ("a", "nobody"):
        known.check(name, "z")
    assert costs == [(10, 1, 1), (10, 1, 1)]


def test_nothing_secret_in_texts() -> None:
    """Neither salt nor key is in a repr."""
    entry = new_hash("secret")
    assert repr(entry) == "Hash(cost=(10, 1, 1))"


# --- the file ---------------------------------------------------------------------------------------------


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    """For its owner only; comments and other users stay; another password replaces the line."""
    path = tmp_path / "users"
    assert put_user(path, "alice", new_hash("one"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# ours\n\n" + path.read_text())
    assert put_user(path, "bob@corp", new_hash("two"))
    assert not put_user(path, "alice", new_hash("three"))
    loaded = load_users(path)
    assert list(loaded.hashes) == ["alice", "bob@corp"]
    assert loaded.check("alice", "three") and not loaded.check("alice", "one")
    assert path.read_text().startswith("# ours\n\nalice:$scrypt$ln=10,r=1,p=1$")
    remove_user(path, "alice")
    assert list(load_users(path).hashes) == ["bob@corp"]
    assert path.read_text().startswith("# ours\n\nbob@corp:")
    assert os.listdir(tmp_path) == ["users"]  # noqa: PTH208
    with pytest.raises(TrustError, match="has no user alice"):
        remove_user(path, "alice")


def test_a_file_keeps_its_groups_rights(tmp_path: Path) -> None:
    """A gateway that reads by its group still can; others never may."""
    path = tmp_path / "users"
    put_user(path, "a", new_hash("x"))
    path.chmod(0o644)
    put_user(path, "a", new_hash("y"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    """The file behind it is written."""
    real, link = tmp_path / "real", tmp_path / "users"
    put_user(real, "a", new_hash("x"))
    link.symlink_to(real)
    put_user(link, "b", new_hash("x"))
    assert link.is_symlink() and len(load_users(real).hashes) == 2


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the file is as it was, and nothing lies beside it."""
    path = tmp_path / "users"
    put_user(path, "a", new_hash("x"))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrustError, match="can't be written: No space left"):
        put_user(path, "b", new_hash("x"))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["users"]  # noqa: PTH208


HASH = "$scrypt$ln=10,r=1,p=1$c2FsdHNhbHRzYWx0c2FsdA$" + "a" * 43


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"alice:{HASH}\nalice:{HASH}", ":2: is a second line for the user alice"),
        ("alice", ":1: alice: the hash is not"),
        ("alice:hunter2", ":1: alice: the hash is not"),
        (":x", ":1: does not begin with a user's name"),
        (f"a b:{HASH}", ":1: does not begin with a user's name"),
        (f"*:{HASH}", ":1: does not begin with a user's name"),
        (f"alice:{HASH.replace('ln=10', 'ln=09')}", ":1: alice: ln=9, r=1, p=1 is too cheap"),
        (f"alice:{HASH.replace('ln=10,r=1', 'ln=17,r=9')}", "takes more than 128 MiB"),
        (f"alice:{HASH.replace('ln=10', 'ln=99')}", "takes more than 128 MiB"),
        (f"alice:{HASH}aa", ":1: alice: the hash is damaged"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_told_without_the_secret(tmp_path: Path, line: str, told: str) -> None:
    """File, line, name, reason; never what stands behind the name."""
    path = tmp_path / "users"
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(TrustError) as caught:
        load_users(path)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value) and "c2Fsd" not in str(caught.value)


def test_a_password_must_be_one_that_clients_can_send() -> None:
    """1 to 255 bytes (RFC 1929)."""
    assert new_hash("x" * 255).fits("x" * 255)
    for bad in ("", "x" * 256, "ü" * 128):
        with pytest.raises(BadValue):
            new_hash(bad)


# --- rtunnel user -----------------------------------------------------------------------------------------


def user(*arguments: str, text: str = "") -> Result:
    return CliRunner().invoke(cli.cli, ["user", *arguments], input=text)


def test_the_command(tmp_path: Path) -> None:
    """add, list, remove; the password comes from stdin and is not shown."""
    path = str(tmp_path / "users")
    added = user("add", "alice", "--file", path, text="secret word\nmore\n")
    assert (added.exit_code, added.output) == (0, f"{path}: alice added\n")
    assert user("add", "alice", "--file", path, text="other").output == f"{path}: alice has another password\n"
    user("add", "bob", "--file", path, text="x")
    assert load_users(path).check("alice", "other")
    assert user("list", "--file", path).output == "alice\nbob\n"
    assert user("remove", "alice", "--file", path).output == f"{path}: alice removed\n"
    assert user("list", "--file", path).output == "bob\n"


def test_the_command_by_the_configuration(tmp_path: Path) -> None:
    """--config names the file; without any, that is told."""
    (tmp_path / "rtunnel.toml").write_text('[gateway]\nusers = "users"\n')
    assert user("add", "alice", "--config", str(tmp_path / "rtunnel.toml"), text="x").exit_code == 0
    assert list(load_users(tmp_path / "users").hashes) == ["alice"]
    assert user("list").exit_code == 2


@pytest.mark.parametrize(("name", "password"), [("a:b", "x"), ("*", "x"), ("#a", "x"), ("a b", "x"), ("a", "")])
def test_the_command_refuses(tmp_path: Path, name: str, password: str) -> None:
    """Names that can't be, and an empty password: code 2, and no file."""
    assert user("add", name, "--file", str(tmp_path / "users"), text=password).exit_code == 2
    assert not (tmp_path / "users").exists()
