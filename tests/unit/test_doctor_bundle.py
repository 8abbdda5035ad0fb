"""The doctor's bundle: what is in it, and that no secret is, whatever is put in."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path

import pytest

from rtunnel.config import Config, load
from rtunnel.doctor import bundle
from rtunnel.doctor.bundle import BundleError, redact, without_password
from rtunnel.doctor.facts import OwnRole
from rtunnel.doctor.findings import fail
from rtunnel.trust import keys, pki, users
from rtunnel.trust.users import new_hash, put_user
from support.secrecy import Needles, Secrets, heard

URL_PASSWORD = "p4ss/w@rd-of-redis"
URL = "redis://rt:p4ss%2Fw%40rd-of-redis@10.0.0.5:6379/0?password=0ther-pa55word"
LOGIN = "quite-a-pa55word"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_COST", (10, 1, 1))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """All kinds of secret files of a cluster."""
    pki.init(tmp_path / "pki")
    put_user(tmp_path / "pki" / "users", "alice", new_hash(LOGIN))
    (tmp_path / "pki" / "api.token").write_text("an-api-token-0123456789abcdef\n")
    return tmp_path / "pki"


def config(made: Path) -> Config:
    return load(
        None,
        {"RTUNNEL_REGISTRY_URL": URL},
        {
            "broker.cluster_key": str(made / "cluster.key"),
            "broker.join_token": str(made / "join.token"),
            "broker.certificate": str(made / "broker.pem"),
            "broker.key": str(made / "broker.key"),
            "gateway.key": str(made / "gateway.key"),
            "gateway.users": str(made / "users"),
            "gateway.admin_token": str(made / "api.token"),
        },
    )


def secrets_of(made: Path) -> Secrets:
    """All that must not be in a bundle."""
    found = Secrets()
    for path in made.rglob("*"):
        if path.is_file():
            found.add_content(path.read_bytes(), path.name)
    for text in (URL_PASSWORD, "0ther-pa55word", LOGIN, "an-api-token-0123456789abcdef"):
        found.add_text(text, text[:4])
    return found


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = {}
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            assert file is not None and entry.isreg() and entry.mode == 0o600
            found[entry.name.removeprefix("rtunnel-doctor/")] = file.read().decode()
    for name, text in found.items():
        heard(text, f"the bundle's {name}")
    return found


def leaky_log(made: Path) -> str:
    """Every secret as a careless program might log it."""
    token = keys.load_token(made / "join.token")
    lines = [
        "a good line",
        f"connecting to {URL}",
        "redis://:p4ss/w@rd-of-redis@10.0.0.5/0 failed",
        f"token {token.line()}",
        (made / "cluster.key").read_text().strip(),
        (made / "gateway.key").read_text().strip(),
        (made / "broker.key").read_text().strip(),
        (made / "users").read_text().strip(),
        "Authorization: Bearer an-api-token-0123456789abcdef",
        "the last line",
    ]
    return "\n".join(lines) + "\n"


def test_the_bundle_has_all_but_secrets(made: Path, tmp_path: Path) -> None:
    """Files are named with their modes; no line of any part has a secret, by the suite's own scanner."""
    log, path = tmp_path / "role.journal", tmp_path / "out.tar.gz"
    log.write_text(leaky_log(made))
    path.write_text("an older bundle")
    path.chmod(0o644)
    own = OwnRole("127.0.0.1:7070", "", True, (), (), {"sessions": 3})
    bundle.write(
        path, config(made), [fail("clock", "it is off", "set it")], {"roles": [{"role": "broker", "own": own}]}, [log]
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    parts = unpacked(path)
    assert set(parts) == {
        "report.txt", "report.json", "config.json", "versions.json", "statusz-broker.json", "logs/1-role.journal",
    }  # fmt: skip
    assert parts["report.txt"] == "FAIL  clock         it is off. Fix: set it\n"
    assert json.loads(parts["report.json"])["findings"][0]["level"] == "FAIL"
    assert json.loads(parts["statusz-broker.json"]) == {"sessions": 3}
    assert json.loads(parts["versions.json"])["packages"]["trio"]
    keys_of = {entry["key"]: entry for entry in json.loads(parts["config.json"])}
    assert keys_of["broker.key"]["secret"] and keys_of["broker.key"]["file"]["mode"] == "0600"
    assert keys_of["registry.url"]["value"] == "redis://[cut]@10.0.0.5:6379/0"
    assert keys_of["registry.url"]["source"] == "$RTUNNEL_REGISTRY_URL"
    needles = Needles(secrets_of(made))
    assert needles.find(leaky_log(made).splitlines()[3]) is not None, "the scanner must know these secrets"
    leaks = [(name, needles.find(line)) for name, text in parts.items() for line in text.splitlines()]
    assert not [leak for leak in leaks if leak[1] is not None]
    assert {"a good line", "the last line"} <= set(parts["logs/1-role.journal"].splitlines())


def test_a_long_log_is_cut_to_its_end(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines count, and no more bytes are read than the bound."""
    monkeypatch.setattr(bundle, "MAX_LINES", 2)
    log = tmp_path / "x.journal"
    log.write_text("one\ntwo\nthree\n")
    assert bundle.tail(log, config(made)) == "two\nthree\n"
    monkeypatch.setattr(bundle, "MAX_LOG_BYTES", 5)
    assert bundle.tail(log, config(made)) == "hree\n"


def test_what_is_no_log_is_refused(made: Path, tmp_path: Path) -> None:
    """A secret file under another name, a folder, nothing there, and too many."""
    (tmp_path / "link.log").symlink_to(made / "api.token")
    for path, text in (
        (tmp_path / "link.log", "is the secret file of gateway.admin_token"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "none", "can't be read"),
    ):
        with pytest.raises(BundleError, match=text):
            bundle.tail(path, config(made))
    with pytest.raises(BundleError, match="give at most 8"):
        bundle.write(tmp_path / "x", config(made), [], {}, [tmp_path] * 9)
    with pytest.raises(BundleError, match="can't be written"):
        bundle.write(tmp_path / "none" / "x", config(made), [], {}, [])


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("redis://10.0.0.5:6379/0 is down", "redis://10.0.0.5:6379/0 is down"),
        ("redis://u:p@10.0.0.5/0", "redis://[cut]@10.0.0.5/0"),
        ("rediss://:p@w/d@10.0.0.5/0 x", "rediss://[cut]@10.0.0.5/0 x"),
        ("unix:///run/x.sock?password=abc&db=1", "unix:///run/x.sock?password=[cut]&db=1"),
        ("https://u:p@proxy:3128/x@y", "https://[cut]@proxy:3128/x@y"),
        ("http://10.1.0.7:80/a@b", "http://10.1.0.7:80/a@b"),
        ("x -----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY----- y", "x [cut] y"),
        ("x -----BEGIN EC PRIVATE KEY-----\nabc", "x [cut]"),
        ("alice $scrypt$ln=14$abc$def z", "alice [cut] z"),
        ("Authorization: Basic YWxpY2U6eA==", "Authorization: Basic [cut]"),
        ("rtunnel-agent.service: Started", "rtunnel-agent.service: Started"),
    ],
)
def test_what_looks_like_a_secret_is_cut(text: str, cut: str) -> None:
    """And nothing else."""
    assert redact(text) == cut


def test_a_url_keeps_its_place_only() -> None:
    """Without user, password and options."""
    assert without_password("unix:///run/redis.sock?password=x") == "unix:///run/redis.sock"
    assert without_password("redis+sentinel://:x@a:26379,b:26379/m/0") == "redis+sentinel://[cut]@a:26379,b:26379/m/0"
