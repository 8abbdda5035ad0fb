"""The gateway role: how one process of it runs, and its status."""

from __future__ import annotations

import time

import trio

import rtunnel
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
    """Run one gateway until `stop`. Calls `started` when it accepts clients."""
    assert registry is not None
    gateway = Gateway(config, registry)
    await admin.run_beside(
        gateway,
        config.gateway.admin,
        key="gateway.admin",
        status=lambda: status(gateway),
        warnings=gateway.warnings,
        stop=stop,
        task_status=task_status,
    )


def status(gateway: Gateway) -> dict[str, object]:
    """Return what `/statusz` shows of a gateway."""
    counts, routes = gateway.counts, gateway.table.counts()
    return {
        "role": "gateway",
        "version": rtunnel.__version__,
        "name": gateway.name,
        "namespace": gateway.namespace,
        "state": "draining" if gateway.draining else "live",
        "tuples": routes.tuples,
        "forgotten": routes.forgotten,
        "routes_age": gateway.resolver.age,
        "nodes": [{"node": n.node, "state": n.state} for n in gateway.table.nodes.values()],
        "registry": gateway.resolver.state,
        "clients": counts.clients,
        **counts.status(),
        "clock": gateway.clock.status(time.monotonic()),
        "shortages": dict(gateway.counts.shortages),
        "hedges": {"sent": gateway.hedging.sent, "held": gateway.hedging.held},
        "proof_failures": dict(counts.unproven),
        "pairs": len(gateway.relay.pairs),
        "held": gateway.relay.memory.held,
        "access": gateway.access.status(),
        "proof": gateway.config.proof,
        "trust": gateway.trust.follower.status() if gateway.trust.follower is not None else None,
        "sources_and_users_known": gateway.limits.known,
    }


ROLE = Role(name="gateway", help="SOCKS5 and HTTP proxy for the original IPs.", serve=serve, needs_registry=True)
