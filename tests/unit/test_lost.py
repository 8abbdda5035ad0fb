"""Why something ended is a type: each error of a socket or of OpenSSL has its kind."""

from __future__ import annotations

import _ssl  # type: ignore[import-not-found, unused-ignore]
import ssl

import pytest

from rtunnel.relay.lost import _CERTIFICATE_ALERTS, LostKind, lost_by
from rtunnel.strangers import Loss, made_room


def tls_error(reason: str) -> ssl.SSLError:
    """Return an error with OpenSSL's name for its reason."""
    error = ssl.SSLError(1, "x")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "kind", "detail"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), LostKind.RESET, "Connection reset by peer"),
        (ConnectionError("the peer speaks TLS, but not rtunnel-dial/1"), LostKind.RESET, "the peer speaks TLS, but"),
        (OSError(), LostKind.RESET, "reset"),
        (ssl.SSLCertVerificationError(1, "no"), LostKind.CERTIFICATE, "certificate not accepted: "),
        (tls_error("WRONG_VERSION_NUMBER"), LostKind.NOT_TLS, "TLS: wrong version number; the peer does not seem"),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), LostKind.CERTIFICATE_REFUSED, "TLS: tlsv1 alert unknown ca"),
        (tls_error("TLSV1_ALERT_INTERNAL_ERROR"), LostKind.TLS, "TLS: tlsv1 alert internal error"),
    ],
)
def test_each_error_has_its_kind(error: OSError, kind: LostKind, detail: str) -> None:
    """Code reads the kind, people read the sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_code, error.verify_message = 20, "unable to get local issuer certificate"
    lost = lost_by(error)
    assert lost.kind is kind
    assert str(lost).startswith(detail)
    assert lost.during("handshake").kind is kind
    assert str(lost.during("handshake")) == f"handshake: {lost}"


@pytest.mark.skipif(not hasattr(_ssl, "err_names_to_codes"), reason="CPython 3.13 has no such table")
def test_openssl_knows_the_names_of_the_certificate_alerts() -> None:
    """A misspelt name would never match."""
    assert set(_ssl.err_names_to_codes) >= _CERTIFICATE_ALERTS


@pytest.mark.parametrize("silent", [True, False])
def test_the_word_of_a_stranger_comes_from_the_kind(silent: bool) -> None:
    """The sentence may say anything, also the word "deadline"."""
    assert Loss.of(made_room("deadline").kind, silent=silent) is Loss.MADE_ROOM
    assert Loss.of(LostKind.DEADLINE, silent=silent) is Loss.DEADLINE
    others = set(LostKind) - {LostKind.MADE_ROOM, LostKind.DEADLINE}
    assert {Loss.of(kind, silent=silent) for kind in others} == {Loss.PROBE if silent else Loss.BROKEN}
