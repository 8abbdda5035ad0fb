"""The broker's operations of the API: the sessions of its node. In trio's thread."""

from __future__ import annotations

from typing import Final

import msgspec
import trio

from rtunnel.api import ApiRequest, Operation
from rtunnel_broker.node import Node
from rtunnel_broker.session import Session

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


class Sessions(msgspec.Struct, frozen=True):
    """The answer of GET /v1/sessions; `next`: the `after` of the next page, empty at the end."""

    node: str
    sessions: list[SessionFacts]
    next: str


def operations(node: Node) -> dict[tuple[str, str], Operation]:
    """Return the node's operations."""

    async def sessions(request: ApiRequest) -> Sessions:
        """Answer sessions in the order of their owners, from `after` on; `agent` chooses one."""
        await trio.lowlevel.checkpoint()
        after, agent = request.query.get("after", ""), request.query.get("agent", "")
        owners = sorted(
            owner for owner, session in node.sessions.items()
            if owner > after and (not agent or (session.hello is not None and session.hello.agent_id == agent))
        )  # fmt: skip
        shown = owners[:MAX_SHOWN]
        facts = [_facts(node.sessions[owner]) for owner in shown]
        return Sessions(node.node, facts, shown[-1] if len(owners) > MAX_SHOWN else "")

    query = {"after": "NAMESPACE/AGENT_ID, or `next` of the answer before", "agent": "agent_id"}
    return {("GET", "/v1/sessions"): Operation(sessions, "Sessions of this node", Sessions, query=query)}


def _facts(session: Session) -> SessionFacts:
    hello, link = session.hello, session.link
    assert hello is not None  # every registered session has one
    return SessionFacts(
        hello.namespace, hello.agent_id, str(session.epoch), session.state.name.lower(), sorted(session.addresses),
        hello.interfaces, hello.lost, session.peer, hello.host, hello.software, session.streams,
        0.0 if link is None else link.rtt, 0.0 if link is None else round(link.silence, 3), hello.certificate_end,
        session.doubts,
    )  # fmt: skip
