"""The class of transition tables: what it says of a transition that it does not have."""

from __future__ import annotations

from typing import Any

import pytest

from rtunnel.wire import control, dial
from rtunnel.wire.control import AGENT, BROKER, AgentState, BrokerState
from rtunnel.wire.dial import RECEIVER, SENDER, DialState
from rtunnel.wire.messages import Accepted, Hello, MessageError, Welcome
from rtunnel.wire.states import LocalError, Table


@pytest.mark.parametrize(
    ("table", "state", "message", "text"),
    [
        (
            SENDER,
            DialState.DIALLING,
            Hello,
            "hello came in the state dialling, which takes dialling or accepted or refused",
        ),
        (RECEIVER, DialState.IDLE, Accepted, "accepted came in the state idle, which takes dial"),
        (BROKER, BrokerState.NEW, Welcome, "welcome came in the state new, which takes hello or enrol"),
        (AGENT, AgentState.NEW, Welcome, "welcome came in the state new, which takes nothing"),
    ],
)
def test_a_message_out_of_order_is_the_peers_fault(
    table: Table[Any, Any], state: object, message: type, text: str
) -> None:
    """The error says what the state takes; the table keeps no entry for it."""
    size = len(table)
    with pytest.raises(MessageError, match=f"^{text}$"):
        table[state, message]
    assert len(table) == size


@pytest.mark.parametrize(
    ("table", "state", "action"),
    [
        (SENDER, DialState.DIALLED, dial.Action.DIAL),
        (RECEIVER, DialState.IDLE, dial.Action.ACCEPT),
        (BROKER, BrokerState.NEW, control.Action.WELCOME),
        (AGENT, AgentState.LIVE, control.Action.HELLO),
    ],
)
def test_an_action_out_of_order_is_our_own_fault(table: Table[Any, Any], state: object, action: object) -> None:
    """The error names both."""
    with pytest.raises(LocalError, match=f"^{action} is not allowed in the state {state}$"):
        table[state, action]
