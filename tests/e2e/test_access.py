"""Rules, users and limits of a gateway, end to end: real roles, real clients, files that change while streams run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from rtunnel.config import default_address
from rtunnel.trust import users
from rtunnel.trust.users import Users, new_hash, put_user, remove_user
from rtunnel_socks import access as access_module
from support.cluster import Cluster, SocksRefused, Target, in_thread, read_line, running_cluster
from support.files import put
from support.logs import Events, named
from support.plumbing import kept, read_all, refusing_port

PATIENCE = 10.0
PASSWORD, OTHER = "correct horse", "battery staple"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_COST", (10, 1, 1))


@pytest.fixture
def logs(events: Events) -> Iterator[Events]:
    """The log of the test; whatever happened, no password is in it."""
    yield events
    text = json.dumps(events, default=str)
    for secret in (PASSWORD, OTHER, base64.b64encode(f"alice:{PASSWORD}".encode()).decode(), "$scrypt$ln=1"):
        assert secret not in text


def not_allowed(logs: Events) -> Events:
    """The streams that rules or users have cut."""
    return [line for line in named(logs, "stream_ended") if line["reason"] == "not_allowed"]


def rules(directory: Path, *tables: str) -> str:
    """A rules file, replaced as a whole; each rule is its lines with ';' between."""
    path = directory / "policy.toml"
    put(path, "".join("[[rule]]\n" + table.replace("; ", "\n") + "\n" for table in tables))
    return str(path)


def people(directory: Path, *names: str) -> str:
    path = directory / "users"
    for name in names:
        put_user(path, name, new_hash(PASSWORD))
    return str(path)


EVERYTHING = 'action = "allow"; name = "all"; to = ["127.0.0.0/8"]'


# Clients.


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


class LoginRefused(Exception):
    """The gateway's answer to the SOCKS greeting or login was no."""


def socks_blocking(
    cluster: Cluster, target: tuple[str, int], *, login: tuple[str, str] | None = None, source: str = "127.0.0.1"
) -> socket.socket:
    """A connection by SOCKS5 from `source`. Raises LoginRefused, SocksRefused."""
    sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE, source_address=(source, 0)))
    sock.sendall(b"\5\1\2" if login else b"\5\1\0")
    if read_exactly(sock, 2) != (b"\5\2" if login else b"\5\0"):
        raise LoginRefused
    if login:
        name, password = (text.encode() for text in login)
        sock.sendall(b"\1" + bytes([len(name)]) + name + bytes([len(password)]) + password)
        if read_exactly(sock, 2) != b"\1\0":
            raise LoginRefused
    sock.sendall(b"\5\1\0\1" + socket.inet_aton(target[0]) + struct.pack(">H", target[1]))
    reply = read_exactly(sock, 10)
    if not reply or reply[1]:
        raise SocksRefused(reply[1] if reply else -1)
    return sock


async def socks(cluster: Cluster, target: Target, **how: Any) -> socket.socket:
    return await in_thread(lambda: socks_blocking(cluster, (target.ip, target.port), **how))


async def talk(sock: socket.socket, line: bytes = b"hello") -> bytes:
    def blocking() -> bytes:
        sock.sendall(line + b"\n")
        return read_line(sock)

    return await in_thread(blocking)


async def connect(cluster: Cluster, target: Target, *, login: str = "", source: str = "127.0.0.1") -> bytes:
    """An HTTP CONNECT; the head of the answer. A stream is closed again."""
    field = f"Proxy-Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n" if login else ""
    request = f"CONNECT {target.ip}:{target.port} HTTP/1.1\r\nHost: x\r\n{field}\r\n"

    def blocking() -> bytes:
        with socket.create_connection(cluster.gateway.bound, timeout=PATIENCE, source_address=(source, 0)) as sock:
            sock.sendall(request.encode())
            answer = b""
            while b"\r\n\r\n" not in answer and (piece := sock.recv(4096)):
                answer += piece
            return answer

    return await in_thread(blocking)


async def reset_comes(sock: socket.socket) -> None:
    """The stream is cut, by a reset."""

    def blocking() -> None:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)

    await in_thread(blocking)


# --- rules ------------------------------------------------------------------------------------------------


