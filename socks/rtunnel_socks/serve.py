"""The gateway role: how one process of it runs, and its status."""

from __future__ import annotations

import time

import trio

import rtunnel
from rtunnel import admin
from rtunnel.api import Api
from rtunnel.config import Config
from rtunnel.net import descriptors
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_socks.calls import operations
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
        calls=Api(operations(gateway, registry), config.gateway.admin_token, "gateway.admin_token"),
        stop=stop,
        task_status=task_status,
    )


def status(gateway: Gateway) -> dict[str, object]:
    """Return what `/statusz` shows of a gateway."""
    counts, routes = gateway.counts, gateway.table.counts()
    used, limit = descriptors()
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
        "reasons": gateway.reasons(),
        "registry": gateway.resolver.state,
        "registry_calls": [
            {"call": call, "result": result, **times.status()}
            for (call, result), times in gateway.bridge.registry_calls.items()
        ],
        "registry_clock_offset": gateway.resolver.clock_offset(),
        "clients": counts.clients,
        **counts.status(gateway.relay.pairs),
        "clock": gateway.clock.status(time.monotonic()),
        "shortages": dict(gateway.counts.shortages),
        "hedges": {"sent": gateway.hedging.sent, "held": gateway.hedging.held},
        "attempts": [{"node": node, "code": word, "count": n} for (node, word), n in counts.attempts.items()],
        "setup_times": [{"code": code, **times.status()} for code, times in gateway.setup_times.items()],
        "first_byte_times": [gateway.first_byte_times.status()],
        "proof_failures": dict(counts.unproven),
        "pairs": len(gateway.relay.pairs),
        "held": gateway.relay.memory.held,
        "descriptors": used,
        "descriptor_limit": limit,
        "access": gateway.access.status(),
        "proof": gateway.config.proof,
        "trust": gateway.trust.follower.status() if gateway.trust.follower is not None else None,
        "sources_and_users_known": gateway.limits.known,
    }


ROLE = Role(name="gateway", help="SOCKS5 and HTTP proxy for the original IPs.", serve=serve, needs_registry=True)
