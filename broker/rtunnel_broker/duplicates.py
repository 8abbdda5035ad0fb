"""Two hosts with one agent_id: which of two sessions stays, and what is remembered of the other.

The living session stays. Only a newcomer that proves to be the same host (see `is_restart`) replaces it at once.
For any other one the broker pings the older link, and refuses the newcomer (`duplicate_agent`) when that answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rtunnel.registry import Duplicate
from rtunnel.wire.messages import Hello
from rtunnel_broker.session import Session

#: Seconds in which an older session's link must answer a ping, or count as dead. Round trips are below 0.5 s; the
#: rest is for one retransmission.
PROBE_SECONDS: Final = 2.0
#: A refused newcomer is shown so many seconds after its last try: longer than any `backoff_cap` that makes sense.
SHOWN_SECONDS: Final = 300.0
#: Refused newcomers that are remembered, the latest ones; of these so many stand in the node's record in the registry.
MAX_KNOWN: Final = 256
MAX_RECORDED: Final = 8
#: Instances that a session remembers to have replaced: a host that restarts more often in one session's life is broken.
MAX_REPLACED: Final = 8


def is_restart(older: Session, newer: Session) -> bool:
    """Whether `newer` is another process of the older session's host, and so proves that the older one is over.

    Not when it has none of the older one's addresses (then it is another host by the same name), and not when it was
    itself replaced before: a process that is over does not come back, so both of them live.
    """
    old, new = older.hello, newer.hello
    assert old is not None and new is not None
    return (
        bool(old.host_id)
        and old.host_id == new.host_id
        and old.instance != new.instance
        and new.instance not in older.replaced
        and not older.addresses.isdisjoint(newer.addresses)
    )


def replaced_by(older: Session) -> tuple[bytes, ...]:
    """Return the instances that the session after `older` has replaced."""
    assert older.hello is not None
    return (*older.replaced, older.hello.instance)[-MAX_REPLACED:]


def place(hello: Hello, peer: str) -> str:
    """Return the words for the host of a session: its name and the address that its link comes from."""
    return f"{hello.host} ({peer})" if hello.host else peer


class Duplicates:
    """The newcomers that were refused lately. For trio's thread; `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str], Duplicate] = {}  # by owner and refused host, the oldest first

    def add(self, session: Session, holder: str) -> tuple[Duplicate, bool]:
        """Remember a newcomer that was refused for `holder`. Returns the entry, and whether it is news for the log."""
        hello = session.hello
        assert hello is not None
        host = hello.host_id.hex() or session.peer
        key = session.owner, host
        before = self._known.pop(key, None)
        now = self._clock()
        entry = Duplicate(
            namespace=hello.namespace, agent_id=hello.agent_id, holder=holder, refused=place(hello, session.peer),
            tries=1 if before is None else before.tries + 1, at=now,
        )  # fmt: skip
        self._known[key] = entry
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return entry, before is None or now - before.at > SHOWN_SECONDS

    def current(self) -> tuple[Duplicate, ...]:
        """Return those of the last SHOWN_SECONDS, the latest first."""
        since = self._clock() - SHOWN_SECONDS
        return tuple(entry for entry in reversed(self._known.values()) if entry.at >= since)