async def test_without_rules_strangers_are_denied(tmp_path: Path, logs: Events) -> None:
    """A client from this machine's network address is no loopback client: refused, truthfully, in both protocols."""
    stranger = default_address()
    if not stranger:
        pytest.skip("this machine has only loopback")
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        await cluster.start_gateway(listen="0.0.0.0:0")
        await cluster.whole()
        target = Target("127.1.0.1")
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        door = cluster.gateway.bound[1]

        def blocking() -> bytes:
            with socket.create_connection((stranger, door), timeout=PATIENCE) as sock:
                sock.sendall(f"CONNECT 127.1.0.1:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                return sock.recv(4096)

        answer = await in_thread(blocking)
        assert answer.startswith(b"HTTP/1.1 403 ") and b"error=http_request_denied" in answer
        (line,) = named(logs, "request_refused")
        assert (line["code"], line["rule"], line["client"]) == ("not_authorised", "none", stranger)


async def test_the_first_rule_that_fits(tmp_path: Path, logs: Events) -> None:
    """By source and port; the answer is SOCKS 0x02 and HTTP 403, the log has the rule, nothing is dialled."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        open_, closed = Target("127.1.0.1"), Target("127.1.0.1")
        path = rules(
            tmp_path,
            f'action = "deny"; name = "not there"; ports = [{closed.port}]',
            'action = "allow"; name = "friends"; from = ["127.66.0.0/24"]; to = ["127.1.0.1/32"]',
        )
        await cluster.start_gateway(policy=path)
        await cluster.whole()
        sock = await socks(cluster, open_, source="127.66.0.7")
        assert await talk(sock) == b"127.1.0.1:hello"
        sock.close()
        for target, source, rule in ((closed, "127.66.0.7", "1 not there"), (open_, "127.66.1.7", "none")):
            with pytest.raises(SocksRefused) as caught:
                await socks(cluster, target, source=source)
            assert caught.value.code == 0x02
            answer = await connect(cluster, target, source=source)
            assert answer.startswith(b"HTTP/1.1 403 ") and f"the policy does not let {source} reach".encode() in answer
            told = [line for line in named(logs, "request_refused") if line["client"] == source]
            assert [(line["code"], line["rule"]) for line in told] == [("not_authorised", rule)] * 2
        assert cluster.gateway.counts.refused == {"not_authorised": 4}
        await cluster.until(lambda: bool(named(logs, "stream_ended")))
        (ended,) = named(logs, "stream_ended")
        assert ended["rule"] == "2 friends"


async def test_a_target_is_looked_up_and_never_dialled(tmp_path: Path, logs: Events) -> None:
    """The gateway's own port, the broker's, loopback: allowed by the rules or not, no connection is made to them."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        await cluster.start_gateway(policy=rules(tmp_path, 'action = "allow"', EXPLICIT))
        await cluster.whole()
        listening = Target("127.0.0.1")
        ports = [cluster.gateway.bound[1], cluster.brokers["b1"].node.bound[1], listening.port]
        for port in ports:
            with pytest.raises(SocksRefused) as caught:
                await cluster.socks("127.0.0.1", port)
            assert caught.value.code == 0x02  # special, and not named
            with pytest.raises(SocksRefused) as caught:
                await cluster.socks("127.0.0.2", port)
            assert caught.value.code == 0x04  # named, and nobody answers for it
        codes = [line["code"] for line in named(logs, "request_refused")]
        assert codes == ["not_authorised", "unknown_target"] * 3


EXPLICIT = 'action = "allow"; to = ["127.0.0.2/32"]'


async def test_rules_change_while_streams_run(tmp_path: Path, logs: Events) -> None:
    """A bad file changes nothing and is told once; a good one ends what it does not allow, and only that."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=2)
        await cluster.start_gateway(policy=rules(tmp_path, EVERYTHING))
        await cluster.whole()
        target = Target("127.1.0.1")
        stays = await socks(cluster, target, source="127.66.0.1")
        goes = [await socks(cluster, target, source=f"127.66.1.{n}") for n in range(1, 4)]
        assert [await talk(sock) for sock in (stays, *goes)] == [b"127.1.0.1:hello"] * 4

        put(tmp_path / "policy.toml", "[[rule]]\naction = 'alow'\n")
        await cluster.until(lambda: bool(named(logs, "policy_rejected")))
        (line,) = named(logs, "policy_rejected")
        assert line["reason"].endswith('rule 1: action: must be given (write action = "allow" or action = "deny")')
        assert cluster.gateway.access.status()["rejected"] == {"policy": line["reason"]}
        assert [await talk(sock) for sock in (stays, *goes)] == [b"127.1.0.1:hello"] * 4
        (await socks(cluster, target, source="127.66.1.9")).close()

        (tmp_path / "policy.toml").unlink()
        await cluster.until(lambda: len(named(logs, "policy_rejected")) == 2)
        assert "can't be read" in named(logs, "policy_rejected")[1]["reason"]

        rules(tmp_path, 'action = "deny"; name = "no more"; from = ["127.66.1.0/24"]', EVERYTHING)
        for sock in goes:
            await reset_comes(sock)
        assert await talk(stays) == b"127.1.0.1:hello"
        await cluster.until(lambda: bool(named(logs, "policy_loaded")))
        (line,) = named(logs, "policy_loaded")
        assert line["count"] == 2 and cluster.gateway.access.status()["rejected"] == {}
        await cluster.until(lambda: len(not_allowed(logs)) == 3)
        cut = not_allowed(logs)
        assert [line["rule"] for line in cut] == ["1 no more"] * 3
        assert {line["client"] for line in cut} == {"127.66.1.1", "127.66.1.2", "127.66.1.3"}
        with pytest.raises(SocksRefused):
            await socks(cluster, target, source="127.66.1.1")
        assert len(named(logs, "policy_rejected")) == 2


async def test_rules_that_change_during_a_dial(tmp_path: Path, logs: Events) -> None:
    """Allowed when it asked, forbidden when its target answers: refused."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        await cluster.start_gateway(policy=rules(tmp_path, EVERYTHING))
        await cluster.whole()
        silent = kept(socket.create_server(("127.1.0.1", 0), backlog=0))
        fillers = [kept(socket.socket()) for _ in range(2)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        silent_address: tuple[str, int] = silent.getsockname()
        gateway = cluster.gateway
        outcome: list[BaseException] = []

        def client() -> None:
            try:
                socks_blocking(cluster, silent_address)
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        await cluster.until(lambda: gateway.counts.clients == 1 and not gateway.access.version)
        rules(tmp_path, 'action = "deny"; name = "closed"')
        await cluster.until(lambda: gateway.access.version == 1)
        for _ in range(2):
            silent.accept()[0].close()  # room in the backlog: the agent's next SYN gets through
        await in_thread(thread.join)
        assert isinstance(outcome[0], SocksRefused) and outcome[0].code == 0x02
        assert named(logs, "request_refused")[-1]["rule"] == "1 closed"
        assert gateway.counts.streams == 0


# --- users ------------------------------------------------------------------------------------------------


async def logged_in_cluster(cluster: Cluster, directory: Path, **keys: object) -> Target:
    """Users alice and bob, rules for both."""
    await cluster.start(brokers=1)
    rule = EVERYTHING + '; users = ["alice", "bob"]'
    await cluster.start_gateway(users=people(directory, "alice", "bob"), policy=rules(directory, rule), **keys)
    await cluster.whole()
    return Target("127.1.0.1")


def slow_checks(monkeypatch: pytest.MonkeyPatch, wait: Callable[[str], object]) -> list[tuple[str, str]]:
    """Checks of passwords wait first; the names and passwords that were checked."""
    asked: list[tuple[str, str]] = []
    check = Users.check

    def checked(self: Users, name: str, password: str) -> bool:
        asked.append((name, password))
        wait(password)
        return check(self, name, password)

    monkeypatch.setattr(Users, "check", checked)
    return asked


async def test_both_protocols_log_in(tmp_path: Path, logs: Events) -> None:
    """Right passwords are served under their names; wrong ones, unknown names and none at all are refused."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        sock = await socks(cluster, target, login=("alice", PASSWORD))
        assert await talk(sock) == b"127.1.0.1:hello"
        sock.close()
        assert (await connect(cluster, target, login=f"bob:{PASSWORD}")).startswith(b"HTTP/1.1 200 ")
        for login in (("alice", OTHER), ("mallory", PASSWORD), (OTHER, PASSWORD), ("alice", "")):
            with pytest.raises(LoginRefused):
                await socks(cluster, target, login=login)
            answer = await connect(cluster, target, login=":".join(login))
            assert answer.startswith(b"HTTP/1.1 407 ") and b'Proxy-Authenticate: Basic realm="rtunnel"' in answer
        with pytest.raises(LoginRefused):
            await socks(cluster, target)
        answer = await connect(cluster, target)
        assert answer.startswith(b"HTTP/1.1 407 ") and b"authentication_required" in answer
        await cluster.until(lambda: len(named(logs, "stream_ended")) == 2)
        assert {(line["user"], line["via"]) for line in named(logs, "stream_ended")} == {
            ("alice", "socks5"),
            ("bob", "http"),
        }
        codes = [(line["code"], line["user"], line.get("claims", "")) for line in named(logs, "request_refused")]
        no_name = ("bad_credentials", "", "")
        is_alice = ("bad_credentials", "", "alice")
        missing = ("authentication_required", "", "")
        assert codes == [is_alice] * 2 + [no_name] * 4 + [is_alice] * 2 + [missing] * 2
        assert cluster.gateway.counts.refused == {"bad_credentials": 8, "authentication_required": 2}


async def test_broken_basic_is_no_login(tmp_path: Path, logs: Events) -> None:
    """Another scheme, no base64, no colon, no UTF-8: 407."""
    async with running_cluster(tmp_path) as cluster:
        await logged_in_cluster(cluster, tmp_path)
        for field in ("Bearer x", "Basic ???", "Basic YWxpY2U=", "Basic //86eA==", "Basic", "Basic OnBhc3M="):
            request = f"CONNECT 127.1.0.1:80 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {field}\r\n\r\n"
            assert (await cluster.http(request.encode())).startswith(b"HTTP/1.1 407 "), field


async def test_the_audit_line_is_whole(tmp_path: Path, logs: Events) -> None:
    """Who, from where, what, by which rule, which tuple, epoch, bytes each way, how long, why it ended."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path, name="gw")
        sock = await socks(cluster, target, login=("alice", PASSWORD), source="127.66.0.9")
        assert await talk(sock, b"12345") == b"127.1.0.1:12345"
        sock.shutdown(socket.SHUT_WR)
        farewell = await in_thread(lambda: read_all(sock))
        await cluster.until(lambda: bool(named(logs, "stream_ended")))
        (line,) = named(logs, "stream_ended")
        (tuple_,) = cluster.gateway.table.lookup("default", "127.1.0.1")
        seconds, setup = line.pop("seconds"), line.pop("setup_ms")
        assert seconds >= 0 and setup > 0
        connected, answered, first = (line.pop(f"{word}_ms") for word in ("connect", "answer", "first_byte"))
        assert 0 <= connected <= answered <= setup and 0 < first <= 1000 * seconds + 1
        assert {key: line[key] for key in line if key not in ("component", "log_level", "event", "reason")} == {
            "client": "127.66.0.9",
            "user": "alice",
            "target": f"127.1.0.1:{target.port}",
            "namespace": "default",
            "via": "socks5",
            "rule": "1 all",
            "bytes_up": 6,
            "bytes_down": 16 + len(farewell),
            "attempts": 1,
            "node": "b1",
            "epoch": str(tuple_.epoch),
            "ps": f"{tuple_.ps_ip}:{tuple_.ps_port}",
            "agent": "a1",
            "proof": "ok",
            "certificate": "agent/default/a1",
        }


async def test_broker_and_agent_log_who_asks(tmp_path: Path, logs: Events) -> None:
    """The Dial's `who` stands in their lines of a stream and of a refusal."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path, name="gw")
        sock = await socks(cluster, target, login=("alice", PASSWORD), source="127.66.0.9")
        sock.close()
        closed = Target("127.1.0.1")
        closed.port = refusing_port("127.1.0.1")
        with pytest.raises(SocksRefused):
            await socks(cluster, closed, login=("bob", PASSWORD), source="127.66.0.8")

        def alices(event: str) -> Events:  # the broker relays the refusal of bob's Dial, too
            return [line for line in named(logs, event) if line["who"] == "gw:alice@127.66.0.9"]

        await cluster.until(lambda: bool(alices("stream_relayed") and alices("stream_served")))
        for event in ("stream_relayed", "stream_served"):
            (line,) = alices(event)
            assert (line["target"], line["log_level"]) == (f"127.1.0.1:{target.port}", "debug")
        (line,) = named(logs, "dial_refused")
        assert (line["component"], line["code"], line["who"], line["target"]) == (
            "agent", "target_refused", "gw:bob@127.66.0.8", f"127.1.0.1:{closed.port}",
        )  # fmt: skip


async def test_sources_that_need_not_log_in(tmp_path: Path, logs: Events) -> None:
    """no_auth: anonymous from there; who gives a name all the same must give the right password."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        path = rules(tmp_path, EVERYTHING)
        await cluster.start_gateway(users=people(tmp_path, "alice"), no_auth=["127.66.0.0/24"], policy=path)
        await cluster.whole()
        target = Target("127.1.0.1")
        (await socks(cluster, target, source="127.66.0.1")).close()
        (await socks(cluster, target, source="127.66.0.1", login=("alice", PASSWORD))).close()
        assert (await connect(cluster, target, source="127.66.0.1")).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(LoginRefused):
            await socks(cluster, target, source="127.66.0.1", login=("alice", OTHER))
        with pytest.raises(LoginRefused):
            await socks(cluster, target, source="127.66.1.1")
        assert (await connect(cluster, target, source="127.66.1.1")).startswith(b"HTTP/1.1 407 ")
        await cluster.until(lambda: len(named(logs, "stream_ended")) == 3)
        assert sorted(line["user"] for line in named(logs, "stream_ended")) == ["", "", "alice"]


@pytest.mark.parametrize("change", ["removed", "another password"])
async def test_a_user_is_revoked(tmp_path: Path, logs: Events, change: str) -> None:
    """Live streams end, the remembered login is forgotten, the others go on; a bad file revokes nobody."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        alice = await socks(cluster, target, login=("alice", PASSWORD))
        bob = await socks(cluster, target, login=("bob", PASSWORD))
        file = tmp_path / "users"
        good = file.read_text()
        put(file, "alice\n")
        await cluster.until(lambda: bool(named(logs, "users_rejected")))
        assert [await talk(alice), await talk(bob)] == [b"127.1.0.1:hello"] * 2
        put(file, good)
        await cluster.until(lambda: len(named(logs, "users_loaded")) == 1)
        assert await talk(alice) == b"127.1.0.1:hello"  # the same line as before is no change for alice
        if change == "removed":
            remove_user(file, "alice")
        else:
            put_user(file, "alice", new_hash(OTHER))
        await reset_comes(alice)
        assert await talk(bob) == b"127.1.0.1:hello"
        with pytest.raises(LoginRefused):
            await socks(cluster, target, login=("alice", PASSWORD))
        if change != "removed":
            (await socks(cluster, target, login=("alice", OTHER))).close()
        await cluster.until(lambda: bool(not_allowed(logs)))
        assert [(line["user"], line["rule"]) for line in not_allowed(logs)] == [("alice", "users")]


@pytest.mark.usefixtures("own_pace")
async def test_revocation_takes_less_than_five_seconds(tmp_path: Path, logs: Events) -> None:
    """With the product's own pace: a user is removed, and a rule; the streams of both end."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        alice = await socks(cluster, target, login=("alice", PASSWORD))
        bob = await socks(cluster, target, login=("bob", PASSWORD))
        began = time.monotonic()
        remove_user(tmp_path / "users", "alice")
        await reset_comes(alice)
        user = time.monotonic() - began
        rules(tmp_path, 'action = "deny"')
        await reset_comes(bob)
        rule = time.monotonic() - began - user
        print(f"a removed user's stream ended after {user:.2f} s, a forbidden one after {rule:.2f} s")
        assert max(user, rule) < 5.0


async def test_an_impatient_client_says_everything_at_once(tmp_path: Path, logs: Events) -> None:
    """Greeting, login, request and the first line in one piece, before any answer."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        login = b"\1\5alice" + bytes([len(PASSWORD)]) + PASSWORD.encode()
        request = b"\5\1\0\1" + socket.inet_aton(target.ip) + struct.pack(">H", target.port)

        def blocking() -> bytes:
            sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))
            sock.sendall(b"\5\1\2" + login + request + b"early\n")
            return read_exactly(sock, 2 + 2 + 10) + read_line(sock)

        for _ in range(2):  # the second time the password is remembered
            assert await in_thread(blocking) == b"\5\2\1\0\5\0\0\1" + bytes(6) + b"127.1.0.1:early"


@pytest.mark.parametrize("early", [0, 300_000])
async def test_an_impatient_client_that_waits_for_its_hash(
    tmp_path: Path, logs: Events, monkeypatch: pytest.MonkeyPatch, early: int
) -> None:
    """Login, request, much early data and the end, all before the password is hashed: nothing of it is lost."""
    gate = threading.Event()
    slow_checks(monkeypatch, lambda password: gate.wait(PATIENCE))
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        login = b"\1\5alice" + bytes([len(PASSWORD)]) + PASSWORD.encode()
        request = b"\5\1\0\1" + socket.inet_aton(target.ip) + struct.pack(">H", target.port)
        data = b"\0" * early
        sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))

        def send() -> None:
            sock.sendall(b"\5\1\2" + login + request + data)
            sock.shutdown(socket.SHUT_WR)

        def hear() -> bytes:
            return read_exactly(sock, 2 + 2 + 10) + read_line(sock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, send)
            await cluster.until(lambda: cluster.gateway.access.status()["passwords_waiting"] == 1)
            for _ in range(3):  # turns of the relay, which must leave the rest where it is
                await cluster.gateway.bridge.run(lambda: None)
            gate.set()
        digest = hashlib.sha256(data).hexdigest()
        assert await in_thread(hear) == b"\5\2\1\0\5\0\0\1" + bytes(6) + f"{target.ip} {digest}".encode()


async def test_passwords_are_checked_once_a_minute(
    tmp_path: Path, logs: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong answers are remembered, for each password by itself, until the file changes."""
    asked = slow_checks(monkeypatch, lambda password: None)
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        for _ in range(3):
            (await socks(cluster, target, login=("alice", PASSWORD))).close()
            assert (await connect(cluster, target, login=f"alice:{PASSWORD}")).startswith(b"HTTP/1.1 200 ")
            with pytest.raises(LoginRefused):
                await socks(cluster, target, login=("alice", OTHER))
        assert asked == [("alice", PASSWORD), ("alice", OTHER)]
        put_user(tmp_path / "users", "carol", new_hash(OTHER))
        await cluster.until(lambda: cluster.gateway.access.version == 1)
        (await socks(cluster, target, login=("alice", PASSWORD))).close()
        assert len(asked) == 3
        monkeypatch.setattr(access_module, "REMEMBER_SECONDS", 0.0)
        for _ in range(2):
            (await socks(cluster, target, login=("bob", PASSWORD))).close()
        assert len(asked) == 5


async def test_logins_wait_off_the_data_plane(tmp_path: Path, logs: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """While hashes take for ever: streams run, one source's queue is full before everybody's, the rest is refused
    truthfully, and those who waited are served in the end."""
    gate = threading.Event()
    slow_checks(monkeypatch, lambda password: password == OTHER and gate.wait(PATIENCE))
    monkeypatch.setattr(access_module, "MAX_WAITING", 12)
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        runs = await socks(cluster, target, login=("alice", PASSWORD))
        gateway = cluster.gateway
        answers: list[bytes] = []

        def hold(name: str, source: str) -> None:
            sock = kept(socket.create_connection(gateway.bound, timeout=PATIENCE, source_address=(source, 0)))
            sock.sendall(b"\5\1\2\1" + bytes([len(name)]) + name.encode() + bytes([len(OTHER)]) + OTHER.encode())
            threading.Thread(target=lambda: answers.append(read_exactly(sock, 4)), daemon=True).start()

        def waiting() -> object:
            return gateway.access.status()["passwords_waiting"]

        for n in range(10):
            hold(f"guess{n}", "127.66.0.1")
        await cluster.until(lambda: gateway.counts.refused.get("overloaded") == 2 and waiting() == 8)
        for n in range(5):
            hold(f"other{n}", f"127.66.1.{n + 1}")
        await cluster.until(lambda: gateway.counts.refused.get("overloaded") == 3 and waiting() == 12)
        await cluster.until(lambda: len(answers) == 3)
        assert answers == [b"\5\2\1\1"] * 3
        assert await talk(runs) == b"127.1.0.1:hello"
        (await socks(cluster, target, login=("alice", PASSWORD))).close()  # remembered: it does not wait
        gate.set()
        await cluster.until(lambda: waiting() == 0 and len(answers) == 15)
        assert gateway.counts.refused == {"overloaded": 3, "bad_credentials": 12}
        assert await talk(runs) == b"127.1.0.1:hello"


async def test_a_hash_that_can_not_be_computed(tmp_path: Path, logs: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for it: the gateway says that it is its own fault, remembers nothing, and goes on."""

    def no_memory(password: str) -> None:
        raise MemoryError

    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        with monkeypatch.context() as patch:
            slow_checks(patch, no_memory)
            answer = await connect(cluster, target, login=f"alice:{PASSWORD}")
            assert answer.startswith(b"HTTP/1.1 500 ")
        (line,) = named(logs, "password_check_failed")
        assert line["reason"] == "MemoryError: "
        assert (await connect(cluster, target, login=f"alice:{PASSWORD}")).startswith(b"HTTP/1.1 200 ")


async def test_many_with_one_password_ask_once(tmp_path: Path, logs: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten connections of one browser: one hash. Who left while others were checked costs none."""
    gate = threading.Event()
    asked = slow_checks(monkeypatch, lambda password: gate.wait(PATIENCE))
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path)
        got: list[socket.socket] = []

        def client() -> None:
            got.append(socks_blocking(cluster, (target.ip, target.port), login=("alice", PASSWORD)))

        threads = [threading.Thread(target=client) for _ in range(10)]
        for thread in threads:
            thread.start()
        await cluster.until(lambda: cluster.gateway.counts.clients == 10 and len(asked) == 1)
        gate.set()
        for thread in threads:
            await in_thread(thread.join)
        assert len(got) == 10 and len(asked) == 1

        gate.clear()
        monkeypatch.setattr(cluster.gateway.access, "_limiter", trio.CapacityLimiter(1))

        def waiting() -> object:
            return cluster.gateway.access.status()["passwords_waiting"]

        for name in ("first", "leaves"):
            sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))
            sock.sendall(b"\5\1\2\1" + bytes([len(name)]) + name.encode() + b"\1x")
            await cluster.until(lambda: len(asked) == 2)
        await cluster.until(lambda: waiting() == 2)
        sock.close()
        await cluster.until(lambda: cluster.gateway.counts.clients == 1)
        gate.set()
        await cluster.until(lambda: waiting() == 0)
        assert [name for name, _ in asked] == ["alice", "first"]


# --- real clients -----------------------------------------------------------------------------------------

PAGE = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"a page\\n" if "Proxy-Authorization" not in self.headers else b"the password came through\\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer((sys.argv[1], 0), Page)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a web server on 127.1.0.1."""
    server = subprocess.Popen([sys.executable, "-c", PAGE, "127.1.0.1"], stdout=subprocess.PIPE)
    assert server.stdout is not None
    yield int(server.stdout.readline())
    server.kill()
    server.wait()
    server.stdout.close()


async def command(*words: str) -> str:
    """A client's output; the environment has no proxies of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = await in_thread(
        lambda: subprocess.run(words, capture_output=True, text=True, check=False, timeout=30, env=clean)
    )
    return f"{done.returncode} {done.stdout}{done.stderr}"


@needs_curl
async def test_curl_logs_in(tmp_path: Path, logs: Events, page: int) -> None:
    """--proxy-user and user:password@ in every proxy protocol; --proxy-anyauth tries again after the 407."""
    async with running_cluster(tmp_path) as cluster:
        await logged_in_cluster(cluster, tmp_path)
        proxy = "{}:{}".format(*cluster.gateway.bound)
        url = f"http://127.1.0.1:{page}/"
        curl = ("curl", "-sS", "-m", "10")
        right, wrong = ("--proxy-user", f"alice:{PASSWORD}"), ("--proxy-user", f"alice:{OTHER}")
        for how in (
            ("--socks5-hostname", proxy),
            ("--socks5", proxy),
            ("--proxy", f"http://{proxy}"),
            ("--proxy", f"http://{proxy}", "--proxytunnel"),
            ("--proxy", f"http://{proxy}", "--proxy-anyauth"),
        ):
            assert await command(*curl, *how, *right, url) == "0 a page\n", how
            assert "a page" not in await command(*curl, *how, *wrong, url)
            assert "a page" not in await command(*curl, *how, url)
        in_url = f"alice:{PASSWORD.replace(' ', '%20')}@{proxy}"
        assert await command(*curl, "--proxy", f"socks5h://{in_url}", url) == "0 a page\n"
        assert await command(*curl, "--proxy", f"http://{in_url}", url) == "0 a page\n"
        assert (await command(*curl, "--socks5-hostname", proxy, *wrong, url)).startswith("97 ")
        status = await command(
            *curl, "--proxy", f"http://{proxy}", *wrong, "-o", "/dev/null", "-w", "%{http_code}", url
        )
        assert status == "0 407"


async def test_pysocks_logs_in(tmp_path: Path, logs: Events, page: int) -> None:
    """With the right password, and with a wrong one."""
    script = """
import socks, sys
host, proxy_port, name, password, port = sys.argv[1:]
s = socks.socksocket()
s.set_proxy(socks.SOCKS5, host, int(proxy_port), rdns=True, username=name, password=password)
s.settimeout(5)
try:
    s.connect(("127.1.0.1", int(port)))
except socks.ProxyError as error:
    sys.exit(f"{error}")
s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
data = b""
while piece := s.recv(4096):
    data += piece
s.close()
sys.stdout.write(data.partition(b"\\r\\n\\r\\n")[2].decode())
"""
    async with running_cluster(tmp_path) as cluster:
        await logged_in_cluster(cluster, tmp_path)
        host, port = cluster.gateway.bound
        words = (sys.executable, "-c", script, host, str(port), "alice")
        assert await command(*words, PASSWORD, str(page)) == "0 a page\n"
        assert await command(*words, OTHER, str(page)) == "1 Socket error: SOCKS5 authentication failed\n"


# --- limits -----------------------------------------------------------------------------------------------


async def test_new_connections_per_second(tmp_path: Path, logs: Events) -> None:
    """The second within 50 s from one source is refused, in its own words; another source is served."""
    async with running_cluster(tmp_path, gateway__limits__source_rate=0.02) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        (await socks(cluster, target, source="127.66.0.1")).close()
        with pytest.raises(SocksRefused) as caught:
            await socks(cluster, target, source="127.66.0.1")
        assert caught.value.code == 0x01
        answer = await connect(cluster, target, source="127.66.0.1")
        assert answer.startswith(b"HTTP/1.1 429 ") and b"error=connection_limit_reached" in answer
        assert b"source 127.66.0.1 opens more than 0.02 connections per second" in answer
        (await socks(cluster, target, source="127.66.0.2")).close()
        assert cluster.gateway.counts.refused == {"rate_limited": 2}


async def test_streams_of_a_source_and_of_a_user(tmp_path: Path, logs: Events) -> None:
    """One too many is refused until another one ends; a user's count is that of all sources."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path, limits__source_streams=2, limits__user_streams=3)
        alice = ("alice", PASSWORD)
        held = [await socks(cluster, target, login=alice, source="127.66.0.1") for _ in range(2)]
        with pytest.raises(SocksRefused) as caught:
            await socks(cluster, target, login=alice, source="127.66.0.1")
        assert caught.value.code == 0x01
        held.append(await socks(cluster, target, login=alice, source="127.66.0.2"))
        assert (await connect(cluster, target, login=f"alice:{PASSWORD}", source="127.66.0.3")).startswith(
            b"HTTP/1.1 429 "
        )
        (await socks(cluster, target, login=("bob", PASSWORD), source="127.66.0.2")).close()
        texts = [line["reason"] for line in named(logs, "request_refused")]
        assert texts == ["source 127.66.0.1 has 2 streams already", "user alice has 3 streams already"]
        held.pop().close()
        await cluster.until(lambda: len(named(logs, "stream_ended")) == 2)
        (await socks(cluster, target, login=alice, source="127.66.0.3")).close()
        for sock in held:
            sock.close()
        await cluster.until(lambda: not cluster.gateway.counts.streams and not cluster.gateway.limits.known)


async def test_user_rate(tmp_path: Path, logs: Events) -> None:
    """A user's connections are counted over all sources, and refused after the login, with its name."""
    async with running_cluster(tmp_path) as cluster:
        target = await logged_in_cluster(cluster, tmp_path, limits__user_rate=0.02)
        (await socks(cluster, target, login=("alice", PASSWORD), source="127.66.0.1")).close()
        with pytest.raises(SocksRefused) as caught:
            await socks(cluster, target, login=("alice", PASSWORD), source="127.66.0.2")
        assert caught.value.code == 0x01
        (await socks(cluster, target, login=("bob", PASSWORD), source="127.66.0.1")).close()
        (line,) = named(logs, "request_refused")
        assert (line["code"], line["user"]) == ("rate_limited", "alice")


async def test_handshakes_of_a_source(tmp_path: Path, logs: Events) -> None:
    """Who begins many and says nothing more fills its own share only; its places come back."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        await cluster.start_gateway(limits__source_handshakes=3, handshake_timeout=60.0)
        await cluster.whole()
        gateway, target = cluster.gateway, Target("127.1.0.1")
        bad = [
            kept(socket.create_connection(gateway.bound, timeout=PATIENCE, source_address=("127.66.0.1", 0)))
            for _ in range(6)
        ]
        for sock in bad:
            sock.sendall(b"\5")
        await cluster.until(lambda: gateway.counts.refused.get("too_many_handshakes") == 3)
        (await socks(cluster, target, source="127.66.0.2")).close()
        (line,) = named(logs, "client_shut_out")
        assert (line["code"], line["client"]) == ("too_many_handshakes", "127.66.0.1")
        for sock in bad:
            sock.close()
        await cluster.until(lambda: gateway.counts.clients == 0)
        (await socks(cluster, target, source="127.66.0.1")).close()
        await cluster.until(lambda: not gateway.counts.streams and not gateway.limits.known)
