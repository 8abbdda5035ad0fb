"""The gateway role."""

from __future__ import annotations

import trio

from rtunnel import admin
from rtunnel.config import Config
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_socks.gateway import Gateway


async def serve(
    config: Config,
    registry: Registry | None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Gateway] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one gateway until `stop`; started when it accepts clients."""
    assert registry is not None
    gateway = Gateway(config, registry)
    async with trio.open_nursery() as nursery:
        if config.gateway.admin:
            await nursery.start(_serve_admin, gateway)
        await gateway.run(stop, task_status)
        nursery.cancel_scope.cancel()


async def _serve_admin(gateway: Gateway, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
    routes = admin.health_routes(gateway.reasons, lambda: status(gateway))
    await admin.serve(gateway.config.admin, routes, key="gateway.admin", task_status=task_status)


def status(gateway: Gateway) -> dict[str, object]:
    """What this gateway knows and does."""
    counts = gateway.counts
    return {
        "role": "gateway",
        "name": gateway.name,
        "namespace": gateway.namespace,
        "tuples": gateway.table.counts().tuples,
        "nodes": [{"node": n.node, "state": n.state} for n in gateway.table.nodes.values()],
        "registry": gateway.registry_down or "ok",
        "clients": counts.clients,
        "streams": counts.streams,
        "accepted": counts.accepted,
        "refused": counts.refused,
        "bytes_up": counts.bytes_up,
        "bytes_down": counts.bytes_down,
        "pairs": len(gateway.relay.pairs),
    }


ROLE = Role(name="gateway", help="SOCKS5 and HTTP proxy for the original IPs.", serve=serve, needs_registry=True)
