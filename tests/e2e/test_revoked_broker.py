"""A broker whose certificate is revoked, or from a stolen CA, loses its agents, and gets no others."""

from __future__ import annotations

import shutil
from functools import partial
from operator import methodcaller
from pathlib import Path

from rtunnel.trust import pki
from rtunnel.trust.tls import certificate_der, certificate_fingerprint
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


async def test_agents_leave_a_broker_that_has_shown_a_certificate_of_a_stolen_ca(tmp_path: Path) -> None:
    """Whoever has the CA's key can be a broker: agents that were led to that one hear of it from any other."""
    async with running_cluster(tmp_path, broker__join_token="") as cluster, authority(cluster.secrets) as server:
        before = str(shutil.copy(cluster.secrets / "ca.pem", tmp_path))
        pki.issue_broker(cluster.secrets, "rogue")
        rogue = {"certificate": str(cluster.secrets / "rogue.pem"), "key": str(cluster.secrets / "rogue.key")}
        node = (await cluster.start_broker("b1", authority=address(server))).node
        await cluster.start_broker("b2", ca=before, **rogue)
        agent = (await cluster.start_agent("a1", ca=before)).agent
        await cluster.until(lambda: agent.state == "ready")
        for step in ("start_rotation", "switch_rotation"):
            generation = agent.credentials.generation
            change(cluster.secrets, methodcaller(step))
            await cluster.until(partial(lambda than: agent.credentials.generation > than, generation))
        old, new = agent.identity, cluster.certify("a1", "127.1.0.1")
        pki.issue_broker(cluster.secrets, "newer")
        for name, file in ((new, agent.config.certificate), ("newer", str(cluster.secrets / "broker.pem"))):
            for kind in ("key", "pem"):
                (cluster.secrets / f"{name}.{kind}").replace(Path(file).with_suffix(f".{kind}"))
        fingerprint = certificate_fingerprint(certificate_der(cluster.secrets / "broker.pem"))
        await cluster.until(lambda: node.trust.presented.binding == fingerprint and agent.identity is not old)
        assert agent.redundancy == "2/2"
        change(cluster.secrets, lambda opened: opened.finish_rotation(stolen=True))
        await cluster.until(lambda: not cluster.brokers["b2"].node.sessions)
        await cluster.until(lambda: agent.redundancy == "1/2" and list(node.sessions) == ["default/a1"])
        await cluster.until(lambda: any("certificate not accepted" in reason for reason in agent.reasons()))
