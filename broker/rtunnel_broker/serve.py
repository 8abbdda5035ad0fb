"""The broker role: how one process of it runs, and its status."""

from __future__ import annotations

import time
from typing import Final

import msgspec
import trio

import rtunnel
from rtunnel import admin
from rtunnel.api import Api, ApiRequest, Call
from rtunnel.config import Config
from rtunnel.net import descriptors
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_broker.node import Node
from rtunnel_broker.session import Session


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
        calls=Api(calls(node), config.broker.admin_token, "broker.admin_token"),
        stop=stop,
        task_status=task_status,
    )


#: Sessions in one answer of GET /v1/sessions.
MAX_SHOWN: Final = 500


class SessionFacts(msgspec.Struct, frozen=True):
    """One session as GET /v1/sessions shows it. Times are seconds, moments seconds since 1970."""

    namespace: str
    agent: str
    epoch: str
    state: str
    addresses: list[str]
    interfaces: list[str]  # of the addresses, as the agent has told in its Hello
    lost: list[str]  # addresses that the agent should have and has not, as told there
    peer: str
    host: str
    software: str
    streams: int
    rtt: float
    silence: float
    certificate_end: int
    doubts: tuple[str, ...]


def calls(node: Node) -> dict[tuple[str, str], Call]:
    """Return the node's calls of the API."""

    async def sessions(request: ApiRequest) -> dict[str, object]:
        """Answer sessions in the order of their owners, from `after` on; `agent` chooses one."""
        await trio.lowlevel.checkpoint()
        after, agent = request.query.get("after", ""), request.query.get("agent", "")
        owners = sorted(
            owner for owner, session in node.sessions.items()
            if owner > after and (not agent or (session.hello is not None and session.hello.agent_id == agent))
        )  # fmt: skip
        shown = owners[:MAX_SHOWN]
        facts = [_facts(node.sessions[owner]) for owner in shown]
        return {"node": node.node, "sessions": facts, "next": shown[-1] if len(owners) > MAX_SHOWN else ""}

    return {("GET", "/v1/sessions"): sessions}


def _facts(session: Session) -> SessionFacts:
    hello, link = session.hello, session.link
    assert hello is not None  # every registered session has one
    return SessionFacts(
        hello.namespace, hello.agent_id, str(session.epoch), session.state.name.lower(), sorted(session.addresses),
        hello.interfaces, hello.lost, session.peer, hello.host, hello.software, session.streams,
        0.0 if link is None else link.rtt, 0.0 if link is None else round(link.silence, 3), hello.certificate_end,
        session.doubts,
    )  # fmt: skip


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
        **counts.status(),
        "pairs": len(node.relay.pairs),
        "links": len(links),
        "pings": links.pings,
        "pings_lost": links.pings_lost,
        "round_trips": [links.round_trips.status()],
    }


ROLE = Role(name="broker", help="Take agents' links and give each a port.", serve=serve, needs_registry=True)
