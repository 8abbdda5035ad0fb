"""The broker role: how one process of it runs, and its status."""

from __future__ import annotations

import time

import msgspec
import trio

import rtunnel
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
    """Run one broker node until `stop`. Calls `started` when it accepts links."""
    assert registry is not None
    node = Node(config, registry)
    await admin.run_beside(
        node,
        config.broker.admin,
        key="broker.admin",
        status=lambda: status(node),
        stop=stop,
        task_status=task_status,
    )


def status(node: Node) -> dict[str, object]:
    """Return what `/statusz` shows of a node."""
    counts = node.counts
    return {
        "role": "broker",
        "version": rtunnel.__version__,
        "node": node.node,
        "host": node.host,
        "ip": node.ip,
        "incarnation": node.presence.incarnation,
        "state": "draining" if node.draining else "live",
        "registry": node.presence.down or "ok",
        "sessions": len(node.sessions),
        "handshakes": node.links.handshakes,
        "session_refusals": dict(node.session_refusals),
        "links_lost": dict(node.links.lost),
        "dials_lost": dict(counts.lost),
        "clock": node.clock.status(time.monotonic()),
        "duplicate_agents": [msgspec.to_builtins(entry) for entry in node.duplicates.current()],
        "certificate_ends": node.trust.presented.ends,
        "trust": node.trust.follower.status() if node.trust.follower is not None else None,
        "notes": {"waiting": len(node.notes), "dropped": node.notes.dropped},
        "waiting": counts.waiting,
        "window_budget": node.relay.memory.left,
        "held": node.relay.memory.held,
        **counts.status(),
        "pairs": len(node.relay.pairs),
        "links": len(node.relay.links),
    }


ROLE = Role(name="broker", help="Take agents' links and give each a port.", serve=serve, needs_registry=True)
