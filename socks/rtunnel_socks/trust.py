"""The trust list by which a gateway checks brokers and agents; it changes while the
gateway runs.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from rtunnel.bridge import Bridge
from rtunnel.config import GatewayConfig
from rtunnel.trust.follower import TrustFollower
from rtunnel.trust.identity import Identity, TrustStore
from rtunnel.trust.tls import dial_client_context
from rtunnel_socks.proof import Proofs


class GatewayTrust:
    """The CAs and revocations of one gateway, its TLS to guarded ports, and its proofs.

    In the relay's thread.
    """

    def __init__(
        self, config: GatewayConfig, bridge: Bridge, log: FilteringBoundLogger, changed: Callable[[], None]
    ) -> None:
        """`changed` is called in the relay's thread after each change. Raises TrustError."""
        self._changed = changed
        self._wants_tls = config.dial_security == "tls"
        self.follower: TrustFollower | None = None  # None: no certificate is checked
        self.store: TrustStore | None = None
        if config.ca:
            trust = Path(config.trust) if config.trust else None
            self.follower = TrustFollower(
                ca=Path(config.ca), trust=trust, authority=config.authority, log=log,
                apply=bridge.run, changed=self._renew,
            )  # fmt: skip
            self.store = self.follower.trust_store
        self.proofs = Proofs(self.store) if self.store is not None and config.proof == "required" else None
        self._cas = ""  # the CAs (PEM) of `dial_tls`
        self.dial_tls = self._make_dial_tls()  # None: guarded ports are plain

    def _make_dial_tls(self) -> ssl.SSLContext | None:
        if not self._wants_tls or self.store is None:
            return None
        self._cas = self.store.pem
        return dial_client_context(self._cas)

    def _renew(self) -> None:
        if self.store is not None and self.store.pem != self._cas:
            self.dial_tls = self._make_dial_tls()
        self._changed()

    def fault_of(self, broker: bytes | None) -> str:
        """Return why this certificate (DER) of a broker is not good; empty when it is, or when none
        is checked.
        """
        return self.store.fault_of(broker) if self.store is not None else ""

    def allows(self, agent: Identity | None, broker: bytes | None) -> bool:
        """Return whether a stream may go on that this agent has proved, through a broker with this
        certificate.

        A CA that was removed in order ends no stream that was proved by it before: an agent moves
        its sessions to another certificate, but can't move a stream.
        """
        store = self.store
        if store is None:
            return True
        if agent is not None and (store.is_revoked(agent) or store.is_void(agent)):
            return False
        return not store.fault_of(broker)
