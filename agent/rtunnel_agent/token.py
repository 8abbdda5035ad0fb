"""The join token of an agent, and whether the agent may enrol with it. trio's side."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

from rtunnel.errors import TrustError
from rtunnel.trust.files import SECRET, replace
from rtunnel.trust.keys import Token

#: The last part of a message about a token that is missing.
FIX: Final = "make one with `rtunnel pki token create`, and give it to the agent"


class JoinToken:
    """The present token, and the one with which a broker has accepted the agent last.

    After a revocation of the certificate only another token than that one counts.
    """

    def __init__(self, present: Token | None, directory: Path | None, log: FilteringBoundLogger) -> None:
        """`directory`: the agent's identity, which remembers the id of the token; None: without."""
        self.present = present
        self.revoked = False  # a broker says that the certificate is revoked
        self.void = False  # and another token has come since then: the agent enrols anew
        self._accepted = ""  # the id of the token that does not count as another one
        self._file = directory / "token.id" if directory is not None else None
        self._log = log
        if self._file is not None:
            with suppress(OSError, ValueError):
                self._accepted = self._file.read_text()

    def revoke(self) -> bool:
        """Hear that a broker calls the certificate revoked. Return whether the agent enrols anew:
        another token came while it was down.
        """
        self.revoked = True
        if self.present is not None and self._accepted not in ("", self.present.id):
            self.void = True
        return self.void

    def accept(self) -> None:
        """Hear that a broker has accepted the certificate: remember the token's id."""
        if self._file is None or self.present is None or self.present.id == self._accepted:
            return  # nothing to remember, or remembered already
        self._accepted = self.present.id
        try:
            replace(self._file, SECRET, self._accepted.encode())
        except TrustError as error:
            self._log.warning("token_id_not_kept", reason=str(error))

    def put(self, token: Token) -> None:
        """Take another token from now on."""
        self.present = token
        self.void = self.revoked
        if not self.revoked:
            self.accept()

    def certified(self) -> None:
        """Hear that the agent has another certificate, which nobody has revoked."""
        self.revoked = self.void = False

    def for_request(self) -> Token:
        """Return the token to enrol with. Raises TrustError when there is none that counts."""
        if self.present is None:
            raise TrustError(f"agent.join_token is not given: {FIX}")
        if self.revoked and not self.void:
            raise TrustError("the certificate was revoked: agent.join_token needs another token")
        return self.present
