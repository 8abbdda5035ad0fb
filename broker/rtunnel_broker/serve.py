"""The broker role."""

from __future__ import annotations

import trio

from rtunnel import admin
from rtunnel.config import Config
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_broker.node import Node


async def serve(
    config: Config,
    registry: Registry | None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one broker node until `stop`; started when it accepts links."""
    assert registry is not None
    node = Node(config, registry)
    async with trio.open_nursery() as nursery:
        if config.broker.admin:
            await nursery.start(_serve_admin, node)
        await node.run(stop, task_status)
        nursery.cancel_scope.cancel()


async def _serve_admin(node: Node, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
    routes = admin.health_routes(node.reasons, lambda: status(node))
    await admin.serve(node.config.admin, routes, key="broker.admin", task_status=task_status)


def status(node: Node) -> dict[str, object]:
    """What this node holds and does."""
    counts = node.counts
    return {
        "role": "broker",
        "node": node.node,
        "host": node.host,
        "ip": node.ip,
        "incarnation": node.incarnation,
        "state": "draining" if node.draining else "live",
        "registry": node.registry_down or "ok",
        "sessions": len(node.sessions),
        "handshakes": node.handshakes,
        "streams": counts.streams,
        "accepted": counts.accepted,
        "refused": counts.refused,
        "bytes_up": counts.bytes_up,
        "bytes_down": counts.bytes_down,
        "pairs": len(node.relay.pairs),
        "links": len(node.relay.links),
    }


ROLE = Role(name="broker", help="Take agents' links and give each a port.", serve=serve, needs_registry=True)
