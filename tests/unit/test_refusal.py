"""Refusal codes: each is told to everybody in their own words."""

from __future__ import annotations

import re
from dataclasses import MISSING

import pytest

from rtunnel.wire.refusal import Next, Refusal, Refused, ReplyMapping

#: RFC 9209, section 2.3: all proxy error types that are registered there.
PROXY_ERROR_TYPES = frozenset(
    (
        "dns_timeout",
        "dns_error",
        "destination_not_found",
        "destination_unavailable",
        "destination_ip_prohibited",
        "destination_ip_unroutable",
        "connection_refused",
        "connection_terminated",
        "connection_timeout",
        "connection_read_timeout",
        "connection_write_timeout",
        "connection_limit_reached",
        "tls_protocol_error",
        "tls_certificate_error",
        "tls_alert_received",
        "http_request_error",
        "http_request_denied",
        "http_response_incomplete",
        "http_response_header_section_size",
        "http_response_header_size",
        "http_response_body_size",
        "http_response_trailer_section_size",
        "http_response_trailer_size",
        "http_response_transfer_coding",
        "http_response_content_coding",
        "http_response_timeout",
        "http_upgrade_failed",
        "http_protocol_error",
        "proxy_internal_response",
        "proxy_internal_error",
        "proxy_configuration_error",
        "proxy_loop_detected",
    )
)


def test_the_list_of_the_rfc_is_whole() -> None:
    """Sections 2.3.1 to 2.3.32."""
    assert len(PROXY_ERROR_TYPES) == 32


@pytest.mark.parametrize("code", Refusal)
def test_every_code_can_be_told(code: Refusal) -> None:
    """A SOCKS reply from 1 to 8, an HTTP error, a registered Proxy-Status token, and a sentence for people."""
    reply = code.reply
    assert 0x01 <= reply.socks <= 0x08
    assert 400 <= reply.http <= 599
    assert reply.proxy_status in PROXY_ERROR_TYPES
    assert reply.next in Next
    assert 0 < len(reply.text) <= 512
    assert reply.text.isascii()
    assert not reply.text.endswith(".")


@pytest.mark.parametrize("code", Refusal)
def test_a_code_goes_over_the_wire_as_its_word(code: Refusal) -> None:
    """The word is fit for a log and a metric label, at most a message's Word, and comes back as the same code."""
    assert re.fullmatch(r"[a-z][a-z_]{0,63}", code.value)
    assert str(code) == code.value
    assert code.value == code.name.lower()
    assert Refusal.parse(code.value) is code


def test_words_are_unique() -> None:
    """No alias hides a second meaning."""
    assert len({code.value for code in Refusal}) == len(Refusal.__members__)


@pytest.mark.parametrize("word", ["", "nope", "BAD_MAC", "bad_mac ", "internal\0", "\u212a"])
def test_an_unknown_word_is_internal(word: str) -> None:
    """A later version may know more reasons: then the next tuple may still work."""
    assert Refusal.parse(word) is Refusal.INTERNAL
    assert Refusal.INTERNAL.reply.next is Next.TRY


def test_only_stale_tuples_are_forgotten() -> None:
    """Forgetting is for what the broker or the agent knows to be over, nothing else."""
    forgotten = {code for code in Refusal if code.reply.next is Next.FORGET}
    assert forgotten == {Refusal.STALE_NODE, Refusal.STALE_TARGET, Refusal.STALE_EPOCH}


def test_answers_about_the_target_stop_the_search() -> None:
    """Another tuple leads to the same agent and would say the same."""
    for code in (Refusal.NOT_EXPOSED, Refusal.TARGET_REFUSED, Refusal.TARGET_TIMEOUT, Refusal.TARGET_UNREACHABLE):
        assert code.reply.next is Next.STOP


def test_every_code_says_whether_it_is_passed_on() -> None:
    """A row of the table without the field is no row: the field has no default."""
    assert ReplyMapping.__dataclass_fields__["passed_on"].default is MISSING
    assert all(isinstance(code.reply.passed_on, bool) for code in Refusal)


def test_an_answer_about_the_target_is_passed_on_and_a_stale_tuple_is_not() -> None:
    """After *stop* the client gets the code itself; a stale tuple says nothing that a client can use."""
    assert all(code.reply.passed_on for code in Refusal if code.reply.next is Next.STOP)
    assert not any(code.reply.passed_on for code in Refusal if code.reply.next is Next.FORGET)


def test_four_different_failures_are_four_different_answers() -> None:
    """Unknown, not exposed, refusing and silent targets can be told apart over SOCKS and by Proxy-Status."""
    codes = (Refusal.UNKNOWN_TARGET, Refusal.NOT_EXPOSED, Refusal.TARGET_REFUSED, Refusal.TARGET_TIMEOUT)
    assert len({code.reply.socks for code in codes}) == 4
    assert len({code.reply.proxy_status for code in codes}) == 4


def test_a_refusal_says_what_is_known() -> None:
    """The specific text if there is one, else the code's own."""
    assert Refused(Refusal.BAD_MAC, "because").text == "because"
    assert Refused(Refusal.BAD_MAC).text == Refusal.BAD_MAC.reply.text == str(Refused(Refusal.BAD_MAC))
    assert Refused(Refusal.BAD_MAC).code is Refusal.BAD_MAC
