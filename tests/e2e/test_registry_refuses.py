"""A Redis that answers reads and refuses writes: everything that is well goes on, and everybody says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rtunnel.admin import health_routes
from rtunnel.registry.redis import RedisRegistry
from rtunnel_broker.serve import status as broker_status
from rtunnel_socks.serve import status as gateway_status
from support.cluster import Cluster, SocksRefused, Target, running_cluster
from support.logs import Events, named
from support.redis_server import RedisServer

#: As short as a busy machine allows: what is to be seen happens after the ttl and the grace period.
TIMES = {"registry__heartbeat": 0.2, "registry__ttl": 1.5, "registry__reconcile": 0.5, "registry__quarantine": 5.0}

Change = Callable[[Any], object]
REFUSALS: dict[str, tuple[Change, Change, str]] = {
    "out of memory": (
        lambda client: client.config_set("maxmemory", "1"),
        lambda client: client.config_set("maxmemory", "0"),
        "raise the server's maxmemory",
    ),
    "read only": (
        lambda client: client.replicaof("127.0.0.1", "1"),
        lambda client: client.replicaof("NO", "ONE"),
        "must name the master",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_what_was_known_is_served_while_redis_refuses_writes(
    tmp_path: Path, make_redis: Callable[..., RedisServer], events: Events, refusal: str
) -> None:
    """Far beyond the ttl; nobody says that the registry is fine; and all is as before when it takes writes again."""
    refuse, allow, fix = REFUSALS[refusal]
    server = make_redis().start()
    with closing(RedisRegistry(server.url, ttl=1.5, quarantine=5.0)) as registry, server.client() as client:
        async with running_cluster(tmp_path, registry, **TIMES) as cluster:
            await cluster.start(brokers=2)
            target = Target("127.1.0.1")
            nodes = [part.node for part in cluster.brokers.values()]
            refuse(client)
            await cluster.until(lambda: all(fix in "".join(node.reasons()) for node in nodes))
            assert all(fix in str(broker_status(node)["registry"]) for node in nodes)
            assert any(fix in line["reason"] for line in named(events, "registry_unavailable"))

            await cluster.until(lambda: bool(named(events, "heartbeats_lost")))
            assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
            assert len(cluster.gateway.table.lookup("default", target.ip)) == 2
            said = str(gateway_status(cluster.gateway)["registry"])
            assert "no broker has had a heartbeat" in said
            assert f"registry: {said}"[:60] in str(ready(cluster))
            assert "2 last known tuples" in (await unknown(cluster))
            assert named(events, "heartbeats_lost")[0]["tuples_known"] == 2

            allow(client)
            await cluster.until(lambda: not any(node.reasons() for node in nodes))
            await cluster.until(lambda: gateway_status(cluster.gateway)["registry"] == "ok")
            assert ready(cluster) == (200, b'{"ready":true,"reasons":[]}')
            await cluster.until(lambda: bool(named(events, "heartbeats_returned")))
            await cluster.whole()
            assert await cluster.ask(target.ip, target.port) == b"127.1.0.1:hello"
        assert len(named(events, "heartbeats_lost")) == 1


def ready(cluster: Cluster) -> tuple[int, bytes]:
    """What /readyz of the gateway answers."""
    gateway = cluster.gateway
    answer = health_routes(gateway.reasons, dict, warnings=gateway.warnings)["/readyz"]()
    assert isinstance(answer, tuple)
    return answer[0], answer[2].strip()


async def unknown(cluster: Cluster) -> str:
    """What a client is told of a target that the gateway does not know."""
    with pytest.raises(SocksRefused) as refused:
        await cluster.socks("198.51.100.7", 80)
    assert refused.value.code == 1, "not that there is no such target"
    answer = await cluster.http(b"CONNECT 198.51.100.7:80 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"registry_unavailable" in answer
    return answer.decode()
