"""What a role's streams did since its start. Kept by the relay's thread; whoever reads it sees whole numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rtunnel.relay.join import Account
from rtunnel.wire.refusal import Refusal


@dataclass
class StreamCounts:
    """Live streams, and totals."""

    streams: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by code word
    endings: dict[str, int] = field(default_factory=dict)  # of streams, by word
    bytes_up: int = 0
    bytes_down: int = 0

    def began(self) -> None:
        """A stream is joined."""
        self.accepted += 1
        self.streams += 1

    def ended(self, account: Account) -> None:
        """It is over."""
        self.streams -= 1
        self.endings[account.ending.value] = self.endings.get(account.ending.value, 0) + 1
        self.bytes_up += account.up
        self.bytes_down += account.down

    def refuse(self, code: Refusal) -> None:
        """One refusal."""
        self.refused[code.value] = self.refused.get(code.value, 0) + 1

    def status(self) -> dict[str, object]:
        """For `/statusz`."""
        return {
            "streams": self.streams,
            "accepted": self.accepted,
            "refused": dict(self.refused),  # the relay's thread goes on counting
            "endings": dict(self.endings),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
