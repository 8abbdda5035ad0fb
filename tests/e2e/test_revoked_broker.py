"""A broker whose certificate is revoked loses its agents, and gets no others."""

from __future__ import annotations

from pathlib import Path

from rtunnel.trust import pki
from support.authority import address, authority, change
from support.cluster import Target, running_cluster


async def test_agents_leave_a_broker_whose_certificate_is_revoked(tmp_path: Path) -> None:
    """They hear it from any other broker; who starts later hears it too."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        pki.issue_broker(cluster.secrets, "b2")
        own = {"certificate": str(cluster.secrets / "b2.pem"), "key": str(cluster.secrets / "b2.key")}
        await cluster.start_broker("b1", authority=address(server))
        await cluster.start_broker("b2", authority=address(server), **own)
        await cluster.start_gateway()
        agent = (await cluster.start_agent("a1")).agent
        await cluster.whole()
        change(cluster.secrets, lambda opened: opened.revoke("broker/b2"))
        await cluster.until(lambda: not cluster.brokers["b2"].node.sessions)
        await cluster.until(lambda: any("broker/b2 is revoked" in slot.reason for slot in agent.slots))
        later = (await cluster.start_agent("a2", "127.1.0.2")).agent
        await cluster.until(lambda: any("broker/b2 is revoked" in slot.reason for slot in later.slots))
        await cluster.until(lambda: agent.redundancy == later.redundancy == "1/2")  # b2 may have come first
        assert {session.owner for session in cluster.brokers["b1"].node.sessions.values()} == {
            "default/a1",
            "default/a2",
        }
        target = Target("127.1.0.1")
        assert await cluster.ask("127.1.0.1", target.port) == b"127.1.0.1:hello"
