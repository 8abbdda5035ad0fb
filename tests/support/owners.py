"""Owners of pairs for tests of the relay."""

from __future__ import annotations

from dataclasses import dataclass

from rtunnel.relay.join import Account


@dataclass(eq=False, slots=True)
class Recorder:
    """Keeps the accounts of its pairs, which are allowed for as long as it says so."""

    accounts: list[Account]
    is_allowed: bool = True

    def allowed(self) -> bool:
        """See PairOwner."""
        return self.is_allowed

    def ended(self, account: Account) -> None:
        """See PairOwner."""
        self.accounts.append(account)
