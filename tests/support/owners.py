"""Owners of pairs for tests of the relay."""

from __future__ import annotations

from dataclasses import dataclass

from rtunnel.relay.join import Account, Ending


@dataclass(eq=False, slots=True)
class Recorder:
    """Keeps the accounts of its pairs. `verdict`: what a review of them says."""

    accounts: list[Account]
    verdict: Ending | None = None

    def review(self) -> Ending | None:
        """See PairOwner."""
        return self.verdict

    def ended(self, account: Account) -> None:
        """See PairOwner."""
        self.accounts.append(account)
