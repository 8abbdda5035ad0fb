"""The ears for secrets hear: a session that leaks fails, whatever the way and the form; one that does not, passes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CONFTEST = """
from support import secrecy
def pytest_configure(config): config.pluginmanager.register(secrecy, "secrecy")
"""
COMMON = """
import base64, logging, os, subprocess, sys
from urllib.parse import quote
import pytest
from rtunnel.logs import get_logger
from rtunnel.trust import keys, pki, users
from rtunnel.trust.identity import load_private_key
from support.secrecy import heard, is_secret

log = get_logger("x")

@pytest.fixture
def made(tmp_path):
    pki.init(tmp_path / "pki")
    return tmp_path / "pki"
"""
QUIET = """
def test_quiet(made, tmp_path):
    token, key = keys.load_token(made / "join.token"), keys.load_cluster_keys(made / "cluster.key")[0]
    users.put_user(tmp_path / "users", "alice", users.new_hash("correct horse"))
    log.info("ready", token=token, certificate=(made / "ca.pem").read_text(), directory=str(made), id=token.id)
    log.info("key", mac=keys.gateway_key(key, "g").sign(b"x"), user="alice", redis="redis://127.0.0.1:6379/0")
    (tmp_path / "role.log").write_text("nothing here")
    print((made / "cluster.key").read_text())
"""
#: Each is one test that must be named; `key` is the cluster key's bytes.
LEAKS = {
    "hex": "log.info('x', key=key.hex())",
    "hex_in_capitals": "log.info('x', key=key.hex().upper())",
    "bytes": "log.info('x', key=key)",
    "part_of_more_bytes": "log.info('x', frame=b'ab' + key + b'c')",
    "repr": "log.info('x', text=repr(key))",
    "escaped_twice": "log.info('x', text=repr([repr(key)]))",
    "base64url": "log.info('x', text=base64.urlsafe_b64encode(b'1' + key).decode())",
    "half_of_it": "log.info('x', text=key.hex()[:30])",
    "the_file": "log.info('x', text=(made / 'cluster.key').read_text())",
    "the_token": "log.info('x', text=keys.load_token(made / 'join.token').line())",
    "the_private_key": "log.info('x', text=(made / 'ca.key').read_text())",
    "an_exception": "\n    try: raise ValueError(key.hex())\n    except ValueError: log.exception('x')",
    "a_library": (
        "\n    from rtunnel import logs, config\n    logs.setup(config.LogConfig())"
        "\n    logging.getLogger('lib').error(key.hex())"
    ),
    "bound": "log.bind(key=key.hex()).info('x')",
    "a_password": "users.new_hash('correct horse'); log.info('x', text='login of correct horse failed')",
    "a_password_in_basic": (
        "users.new_hash('correct horse'); log.info('x', text=base64.b64encode(b'alice:correct horse').decode())"
    ),
    "a_password_quoted": "users.new_hash('correct horse'); log.info('x', text=quote('correct horse'))",
    "a_password_hash": "log.info('x', text=users.new_hash('correct horse').text())",
    "the_password_of_redis": "is_secret('s3cret-of-redis', 'a Redis'); log.info('x', url='redis://:s3cret-of-redis@h/0')",
    "a_url_in_a_file": (
        "(tmp_path / 'x.toml').write_text('url = \"redis://u:pa55-word@h/0\"'); log.info('x', text='auth pa55-word')"
    ),
    "stderr": "print(key.hex(), file=sys.stderr)",
    "stderr_of_a_process": "subprocess.run([sys.executable, '-c', f'import os; os.write(2, b{key.hex()!r})'])",
    "what_a_helper_heard": "heard(key.hex())",
    "a_log_file": "(tmp_path / 'role.log').write_text(key.hex())",
    "a_key_that_was_replaced": "(made / 'cluster.key').write_text('none\\n'); log.info('x', text=key.hex())",
    "a_key_that_was_removed": "(made / 'cluster.key').unlink(); log.info('x', text=key.hex())",
}


def session(test: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A session of its own with the plugin, where the ears of this one do not look."""
    with tempfile.TemporaryDirectory() as directory:
        return _session(Path(directory), test, options)


def _session(directory: Path, test: str, more: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_inner.py").write_text(COMMON + test)
    options = ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(directory), *more]
    base = ["--basetemp", str(directory / "base")]
    command = [sys.executable, "-m", "pytest", *options, *base, "-o", f"pythonpath={TESTS}", str(directory)]
    # The inner session needs no plugin of this run. Their import takes longer than its tests.
    own = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, env=own)


def test_a_session_without_a_leak_passes() -> None:
    """Ids, public keys, MACs, paths and masked secrets are none, nor is what a command prints on stdout."""
    done = session(QUIET)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout


def leaks_of(names: Iterable[str], *options: str) -> str:
    """What a session says in which each test leaks in its own way."""
    tests = [
        f"def test_{name}(made, tmp_path):\n    key = keys.load_cluster_keys(made / 'cluster.key')[0]; {LEAKS[name]}\n"
        for name in names
    ]
    done = session("\n".join(tests), *options)
    assert f"{len(tests)} passed" in done.stdout, done.stdout
    assert done.returncode == 1
    return done.stdout.partition("secrets in logs")[2]


@pytest.fixture(scope="module")
def leaking() -> str:
    """That of all ways."""
    return leaks_of(LEAKS)


def test_what_another_test_process_has_found_counts() -> None:
    """`pytest -n`: each listens for itself, and the first one does not know secrets whose files are gone."""
    found = leaks_of(["a_key_that_was_removed", "a_log_file"], "-p", "xdist", "-n", "1")
    assert "::test_a_key_that_was_removed:" in found and "/test_a_log_file0/role.log:" in found, found


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_and_not_repeated(leaking: str, name: str) -> None:
    """The test is named, or the file where a process wrote it."""
    where = f"/test_{name}0/role.log:" if name == "a_log_file" else f"::test_{name}:"
    lines = leaking.splitlines()
    assert any(where in line for line in lines), leaking
    assert "correct horse" not in leaking
    assert "pa55-word" not in leaking
