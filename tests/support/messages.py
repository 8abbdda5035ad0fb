"""Decoders for tests that choose the expected messages at run time."""

from __future__ import annotations

from typing import Any, get_args

from rtunnel.wire.messages import MAX_UNAUTHENTICATED, Decoder


def decoder_of(expected: Any, limit: int = MAX_UNAUTHENTICATED) -> Decoder[Any]:
    """Return a decoder for one message type, or for each member of a union of them."""
    return Decoder(*(get_args(expected) or (expected,)), limit=limit)
