"""The gateway role: how one process of it runs, and its status."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import trio

import rtunnel
from rtunnel import admin
from rtunnel.api import Api, ApiRequest, BadRequest, Call
from rtunnel.config import Config, canonical_ip, parse_endpoint
from rtunnel.net import descriptors
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_socks.diagnosis import Report
from rtunnel_socks.dial import Target
from rtunnel_socks.gateway import Gateway
from rtunnel_socks.streams import MAX_SHOWN, ORDERS, shown


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
        calls=Api(calls(gateway), config.gateway.admin_token, "gateway.admin_token"),
        stop=stop,
        task_status=task_status,
    )


class TraceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/trace. `target`: IP:port; `user`: "": nobody has logged in."""

    target: str
    user: str = ""
    source: str = "127.0.0.1"
    namespace: str = ""


def calls(gateway: Gateway) -> dict[tuple[str, str], Call]:
    """Return the gateway's calls of the API."""

    async def trace(request: ApiRequest) -> Report:
        return await gateway.trace(*_trace_arguments(request.body, gateway.namespace))

    async def streams(request: ApiRequest) -> dict[str, object]:
        order, most, wanted = _streams_arguments(request.query)
        relay = gateway.relay
        found = await gateway.bridge.run(lambda: shown(relay.pairs, relay.loop.now, order, most, wanted))
        return {"gateway": gateway.name, "open": gateway.counts.streams, "streams": found}

    return {("POST", "/v1/trace"): trace, ("GET", "/v1/streams"): streams}


def _streams_arguments(query: Mapping[str, str]) -> tuple[str, int, dict[str, str]]:
    """Return order, number and wanted values of a request. Raises BadRequest."""
    rest = dict(query)
    order, most = rest.pop("by", "bytes"), rest.pop("most", "50")
    if order not in ORDERS:
        raise BadRequest(f"by is one of {', '.join(ORDERS)}, and not {order!r}")
    if not most.isascii() or not most.isdigit() or not 1 <= int(most) <= MAX_SHOWN:
        raise BadRequest(f"most is a number from 1 to {MAX_SHOWN}, and not {most!r}")
    if unknown := rest.keys() - {"client", "user", "target", "agent", "node"}:
        raise BadRequest(f"streams have no {min(unknown)!r} to choose them by")
    return order, int(most), rest


def _trace_arguments(body: bytes, namespace: str) -> tuple[Target, str, str | None]:
    """Return target, source and user of a request. Raises BadRequest."""
    try:
        asked = msgspec.json.decode(body, type=TraceRequest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not what /v1/trace takes: {error}") from None
    if asked.namespace not in ("", namespace):
        raise BadRequest(f"this gateway serves the namespace {namespace}, and not {asked.namespace}")
    try:
        host, port = parse_endpoint(asked.target)
        target, source = Target(namespace, canonical_ip(host), port), canonical_ip(asked.source)
    except ValueError as error:
        raise BadRequest(f"target is IP:port, and source an IP: {error}") from None
    if not port:
        raise BadRequest(f"the target {asked.target} has no port")
    return target, source, asked.user or None


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
        **counts.status(),
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
