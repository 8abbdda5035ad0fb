"""Tells a broker that TLS has rejected the agent's certificate: the broker can't know whose it was.

The agent opens a link without a certificate, sends a Hello that the broker refuses, and is done
(docs/wire.md, "Complaints"). trio's side.
"""

from __future__ import annotations

from typing import Final

import trio

from rtunnel.bridge import Bridge
from rtunnel.relay.ends import EndHandler
from rtunnel.relay.lost import Lost
from rtunnel.relay.stream import StreamEnd
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal
from rtunnel_agent.dialler import Dialler
from rtunnel_agent.handshake import AgentSession
from rtunnel_agent.identity import LinkContexts

#: Seconds between two complaints of one agent.
COMPLAIN_EVERY: Final = 300.0
#: Seconds for one complaint, from the connect to the broker's answer.
PATIENCE: Final = 20.0


class Complaints:
    """Sends complaints, when `take_turn` says that it is time for one."""

    def __init__(self, bridge: Bridge, dialler: Dialler, timeout: float) -> None:
        """`timeout`: seconds for the handshake of a link."""
        self._bridge = bridge
        self._dialler = dialler
        self._timeout = timeout
        self._next = 0.0  # when the next one may be sent, by trio's clock

    def take_turn(self) -> bool:
        """Return whether COMPLAIN_EVERY has passed since the last turn; if so, it begins anew."""
        now = trio.current_time()
        if now < self._next:
            return False
        self._next = now + COMPLAIN_EVERY
        return True

    async def send(self, hello: Hello, tls: LinkContexts) -> None:
        """Send this Hello to the next broker, and wait for the answer, whatever it is."""
        try:
            address = await self._dialler.brokers.next()
        except OSError:
            return  # no address is known; the sessions say so
        owner = _Complainant(self._bridge)
        session = AgentSession(owner, hello, b"", self._timeout)
        self._dialler.dial(session, address, tls.enrolments, lambda lost: self._bridge.post(owner.over.set))
        with trio.move_on_after(PATIENCE):
            await owner.over.wait()
        self._bridge.relay.call(lambda: session.end("the complaint is said"))


class _Complainant:
    """The owner of a complaint's session. In the relay's thread, but for `over`."""

    def __init__(self, bridge: Bridge) -> None:
        self.over = trio.Event()
        self._bridge = bridge

    def session_ready(self, session: AgentSession) -> None:
        """Is not called: the session has its Hello."""

    def session_up(self, session: AgentSession) -> None:
        """Leave a broker that gives a session to an agent without a certificate."""
        session.leave("it was a complaint")

    def session_down(self, session: AgentSession, code: Refusal | None, lost: Lost) -> None:
        self._bridge.post(self.over.set)

    def session_draining(self, session: AgentSession, deadline: float) -> None:
        """Do nothing: the session ends by itself."""

    def session_trust(self, session: AgentSession, signed: bytes) -> None:
        """Take no trust list from a link that has proved nothing."""

    def serve_stream(self, session: AgentSession, stream: StreamEnd) -> EndHandler:
        """Is not called: there are no streams before a Welcome."""
        raise AssertionError("a complaint has no streams")
