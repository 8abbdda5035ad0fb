"""`rtunnel trace`: through a gateway's API, with what each hop saw, and a cause that names the fault."""

from __future__ import annotations

import http.client
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rtunnel.cli import cli
from rtunnel.registry.redis import RedisRegistry
from rtunnel.trust import users
from rtunnel.trust.users import new_hash, put_user
from rtunnel.wire.refusal import Refusal
from rtunnel_agent import hello as hello_module
from support.cluster import Cluster, Target, in_thread, read_line, running_cluster
from support.files import put
from support.logs import Events, named
from support.plumbing import free_port, refusing_port
from support.redis_server import RedisServer

TOKEN = "a-token-of-the-tests-0123456789"
DENY_TWO = (
    '[[rule]]\nname = "no two"\naction = "deny"\nto = ["127.1.0.2"]\n[[rule]]\naction = "allow"\nto = ["127.0.0.0/8"]\n'
)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_COST", (10, 1, 1))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "api.token"
    put(path, TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def admin() -> str:
    """An address for the API, from the ports that this test process holds."""
    return f"127.0.0.1:{free_port()}"


async def gateway(cluster: Cluster, admin: str, token_file: Path, **keys: object) -> None:
    await cluster.start_gateway(admin=admin, admin_token=str(token_file), dial_timeout=2.0, **keys)


def document(output: str) -> Any:
    """The JSON object that a command has printed, among the log lines of the cluster in this process."""
    return json.JSONDecoder().raw_decode(output[output.index("{\n") :])[0]


async def traced(admin: str, target: Target | tuple[str, int], **asked: str) -> dict[str, Any]:
    """The report of a trace."""
    ip, port = (target.ip, target.port) if isinstance(target, Target) else target
    report: dict[str, Any]
    status, report = await in_thread(lambda: call(admin, {"target": f"{ip}:{port}", **asked}))
    assert status == 200, report
    return report


def call(
    admin: str, body: Any, *, method: str = "POST", path: str = "/v1/trace", token: str | None = TOKEN
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(admin, timeout=30)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, json.loads(data)


async def test_each_hop_says_what_it_sees(tmp_path: Path, admin: str, token_file: Path, events: Events) -> None:
    """By both paths, under the agent's proof; the target gets one connection for each, and no byte."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start()
        await gateway(cluster, admin, token_file)
        await cluster.whole()
        target = Target("127.1.0.1")
        report = await traced(admin, target)
        assert (report["code"], report["cause"], report["do"]) == ("accepted", "", "")
        assert (report["target"], report["client"], report["registry"]) == (
            f"127.1.0.1:{target.port}",
            "127.0.0.1",
            "ok",
        )
        assert report["allowed"] and [way["node"] for way in report["ways"]] in (["b1", "b2"], ["b2", "b1"])
        assert [attempt["node"] for attempt in report["attempts"]] == ["b1", "b2"]
        for attempt in report["attempts"]:
            assert (attempt["code"], attempt["phase"], attempt["proof"]) == ("accepted", "answered", "ok")
            assert 0 <= attempt["connect_ms"] <= attempt["answer_ms"] <= attempt["ms"]
            broker, agent = attempt["broker"], attempt["at_agent"]
            assert (broker["node"], broker["agent"], broker["peer"]) == (attempt["node"], "a1", "127.0.0.1")
            assert (agent["agent"], agent["way"], agent["source"]) == ("a1", "127.1.0.1", "127.1.0.1")
            assert (agent["interface"], agent["local"]) == ("lo", True)
            assert max(abs(hop["time"] / 1000 - report["time"]) for hop in (broker, agent)) < 5
        (line,) = named(events, "trace_ended")
        assert (line["client"], line["target"], line["via"]) == ("127.0.0.1", f"127.1.0.1:{target.port}", "trace")
        # a client's own request after it works, and nothing is left
        assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        assert cluster.gateway.limits.known == 0 or cluster.gateway.counts.clients == 0


async def test_the_cause_is_the_injected_fault(tmp_path: Path, admin: str, token_file: Path) -> None:
    """Each fault that one process can have, one after the other, in one cluster."""
    people, rules = tmp_path / "users", tmp_path / "policy.toml"
    put_user(people, "alice", new_hash("a-horse-of-the-tests"))
    put(rules, DENY_TWO)
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(agents=2, exposes=["1-60000"])
        await gateway(cluster, admin, token_file, users=str(people), no_auth=["127.0.0.1/32"], policy=str(rules))
        await cluster.whole()
        report = await traced(admin, ("127.1.0.1", refusing_port("127.1.0.1")))
        assert report["code"] == "target_refused" and "nobody listens on the target's port" in report["cause"]
        assert {a["at_agent"]["errno"] for a in report["attempts"]} == {"ECONNREFUSED"}
        assert {a["proof"] for a in report["attempts"]} == {"ok"}
        report = await traced(admin, ("127.1.0.1", 60001))
        assert report["code"] == "not_exposed" and "the agent a1 does not expose that port" in report["cause"]
        report = await traced(admin, ("127.1.0.2", 22))
        assert report["code"] == "not_authorised" and "no two" in report["cause"] and not report["attempts"]
        report = await traced(admin, ("127.1.0.9", 22))
        assert report["code"] == "unknown_target" and "no agent is registered for 127.1.0.9:22" in report["cause"]
        report = await traced(admin, ("127.0.0.1", 22))
        assert {linked["agent"] for linked in report["linked"]} == {"a1", "a2"}
        assert "a loop: 127.0.0.1 is the broker b1" in report["cause"]
        report = await traced(admin, ("127.1.0.1", 22), user="bob")
        assert report["code"] == "bad_credentials" and "no user bob" in report["cause"]
        report = await traced(admin, ("127.1.0.1", 22), source="10.9.0.4")
        assert report["code"] == "authentication_required" and "--as USER" in report["do"]
        target = Target("127.1.0.1")
        assert (await traced(admin, target, user="alice", source="10.9.0.4"))["client"] == "alice@10.9.0.4"
        wrong = f"Proxy-Authorization: Basic {b64encode(b'alice:wrong').decode()}"
        await cluster.http(f"CONNECT {target.ip}:1 HTTP/1.1\r\nHost: {target.ip}:1\r\n{wrong}\r\n\r\n".encode())
        report = await traced(admin, target, user="alice", source="127.0.0.1")
        assert "alice@127.0.0.1 was refused" in report["cause"] and "bad_credentials" in report["cause"]
        assert report["recent"][0]["text"] == Refusal.BAD_CREDENTIALS.reply.text
        assert (await traced(admin, target))["cause"] == ""
        # One broker is gone, and the gateway does not know it yet.
        cluster.brokers["b1"].scope.cancel()
        await cluster.brokers["b1"].ended.wait()
        report = await traced(admin, target)
        if len(report["attempts"]) == 2:
            assert report["code"] == "accepted" and "not by every path: b1" in report["cause"]


async def test_the_api_asks_for_its_token(tmp_path: Path, admin: str, token_file: Path, events: Events) -> None:
    """Probes stay open; a bad request gets a sentence; a changed token is in force at once."""
    async with running_cluster(tmp_path) as cluster:
        await gateway(cluster, admin, token_file)
        asked = {"target": "127.1.0.1:22"}

        async def status(body: Any = asked, **how: Any) -> tuple[int, str]:
            code, answer = await in_thread(lambda: call(admin, body, **how))
            return code, answer.get("error", "")

        assert await status(token=None) == (
            401, "the request needs the token of gateway.admin_token: Authorization: Bearer <token>",
        )  # fmt: skip
        for wrong in ("", TOKEN[:-1], TOKEN + "x"):
            assert (await status(token=wrong))[0] == 401
        assert (await status(path="/v1/nothing"))[0] == 404
        assert (await status(None, method="GET"))[0] == 405
        assert (await status(b"x" * 20000))[0] == 413
        for bad, word in (
            (b"{", "the body is not what /v1/trace takes"),
            ({"target": "nobody"}, "target is IP:port"),
            ({"target": "127.1.0.1:0"}, "no port"),
            ({"target": "127.1.0.1:22", "source": "here"}, "source an IP"),
            ({"target": "127.1.0.1:22", "namespace": "other"}, "serves the namespace default"),
            ({"target": "127.1.0.1:22", "else": 1}, "unknown field `else`"),
        ):
            code, text = await status(bad)
            assert code == 400 and word in text, (bad, text)
        put(token_file, "another-token-0123456789-abc\n")
        assert (await status())[0] == 401
        assert (await status(token="another-token-0123456789-abc"))[0] == 200
        put(token_file, "short\n")
        assert (await status())[0] == 503
        assert named(events, "api_request_denied")
        assert TOKEN not in json.dumps(events, default=str)


async def test_without_a_token_file_the_api_is_off(tmp_path: Path, admin: str) -> None:
    """And says which key turns it on."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_gateway(admin=admin)
        code, answer = await in_thread(lambda: call(admin, {"target": "127.1.0.1:22"}))
        assert code == 403 and "gateway.admin_token" in answer["error"]


async def test_the_command_prints_hops_cause_and_next_step(tmp_path: Path, admin: str, token_file: Path) -> None:
    """Exit code 0 when the target is reached, 1 when not, 2 when the gateway can't be asked."""

    async def command(*words: str) -> tuple[int, str]:
        done = await in_thread(lambda: CliRunner().invoke(cli, ["trace", *words]))
        return done.exit_code, done.output

    asks = ("--gateway", admin, "--token-file", str(token_file))
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        await gateway(cluster, admin, token_file)
        await cluster.whole()
        target = Target("127.1.0.1")
        code, text = await command(f"127.1.0.1:{target.port}", *asks)
        assert code == 0, text
        for word in (
            f"127.1.0.1:{target.port} in default, for 127.0.0.1, by the gateway",
            "rule ", "path      b1 at 127.0.0.1:", "node live", "connect ", "broker    link of a1 from 127.0.0.1",
            "agent     a1 connects to 127.1.0.1, its own address from 127.1.0.1 through lo", "proof ok",
            "RESULT  accepted", "CAUSE   the target is reached, by one path only", "DO ",
        ):  # fmt: skip
            assert word in text, (word, text)
        code, text = await command(f"127.1.0.1:{refusing_port('127.1.0.1')}", *asks, "--json")
        assert code == 1 and document(text)["code"] == "target_refused"
    code, text = await command("127.1.0.1:22", *asks)
    assert code == 2 and "can't be asked" in text
    code, text = await command("127.1.0.1:22", "--gateway", admin)
    assert code == 2 and "no token is given" in text


async def test_a_broker_tells_what_agents_know_of_their_hosts(
    tmp_path: Path, admin: str, token_file: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that has registered docker0's address is doubted at both ends, and found in the broker's API."""
    found = {"127.1.0.2": "docker0"}
    monkeypatch.setattr(hello_module, "interfaces_of", lambda ips: [found.get(ip, "eth0") for ip in ips])
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1", admin=admin, admin_token=str(token_file))
        await cluster.start_gateway()
        await cluster.start_agent("a1", "127.1.0.1", redundancy=1)
        await cluster.start_agent("a2", "127.1.0.2", redundancy=1)
        await cluster.whole()
        status, answer = await in_thread(lambda: call(admin, None, method="GET", path="/v1/sessions"))
        assert status == 200 and (answer["node"], answer["next"]) == ("b1", "")
        good, odd = answer["sessions"]
        assert (good["agent"], good["state"], good["peer"]) == ("a1", "live", "127.0.0.1")
        assert (good["addresses"], good["interfaces"], good["lost"]) == (["127.1.0.1"], ["eth0"], [])
        assert good["doubts"] == [] and good["certificate_end"] > 1_700_000_000
        assert odd["agent"] == "a2" and odd["doubts"][0].startswith("127.1.0.2 is on docker0")
        status, one = await in_thread(lambda: call(admin, None, method="GET", path="/v1/sessions?agent=a2"))
        assert [session["agent"] for session in one["sessions"]] == ["a2"]
        status, rest = await in_thread(lambda: call(admin, None, method="GET", path="/v1/sessions?after=default/a1"))
        assert [session["agent"] for session in rest["sessions"]] == ["a2"]
        (line,) = named(events, "agent_doubted")
        assert (line["agent"], line["peer"]) == ("a2", "127.0.0.1")
        await cluster.until(lambda: bool(named(events, "broker_notice_received")))


async def test_open_streams_are_shown_by_size_and_age(
    tmp_path: Path, admin: str, token_file: Path, redis_server: RedisServer
) -> None:
    """Through the API, chosen and ordered; `rtunnel top` shows them under nodes, gateways and agents."""
    registry = RedisRegistry(redis_server.url, ttl=3.0, quarantine=5.0)
    async with running_cluster(tmp_path, registry) as cluster:
        await cluster.start(brokers=1, agents=2)
        await gateway(cluster, admin, token_file)
        await cluster.whole()
        first, second = Target("127.1.0.1"), Target("127.1.0.2")
        old = await cluster.socks(first.ip, first.port)
        big = await cluster.socks(second.ip, second.port)
        with old, big:
            await in_thread(lambda: big.sendall(b"x" * 5000 + b"\n"))
            await in_thread(lambda: read_line(big))

            async def streams(query: str = "") -> list[str]:
                status, answer = await in_thread(lambda: call(admin, None, method="GET", path=f"/v1/streams{query}"))
                assert status == 200 and answer["open"] == 2
                return [stream["agent"] for stream in answer["streams"]]

            assert await streams() == ["a2", "a1"] and await streams("?by=age") == ["a1", "a2"]
            assert await streams("?by=idle&most=1") == ["a1"]
            for query in ("?agent=a1", f"?target={first.ip}", f"?target={first.ip}:{first.port}"):
                assert await streams(query) == ["a1"]
            assert await streams("?client=127.0.0.1&node=b1&user=") == ["a2", "a1"]
            assert await streams("?client=10.9.0.4") == []
            for query, word in (
                ("?by=name", "by is one of"),
                ("?most=0", "most is a number"),
                ("?x=1", "no parameter 'x'"),
            ):
                status, answer = await in_thread(
                    lambda query=query: call(admin, None, method="GET", path=f"/v1/streams{query}")  # type: ignore[misc]
                )
                assert status == 400 and word in answer["error"]
            words = ["top", "--registry-url", redis_server.url, "--gateway", admin, "--token-file", str(token_file)]
            done = await in_thread(lambda: CliRunner().invoke(cli, words))
            for word in ("2 agents on fewer than two live nodes", "2 streams at the gateway", f"{second.ip}:", "5,001"):
                assert word in done.output, (word, done.output)
            done = await in_thread(lambda: CliRunner().invoke(cli, [*words, "--json"]))
            assert document(done.output)["streams"]["open"] == 2
    await in_thread(registry.close)


async def test_a_gateway_tells_routes_nodes_and_events(
    tmp_path: Path, admin: str, token_file: Path, redis_server: RedisServer
) -> None:
    """As its table has them; events page by page."""
    registry = RedisRegistry(redis_server.url, ttl=3.0, quarantine=5.0)

    async def get(path: str) -> tuple[int, Any]:
        return await in_thread(lambda: call(admin, None, method="GET", path=path))

    async with running_cluster(tmp_path, registry) as cluster:
        await cluster.start()
        await gateway(cluster, admin, token_file)
        await cluster.whole()
        await cluster.until(lambda: cluster.gateway.resolver.state == "ok")
        status, answer = await get("/v1/routes?ip=127.1.0.1")
        assert status == 200 and answer["registry"] == "ok"
        assert {(route["agent"], route["node"], route["state"]) for route in answer["routes"]} == {
            ("a1", "b1", "live"), ("a1", "b2", "live"),
        }  # fmt: skip
        assert (await get("/v1/routes?ip=127.1.0.9"))[1]["routes"] == []
        assert (await get("/v1/routes?ip=127.1.0.1&namespace=blue"))[1]["routes"] == []
        assert (await get("/v1/routes"))[0] == 400
        status, answer = await get("/v1/nodes")
        assert [node["node"] for node in answer["nodes"]] == ["b1", "b2"]
        await in_thread(lambda: registry.publish([b'{"event":"one"}', b"no json", b'{"event":"two"}']))
        status, answer = await get("/v1/events?most=1")
        assert [event["event"] for event in answer["events"]] == ["one"]
        status, answer = await get(f"/v1/events?after={answer['next']}")
        assert [event["event"] for event in answer["events"]] == ["two"]
        for query in ("?most=0", "?most=x", "?after=now"):
            assert (await get(f"/v1/events{query}"))[0] == 400
    await in_thread(registry.close)


async def test_the_api_describes_itself(tmp_path: Path, admin: str, token_file: Path) -> None:
    """Without the token: OpenAPI 3.1, whose references all lead somewhere."""
    async with running_cluster(tmp_path) as cluster:
        await gateway(cluster, admin, token_file)
        status, page = await in_thread(lambda: call(admin, None, method="GET", path="/openapi.json", token=None))
        assert status == 200 and page["openapi"] == "3.1.0"
        assert set(page["paths"]) == {"/v1/trace", "/v1/streams", "/v1/routes", "/v1/nodes", "/v1/events"}
        trace = page["paths"]["/v1/trace"]["post"]
        assert trace["requestBody"]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/TraceRequest"
        }
        schemas = page["components"]["schemas"]
        assert set(schemas["TraceRequest"]["properties"]) == {"target", "user", "source", "namespace"}
        refs = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(page)))
        assert refs <= set(schemas) and {"Report", "Tried", "Hop", "AgentHop", "Problem"} <= refs
