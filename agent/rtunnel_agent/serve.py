"""The agent role: how one process of it runs, and its status."""

from __future__ import annotations

import trio

import rtunnel
from rtunnel import admin
from rtunnel.config import Config
from rtunnel.net import descriptors
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_agent.agent import Agent
from rtunnel_agent.identity import locked


async def serve(
    config: Config,
    registry: Registry | None = None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Agent] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one agent until `stop`. Calls `started` when it begins to dial."""
    with locked(config.agent.identity):
        agent = Agent(config)
        await admin.run_beside(
            agent,
            config.agent.admin,
            key="agent.admin",
            status=lambda: status(agent),
            stop=stop,
            task_status=task_status,
        )


def status(agent: Agent) -> dict[str, object]:
    """Return what `/statusz` shows of an agent."""
    counts, links = agent.targets.counts, agent.relay.links
    used, limit = descriptors()
    return {
        "role": "agent",
        "version": rtunnel.__version__,
        "agent_id": agent.agent_id,
        "namespace": agent.config.namespace,
        "addresses": agent.addresses,
        "addresses_lost": agent.lost_addresses,
        "exposes": agent.config.exposes,
        "state": agent.state,
        "redundancy": agent.redundancy,
        "reason": "; ".join(agent.reasons()),
        "one_host": agent.one_host,
        "identity": agent.credentials.status(),
        "sessions_wanted": len(agent.slots),
        "sessions": [
            {
                "node": session.node,
                "host": session.welcome.host,
                "epoch": str(session.welcome.epoch),
                "ps": f"{session.welcome.ip}:{session.welcome.port}",
                "open_ports": [[p.port, p.ip, p.target_port] for p in session.welcome.open_ports],
                "since": slot.since,
                "rtt_ms": round(session.link.rtt * 1000, 3) if session.link else 0,
                "silence": round(session.link.silence, 1) if session.link else 0,
                "streams": session.streams,
            }
            for slot in agent.slots
            if (session := slot.session) is not None and session.welcome is not None
        ],
        "pings": links.pings,
        "pings_lost": links.pings_lost,
        "descriptors": used,
        "descriptor_limit": limit,
        "draining": [session.node for session in agent.draining],
        "held": agent.relay.memory.held,
        **counts.status(agent.relay.pairs),
    }


ROLE = Role(name="agent", help="Dial out to brokers and serve this host's ports.", serve=serve, needs_registry=False)
