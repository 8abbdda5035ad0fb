"""The open streams of a gateway, for the API. In the relay's thread."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from rtunnel.config import format_endpoint
from rtunnel.relay.join import Pair
from rtunnel_socks.audit import Joined

#: Streams of one answer.
MAX_SHOWN: Final = 1000


class StreamFacts(msgspec.Struct, frozen=True):
    """One open stream. Times are seconds: since the join, and since a byte moved last."""

    client: str
    user: str
    via: str
    target: str
    agent: str
    node: str
    ps: str
    rule: str
    seconds: float
    idle: float
    bytes_up: int
    bytes_down: int


#: The orders of streams: the greatest first.
ORDERS: Final[Mapping[str, Callable[[Pair, float], float]]] = {
    "bytes": lambda pair, now: pair.account.up + pair.account.down,
    "age": lambda pair, now: now - pair.account.started,
    "idle": lambda pair, now: now - pair.moved,
}


def shown(pairs: Iterable[Pair], now: float, order: str, most: int, wanted: Mapping[str, str]) -> list[StreamFacts]:
    """Return up to `most` streams in this order of ORDERS that have all `wanted` values.

    `now`: the loop's clock. A value is compared with the field of StreamFacts by that name; of
    `target` also without its port. Takes a microsecond for each stream.
    """
    key = ORDERS[order]
    fitting = [pair for pair in pairs if isinstance(pair.owner, Joined) and _fits(pair.owner, wanted)]
    return [_facts(pair, now) for pair in heapq.nlargest(most, fitting, key=lambda pair: key(pair, now))]


def _fits(joined: Joined, wanted: Mapping[str, str]) -> bool:
    if not wanted:
        return True
    asked, used = joined.asked, joined.used
    has = {"client": asked.peer, "user": asked.user or "", "agent": used.agent_id, "node": used.node}
    for name, value in wanted.items():
        if name == "target":
            if asked.target is None or value not in (asked.target.ip, str(asked.target)):
                return False
        elif has[name] != value:
            return False
    return True


def _facts(pair: Pair, now: float) -> StreamFacts:
    joined = pair.owner
    assert isinstance(joined, Joined)
    asked, used, account = joined.asked, joined.used, pair.account
    return StreamFacts(
        asked.peer, asked.user or "", asked.via, str(asked.target), used.agent_id, used.node,
        format_endpoint(used.ps_ip, used.ps_port), asked.rule, round(now - account.started, 3),
        round(now - pair.moved, 3), max(0, account.up), max(0, account.down),
    )  # fmt: skip
