"""Roles as processes with every kind of secret, in their worst hours: what they log has none of them.

That their logs have none is what the ears of the session check (`support.secrecy`), here as for every test. This one
sees to it that there is a Redis with a password, logins, refusals and faults for them to talk about.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rtunnel.trust.users import new_hash, put_user
from support.polling import until
from support.redis_server import RedisServer
from support.secrecy import is_secret
from support.site import health, ready, run, site

PASSWORD = "quite-a-pa55word"
NAME, IP = "alice", "127.2.0.1"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_a_bad_day_is_logged_without_a_secret(tmp_path: Path, make_redis: Callable[..., RedisServer]) -> None:
    """Logins that are right, wrong and unknown, a Redis that goes away, keys and URLs that are wrong, and the end."""
    server = make_redis(tcp=True, password="r3dis-pa55word").start()
    with site(tmp_path, server.url) as here:
        broker = here.broker("b1", 1)
        (tmp_path / "policy.toml").write_text('[[rule]]\naction = "allow"\nusers = ["*"]\nto = ["127.2.0.0/16"]\n')
        put_user(tmp_path / "users", NAME, new_hash(PASSWORD))
        gateway = here.gateway("--users", str(tmp_path / "users"), "--policy", str(tmp_path / "policy.toml"))
        agent = here.agent("a1", IP, [broker.address("broker_started")])
        for process in (broker, gateway):
            until(lambda process=process: ready(process.admin()), what=process.name)  # type: ignore[misc]
        until(lambda: health(gateway.admin(), "/statusz")[1]["tuples"] == 1, what="the gateway to know all")
        proxy, page = gateway.address("gateway_started"), f"http://{IP}:{here.web(IP)}/"
        for name, password, code in ((NAME, PASSWORD, 0), (NAME, PASSWORD + "x", 97), ("bob", PASSWORD, 97)):
            is_secret(password, "a login")
            run("curl", "-sS", "-m", "15", "--socks5-hostname", proxy, "-U", f"{name}:{password}", page, code=code)
            told = run("curl", "-sS", "-m", "15", "-x", f"http://{name}:{password}@{proxy}", page, code=None)
            assert ("hello from" in told) == (code == 0), told
        server.kill()
        for process in (broker, gateway):
            process.wait_for("registry_unavailable")
            _, status = health(process.admin(), "/statusz")
            assert server.password not in json.dumps(status)
        shutil.copy(tmp_path / "pki" / "join.token", tmp_path / "pki" / "gateway.key")
        refused = here.gateway()
        assert refused.process.wait(20) == 2
        assert "it is a join token" in refused.text
        for process in (agent, gateway, broker):
            process.end(signal.SIGTERM)
        assert {line["event"] for line in gateway.lines("request_refused")} == {"request_refused"}
