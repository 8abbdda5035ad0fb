"""Links to brokers: for sessions, which their owner greets, and for requests to the authority.

A request goes over a link of its own, to the first broker that takes one. trio's side.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from rtunnel.bridge import Bridge
from rtunnel.config import AgentConfig, format_endpoint
from rtunnel.relay.ends import SocketEnd
from rtunnel.relay.link import Handshake
from rtunnel.relay.lost import Lost, LostKind
from rtunnel.wire.messages import Enrol, Enrolled, Refuse
from rtunnel.wire.refusal import Refusal, Refused
from rtunnel_agent.brokers import Address, Brokers
from rtunnel_agent.handshake import AgentSession, Enrolment
from rtunnel_agent.race import Asked, Race


class Dialler:
    """Makes links to brokers. `brokers` says which address is next; its `run` must run."""

    def __init__(self, config: AgentConfig, bridge: Bridge, log: FilteringBoundLogger) -> None:
        self.brokers = Brokers(config.brokers, log)
        self._config = config
        self._bridge = bridge

    def dial(
        self,
        owner: AgentSession | Enrolment,
        address: Address,
        tls: ssl.SSLContext | None,
        failed: Callable[[Lost], None],
    ) -> None:
        """Make a link to this address for the owner, who hears when it is up.

        `failed` gets the reason in the relay's thread when there is no connection.
        """

        def connected(end: SocketEnd | None, code: Refusal, why: str) -> None:
            owner.attempt = None
            if end is None:
                failed(Lost(LostKind.UNREACHED, f"broker: {why}"))
            else:
                handshake = Handshake(True, self._config.handshake_timeout, tls, self._config.server_name)
                owner.link = relay.link(end.sock, owner, handshake, peer=end.peer, watched=True)

        def connect() -> None:
            owner.attempt = relay.connect(*address, self._config.connect_timeout, connected)

        relay = self._bridge.relay
        relay.call(connect)

    async def ask(self, request: Enrol, tls: ssl.SSLContext | None) -> Enrolled:
        """Ask the first broker that takes a link for a certificate. Raises Refused, or OSError with
        a text.

        While an address is silent, the next one is dialled beside it.
        """
        race = Race[Asked]()
        try:
            asked = await self._begin(race, request, tls)
            while race and isinstance(asked.answer, Lost):
                if (news := await race.next()) is not None:
                    asked = await self._answered(news)
                elif not race.full:
                    asked = await self._begin(race, request, tls)
        finally:
            race.end()
        answer = asked.answer
        if isinstance(answer, Refuse):
            raise Refused(Refusal.parse(answer.code), answer.text)
        if isinstance(answer, Lost):
            raise OSError(f"broker {asked.broker}: {answer}")
        return answer

    async def _begin(self, race: Race[Asked], request: Enrol, tls: ssl.SSLContext | None) -> Asked:
        """Dial the next address for this request. Raises OSError when none is known."""
        address = await self.brokers.next()
        bridge = self._bridge
        asked = Asked(broker=format_endpoint(*address))

        def done(answer: Enrolled | Refuse | Lost) -> None:
            bridge.post(_put_answer, asked, answer)

        enrolment = Enrolment(request, lambda: bridge.post(asked.tell), done, self._config.handshake_timeout)
        asked.enrolment = enrolment
        race.add(asked, lambda: bridge.relay.call(lambda: enrolment.end("another broker was faster")))
        self.dial(enrolment, address, tls, done)
        return asked

    async def _answered(self, asked: Asked) -> Asked:
        """Send the request on a link that is up, and wait for the answer."""
        enrolment = asked.enrolment
        assert enrolment is not None
        try:
            self._bridge.relay.call(enrolment.ask)
            await asked.settled.wait()
        except BaseException:
            self._bridge.relay.call(lambda: enrolment.end("the agent stops"))
            raise
        return asked


def _put_answer(asked: Asked, answer: Enrolled | Refuse | Lost) -> None:
    asked.answer = answer
    asked.settle()
