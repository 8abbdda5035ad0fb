"""The port that agents dial, and the links that have not proved who they are.

In the relay's thread.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

from rtunnel.config import BrokerConfig
from rtunnel.net import source_of
from rtunnel.relay.link import Handshake, Link
from rtunnel.relay.loop import Timer
from rtunnel.relay.lost import Lost
from rtunnel.relay.relay import Listener, Relay
from rtunnel.strangers import SILENT_GRACE, Loss, Strangers, made_room
from rtunnel.wire.refusal import Refusal
from rtunnel_broker.log import NodeLog
from rtunnel_broker.session import Session
from rtunnel_broker.trust import BrokerTrust

#: Handshakes in the loop's slow queue with which further links wait in the kernel's queue, where
#: they cost no memory.
MAX_SLOW_QUEUED: Final = 64


class LinkPort:
    """The listener for links, and the places of the links that are not proven yet."""

    def __init__(
        self, relay: Relay, config: BrokerConfig, trust: BrokerTrust, log: NodeLog, refusals: Counter[str]
    ) -> None:
        """`refusals`: the node's counter of refused sessions, by code; links over a source's share
        count there.
        """
        self._relay = relay
        self._config = config
        self._trust = trust
        self._log = log
        self._strangers: Strangers[Link] = Strangers(
            config.max_handshakes, config.source_handshakes, lambda link: not link.has_spoken
        )
        self._room_timer: Timer | None = None  # until the next look for a link that can make room
        # links that ended before they were proved or refused, by Loss
        self.lost: Counter[str] = Counter()
        self._refusals = refusals
        self.listener: Listener | None = None

    @property
    def handshakes(self) -> int:
        """The number of links that are not proven yet."""
        return len(self._strangers)

    def listen(self, sock: socket.socket, new_session: Callable[[bytes, str], Session]) -> None:
        """Accept links. `new_session(binding, source)` makes the owner of each one."""
        self.listener = self._relay.listen(sock, lambda taken, peer: self._accept(taken, peer, new_session))

    def handshake_over(self, session: Session) -> None:
        """Free the place of a session that is proved, refused or lost."""
        place, session.place = session.place, None
        if place is not None:
            place.release()
        if self.listener is not None:
            self.listener.release()

    def count_lost(self, session: Session, lost: Lost) -> None:
        """Count a link that ended before it was proved or refused, and log it unless it was a
        probe.
        """
        silent = session.link is not None and not session.link.has_spoken
        loss = Loss.of(lost.kind, silent=silent)
        self.lost[loss.value] += 1
        if loss is not Loss.PROBE:  # a VIP sends one each second
            self._log.stranger("link_lost", loss.value, peer=session.peer, reason=str(lost))

    def _accept(self, sock: socket.socket, peer: str, new_session: Callable[[bytes, str], Session]) -> None:
        source, now = source_of(peer), self._relay.loop.now
        strangers = self._strangers
        if not strangers.has_room(source):
            weakest = strangers.weakest(source, now)
            if weakest is None:
                sock.close()  # the listener can't wait for one source alone
                self._refusals[Refusal.TOO_MANY_HANDSHAKES.value] += 1
                self._log.warn("source_handshake_limit_reached", limit=strangers.share, peer=peer)
                return
            weakest.abort(made_room("too many links prove nothing"))
        presented = self._trust.presented
        session = new_session(presented.binding, source)
        handshake = Handshake(False, self._config.handshake_timeout, presented.context)
        link = self._relay.link(sock, session, handshake, peer=peer)
        session.place = strangers.enter(source, link, now)
        self._hold_if_full(peer)

    def _hold_if_full(self, peer: str) -> None:
        """Let further links wait in the kernel's queue while there is no place for them.

        To refuse them costs nearly as much as to serve them, and they come back: 5000 agents tried
        16,000 times.
        """
        listener, loop = self.listener, self._relay.loop
        if listener is None:
            return
        if self._strangers.full:
            self._log.warn("handshake_limit_reached", limit=self._config.max_handshakes, peer=peer)
            self._hold_until_room()
        elif loop.slow_queued >= MAX_SLOW_QUEUED:
            listener.hold()
            loop.enqueue_slow(listener.release)

    def _hold_until_room(self) -> None:
        """Accept again when a place is free, or when a link has been silent for long enough to make
        room.
        """
        listener, loop = self.listener, self._relay.loop
        if listener is None or listener.closed:
            return
        if not self._strangers.full or self._strangers.weakest("", loop.now) is not None:
            listener.release()
            return
        listener.hold()
        if self._room_timer is None:
            self._room_timer = loop.after(SILENT_GRACE, self._look_for_room)

    def _look_for_room(self) -> None:
        self._room_timer = None
        self._hold_until_room()
