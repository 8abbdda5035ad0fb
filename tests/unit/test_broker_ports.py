"""A broker's ports without a broker: what an agent's answer may be on an open port."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rtunnel.wire.dial import MAX_DIALLINGS
from rtunnel.wire.messages import DialBody, Dialling, encode
from rtunnel.wire.refusal import Refusal
from rtunnel_broker.ports import OpenConnection, PortCounts

BODY = DialBody(version=1, namespace="default", ip="10.1.0.7", port=80, node="b1", epoch=1, nonce=bytes(16), time=0)


class Port:
    """An open port that remembers what it refused."""

    def __init__(self) -> None:
        self.counts = PortCounts(8)
        self.session = SimpleNamespace(streams=0, owner="default/host-7")
        self.refused: list[tuple[Refusal, str]] = []

    def refuse(self, _client: object, code: Refusal, text: str) -> None:
        """See OpenPortServer."""
        self.refused.append((code, text))


class Stream:
    """A stream that can be reset."""

    closed = False

    def abort(self) -> None:
        """See End."""
        self.closed = True


@pytest.mark.parametrize("piece", [1, 13, 1 << 16])
def test_dialling_is_taken_so_often_on_an_open_port(piece: int) -> None:
    """As at a gateway: an agent that says it without end keeps nobody waiting."""
    port: Any = Port()
    stream = Stream()
    client: Any = SimpleNamespace(loop=SimpleNamespace(now=0.0))
    connection = OpenConnection(port, client)
    link: Any = SimpleNamespace(open=lambda *_: stream)
    connection.begin(link, BODY)
    patient = encode(Dialling()) * MAX_DIALLINGS
    for at in range(0, len(patient), piece):
        connection.received(patient[at : at + piece])
    assert not port.refused
    connection.received(encode(Dialling()))
    assert port.refused == [(Refusal.PROTOCOL_ERROR, f"more than {MAX_DIALLINGS} times Dialling")]
    assert stream.closed and not port.counts.waiting and not port.session.streams
