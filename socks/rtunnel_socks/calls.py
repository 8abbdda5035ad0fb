"""The gateway's operations of the API: traces, streams, routes, nodes, events. In trio's thread."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from rtunnel import events
from rtunnel.api import ApiRequest, BadRequest, Operation
from rtunnel.config import canonical_ip, format_endpoint, parse_endpoint
from rtunnel.registry import NodeRecord, Registry, Tuple
from rtunnel_socks.diagnosis import Report
from rtunnel_socks.dial import Target
from rtunnel_socks.gateway import Gateway
from rtunnel_socks.streams import MAX_SHOWN, ORDERS, StreamFacts, shown

#: Fields by which streams are chosen.
CHOOSE: Final = {
    "client": "the client's IP",
    "user": "the user; empty: no login",
    "target": "IP, or IP:port",
    "agent": "agent_id",
    "node": "the broker's node",
}


class TraceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/trace. `target`: IP:port; `user`: "": nobody has logged in."""

    target: str
    user: str = ""
    source: str = "127.0.0.1"
    namespace: str = ""


class Streams(msgspec.Struct, frozen=True):
    """The answer of GET /v1/streams; `open`: the number of all open streams."""

    gateway: str
    open: int
    streams: list[StreamFacts]


class Route(msgspec.Struct, frozen=True):
    """One tuple of an address. `heartbeat_age`: seconds since the node's heartbeat; None: none."""

    namespace: str
    agent: str
    node: str
    ps: str
    agent_port: int
    epoch: str
    state: str
    heartbeat_age: float | None


class Routes(msgspec.Struct, frozen=True):
    """The answer of GET /v1/routes. `age`: seconds since the table was true to the registry."""

    gateway: str
    age: float | None
    registry: str
    routes: list[Route]


class Nodes(msgspec.Struct, frozen=True):
    """The answer of GET /v1/nodes: the nodes with a heartbeat, as this gateway sees them."""

    gateway: str
    nodes: list[NodeRecord]


def operations(gateway: Gateway, registry: Registry) -> dict[tuple[str, str], Operation]:
    """Return the gateway's operations."""

    async def trace(request: ApiRequest) -> Report:
        return await gateway.trace(*_trace_arguments(request.body, gateway.namespace))

    async def streams(request: ApiRequest) -> Streams:
        wanted = dict(request.query)
        order, most = wanted.pop("by", "bytes"), events.number(wanted.pop("most", "50"), MAX_SHOWN)
        if order not in ORDERS:
            raise BadRequest(f"by is one of {', '.join(ORDERS)}, and not {order!r}")
        relay = gateway.relay
        found = await gateway.bridge.run(lambda: shown(relay.pairs, relay.loop.now, order, most, wanted))
        return Streams(gateway.name, gateway.counts.streams, found)

    async def routes(request: ApiRequest) -> Routes:
        try:
            ip = canonical_ip(request.query.get("ip", ""))
        except ValueError as error:
            raise BadRequest(f"ip: {error}") from None
        namespace = request.query.get("namespace", gateway.namespace)
        tuples = await gateway.bridge.run(lambda: gateway.table.lookup(namespace, ip))
        resolver = gateway.resolver
        return Routes(gateway.name, resolver.age, resolver.state, [_route(gateway, entry) for entry in tuples])

    async def nodes(request: ApiRequest) -> Nodes:
        found = await gateway.bridge.run(lambda: sorted(gateway.table.nodes.values(), key=lambda node: node.node))
        return Nodes(gateway.name, found)

    async def read_events(request: ApiRequest) -> events.Page:
        return await events.read(registry, request.query, gateway.bridge.registry)

    return {
        ("POST", "/v1/trace"): Operation(trace, "Dial a target by every path, and say why not", Report, TraceRequest),
        ("GET", "/v1/streams"): Operation(
            streams, "Open streams", Streams,
            query={"by": f"the order: {', '.join(ORDERS)}", "most": f"how many, up to {MAX_SHOWN}", **CHOOSE},
        ),
        ("GET", "/v1/routes"): Operation(
            routes, "The tuples of one address", Routes,
            query={"ip": "the address", "namespace": "default: the gateway's"},
        ),
        ("GET", "/v1/nodes"): Operation(nodes, "The broker nodes", Nodes),
        ("GET", "/v1/events"): Operation(read_events, "Events of the cluster", events.Page, query=events.QUERY),
    }  # fmt: skip


def _route(gateway: Gateway, entry: Tuple) -> Route:
    node = gateway.table.nodes.get(entry.node)
    return Route(
        entry.namespace, entry.agent_id, entry.node, format_endpoint(entry.ps_ip, entry.ps_port), entry.agent_port,
        str(entry.epoch), "no heartbeat" if node is None else node.state,
        None if node is None else round(max(0.0, time.time() - node.beat), 1),
    )  # fmt: skip


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
