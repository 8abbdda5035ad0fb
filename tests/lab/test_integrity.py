"""No byte is lost: streams over a thin line, compared byte by byte in both directions.

RTUNNEL_LAB_STREAMS sets the number of short streams for each kind of link (20,000); one long stream
comes with each 400 of them. These tests run before the whole lab starts, in the same places.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.roles import Lab
from lab.thin import THIN, thin_lab

pytestmark = pytest.mark.lab

STREAMS = int(os.environ.get("RTUNNEL_LAB_STREAMS", 20_000))
LONG = max(4, STREAMS // 400)
#: The line alone needs 60 s for the full form.
SECONDS = 280.0


@pytest.mark.parametrize("security", ["tls", "plain"])
def test_every_byte_arrives_over_a_thin_line(parts: Lab, tmp_path: Path, security: str) -> None:
    """By SOCKS5 and by open ports a stream gets its own bytes, both ways, and then an orderly end."""
    with thin_lab(parts.net, tmp_path / security, security) as lab:
        outcome = lab.exchange(STREAMS, LONG, SECONDS)
        damaged = lab.damaged_uploads()
    moved, seconds = outcome["bytes"], outcome["seconds"]
    parts.note(
        f"thin line, {security}",
        f"{outcome['whole']} streams whole, {moved / 1e6:.0f} MB in {seconds:.0f} s"
        f" ({THIN.rate / 1e6:g} MB/s a link and direction)",
    )
    assert not outcome["faults"], f"{len(outcome['faults'])} of {outcome['whole']} answers: {outcome['faults'][:5]}"
    assert not damaged, damaged[:5]
    assert not outcome["cut"], outcome["cut"][:5]
    assert outcome["whole"] == STREAMS + LONG
