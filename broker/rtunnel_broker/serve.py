"""The broker role: how one process of it runs, and its status."""

from __future__ import annotations

import time

import msgspec
import trio

import rtunnel
from rtunnel import admin
from rtunnel.api import Api
from rtunnel.config import Config
from rtunnel.net import descriptors
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_broker.calls import operations
from rtunnel_broker.node import Node


async def serve(
    config: Config,
    registry: Registry | None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one broker node until `stop`. Calls `started` when it accepts links."""
    assert registry is not None
    node = Node(config, registry)
    await admin.run_beside(
        node,
        config.broker.admin,
        key="broker.admin",
        status=lambda: status(node),
        calls=Api(operations(node), config.broker.admin_token, "broker.admin_token"),
        stop=stop,
        task_status=task_status,
    )


def status(node: Node) -> dict[str, object]:
    """Return what `/statusz` shows of a node."""
    counts, links, presence = node.counts, node.relay.links, node.presence
    used, limit = descriptors()
    return {
        "role": "broker",
        "version": rtunnel.__version__,
        "node": node.node,
        "host": node.host,
        "ip": node.ip,
        "incarnation": presence.incarnation,
        "state": "draining" if node.draining else "live",
        "reasons": node.reasons(),
        "registry": presence.down or "ok",
        "registry_calls": [
            {"call": call, "result": result, **times.status()}
            for (call, result), times in node.bridge.registry_calls.items()
        ],
        "registry_clock_offset": presence.clock_offset,
        "beat_age": presence.beat_age,
        "tuples_registered": presence.tuples,
        "tuples_put_back": presence.tuples_put_back,
        "sessions": len(node.sessions),
        "handshakes": node.links.handshakes,
        "session_refusals": dict(node.session_refusals),
        "session_endings": dict(node.session_endings),
        "links_lost": dict(node.links.lost),
        "dials_lost": dict(counts.lost),
        "clock": node.clock.status(time.monotonic()),
        "duplicate_agents": [msgspec.to_builtins(entry) for entry in node.duplicates.current()],
        "certificate_ends": node.trust.presented.ends,
        "trust": node.trust.follower.status() if node.trust.follower is not None else None,
        "notes": {"waiting": len(node.notes), "dropped": node.notes.dropped},
        "waiting": counts.waiting,
        "ports": {name: msgspec.to_builtins(ports) for name, ports in node.port_counts().items()},
        "descriptors": used,
        "descriptor_limit": limit,
        "window_budget": node.relay.memory.left,
        "held": node.relay.memory.held,
        **counts.status(node.relay.pairs),
        "pairs": len(node.relay.pairs),
        "links": len(links),
        "pings": links.pings,
        "pings_lost": links.pings_lost,
        "round_trips": [links.round_trips.status()],
    }


ROLE = Role(name="broker", help="Take agents' links and give each a port.", serve=serve, needs_registry=True)
