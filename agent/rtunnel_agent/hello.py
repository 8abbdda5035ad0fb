"""The Hellos of one agent process, which begin its sessions. trio's side."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

import rtunnel
from rtunnel.config import AgentConfig, host_name, parse_endpoint
from rtunnel.relay.memory import START_WINDOW
from rtunnel.trust.keys import Token, load_token
from rtunnel.wire import messages
from rtunnel.wire.messages import Hello, Publish
from rtunnel_agent.handshake import new_nonce
from rtunnel_agent.host import host_id
from rtunnel_agent.identity import Credentials
from rtunnel_agent.targets import Targets
from rtunnel_agent.ways import interfaces_of

#: Characters of a complaint.
MAX_COMPLAINT: Final = 256


class Hellos:
    """Makes the Hellos of one agent process; they share its instance and its host id."""

    def __init__(self, config: AgentConfig, agent_id: str, targets: Targets, credentials: Credentials) -> None:
        """Read the join token. Raises TrustError."""
        self._config = config
        self._agent_id = agent_id
        self._targets = targets
        self._credentials = credentials
        self._token: Token | None = load_token(Path(config.join_token)) if config.join_token else None
        self._publish = [_publish(entry.target, entry.port, entry.allow) for entry in config.publish]
        self._instance = new_nonce()
        self._host_id = host_id(config.identity)

    @property
    def token(self) -> Token | None:
        """The join token that a Hello names; None when the link's certificate proves the agent."""
        return None if self._credentials.by_certificate else self._token

    def complain(self, addresses: Iterable[str], lost: Iterable[str], complaint: str) -> Hello:
        """Return the Hello of a link without a certificate, after TLS has rejected the
        certificate.
        """
        hello = self.make(addresses, lost, (), ())
        return replace(hello, token_id="", complaint=complaint[:MAX_COMPLAINT])

    def make(self, addresses: Iterable[str], lost: Iterable[str], nodes: Iterable[str], hosts: Iterable[str]) -> Hello:
        """Return the next Hello.

        `lost`: addresses that the host should have and has not. `nodes`: those on which the agent
        has a session. `hosts`: those on which it wants no other.
        """
        token, addresses = self.token, list(addresses)
        identity = self._credentials.identity
        return Hello(
            version=messages.VERSION,
            agent_id=self._agent_id,
            instance=self._instance,
            namespace=self._config.namespace,
            addresses=addresses,
            nonce=new_nonce(),
            token_id="" if token is None else token.id,
            exposes=self._targets.exposed.ports,
            publish=self._publish,
            holds=sorted(nodes),
            holds_hosts=sorted(hosts),
            software=f"rtunnel {rtunnel.__version__}",
            trust=self._credentials.generation,
            start_window=START_WINDOW,
            host_id=self._host_id,
            host=host_name()[:128],
            time=int(time.time() * 1000),
            interfaces=interfaces_of(addresses),
            lost=list(lost)[: messages.MAX_LOST],
            certificate_end=0 if identity is None else int(identity.who.ends),
        )


def _publish(target: str, port: int, allow: list[str]) -> Publish:
    ip, target_port = parse_endpoint(target)
    return Publish(ip=ip, target_port=target_port, port=port, allow=allow)
