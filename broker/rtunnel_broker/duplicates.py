"""Decides which of two sessions with one agent_id stays, and remembers the refused ones.

A session whose link still answers stays. A newer session replaces it at once only when it proves to
be of the same host (`is_restart`). Otherwise the broker pings the older link, and refuses the newer
session (`duplicate_agent`) if the older link answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rtunnel.registry import Duplicate
from rtunnel.wire.messages import Hello
from rtunnel_broker.session import Session

#: Seconds in which an older session's link must answer a ping, else it is given up. Round trips are
#: below 0.5 s; the rest is for one retransmission.
PROBE_SECONDS: Final = 2.0
#: Seconds after its last try in which a refused session is shown: longer than any useful
#: `backoff_cap`.
SHOWN_SECONDS: Final = 300.0
#: The number of refused sessions that are remembered, and of those in the node's record in the
#: registry; the latest ones.
MAX_KNOWN: Final = 256
MAX_RECORDED: Final = 8
#: Replaced instances that a session remembers. A host that restarts more often during one session
#: is broken.
MAX_REPLACED: Final = 8


def is_restart(older: Session, newer: Session) -> bool:
    """Return whether `newer` is a later process of the older session's host, so that the older
    process has ended.

    False when it has none of the older one's addresses: then it is another host of the same name.
    False also when it was replaced before: a process that has ended does not come back, so both of
    them run.
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
    """Return a text for the host of a session: its name and its link's source address."""
    return f"{hello.host} ({peer})" if hello.host else peer


class Duplicates:
    """The sessions refused lately. In trio's thread. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # by owner and refused host, the oldest first
        self._known: dict[tuple[str, str], Duplicate] = {}

    def add(self, session: Session, holder: str) -> tuple[Duplicate, bool]:
        """Remember a session refused for `holder`. Return the entry, and whether to log it."""
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
        """Return the entries of the last SHOWN_SECONDS, the latest first."""
        since = self._clock() - SHOWN_SECONDS
        return tuple(entry for entry in reversed(self._known.values()) if entry.at >= since)
