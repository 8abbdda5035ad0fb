"""The transition tables of the state machines of `control` and `dial`.

A table maps (state, input) to the next state. An input is a type of message that the peer has sent,
or an action of this end. A transition that is not in the table is an error, whose text names the
state: a `MessageError` if the peer sent the message, a `LocalError` if this end took the action.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any, TypeVar

from rtunnel.wire.messages import Message, MessageError

S = TypeVar("S", bound=Enum)
A = TypeVar("A", bound=StrEnum)


class LocalError(Exception):
    """This end took an action that its machine's table does not have: a defect of the caller, not
    of the peer.
    """


class Table(dict[tuple[S, "type[Message] | A"], S]):
    """All transitions of one machine. `table[state, input]` is the next state.

    Raises MessageError or LocalError, and stays as it is, for a transition that it does not have.
    """

    def __missing__(self, key: tuple[S, type[Message] | A]) -> S:
        state, done = key
        if isinstance(done, Enum):
            raise LocalError(f"{done} is not allowed in the state {state}")
        takes = " or ".join(self._words_of(state)) or "nothing"
        raise MessageError(f"{word_of(done)} came in the state {state}, which takes {takes}")

    def _words_of(self, state: S) -> list[str]:
        return [word_of(done) for before, done in self if before is state and not isinstance(done, Enum)]


def word_of(message: type[Message]) -> str:
    """Return the word by which a message is known on the wire."""
    config: Any = message.__struct_config__
    return str(config.tag)
