"""Why a link, an end or a session ended, as a type.

Code compares `Lost.kind`; `Lost.detail` is a sentence for the log and for people, and nothing reads
it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from rtunnel.errors import certificate_fault


class LostKind(StrEnum):
    """The kinds of ends; also the words in logs."""

    CLOSED = "closed"  # one side ended it in order
    RESET = "reset"  # the peer reset it, or the socket failed
    LINK_LOST = "link_lost"  # a stream whose link has ended
    DEADLINE = "deadline"  # the peer did not do in time what was due
    SILENT = "silent"  # no byte of the peer came for too long, or it took none
    MADE_ROOM = "made_room"  # ended to make room for another connection
    NO_ADDRESS = "no_address"  # no address is known that could be dialled
    UNREACHED = "unreached"  # no connection could be made
    ANSWERED = "answered"  # it had its answer, and nothing more was to be said
    REFUSED = "refused"  # this side or the peer refused it with a code
    PROTOCOL_ERROR = "protocol_error"  # the peer broke the protocol
    NOT_TLS = "not_tls"  # the peer's first bytes are not TLS
    TLS = "tls"  # TLS failed for another reason
    CERTIFICATE = "certificate"  # this side does not accept the peer's certificate
    CERTIFICATE_REFUSED = "certificate_refused"  # the peer does not accept this side's certificate


@dataclass(frozen=True, slots=True)
class Lost:
    """Why something ended: the kind, and a sentence for people."""

    kind: LostKind
    detail: str

    def __str__(self) -> str:
        return self.detail

    def during(self, phase: str) -> Lost:
        """Return the same with the phase, such as "handshake", in front of its detail."""
        return Lost(self.kind, f"{phase}: {self.detail}")


def closed(detail: str) -> Lost:
    """Return a `Lost` for an end in order; `detail` says who ended it, or why."""
    return Lost(LostKind.CLOSED, detail)


#: The deadline of `End.set_handler`; its handler knows which deadline that was.
DEADLINE: Final = Lost(LostKind.DEADLINE, "deadline")
#: The argument of `lost` for a stream's handler when the link has ended.
LINK_LOST: Final = Lost(LostKind.LINK_LOST, "link_lost")
RESET: Final = Lost(LostKind.RESET, "reset")


def lost_by(error: OSError) -> Lost:
    """Return the `Lost` for an error of a socket or of OpenSSL, in this project's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Lost(LostKind.CERTIFICATE, f"certificate not accepted: {certificate_fault(error)}")
    if isinstance(error, ssl.SSLError):
        return _lost_by_tls(error)
    return Lost(LostKind.RESET, error.strerror or str(error) or "reset")


def _lost_by_tls(error: ssl.SSLError) -> Lost:
    detail = f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if error.reason == "WRONG_VERSION_NUMBER":
        return Lost(LostKind.NOT_TLS, f"{detail}; the peer does not seem to speak TLS")
    kind = LostKind.CERTIFICATE_REFUSED if error.reason in _CERTIFICATE_ALERTS else LostKind.TLS
    return Lost(kind, detail)


#: OpenSSL's names of the alerts by which a peer rejects a certificate (openssl/sslerr.h; RFC 8446
#: section 6.2).
_CERTIFICATE_ALERTS: Final = frozenset({
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_REVOKED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_NO_CERTIFICATE",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "TLSV1_ALERT_UNKNOWN_CA",
})  # fmt: skip
