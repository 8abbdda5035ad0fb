"""How many random examples the tests try: few in `make test`, more where there is time (`make fuzz`)."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings

#: Each test tries so many times its usual number of examples.
EFFORT: Final = int(os.environ.get("RTUNNEL_TEST_EFFORT", "1"))


def times(examples: int) -> int:
    """Return how many examples a test tries whose usual number is `examples`."""
    return examples * EFFORT


def load_profile() -> None:
    """Set Hypothesis's number of examples for the tests that name none."""
    settings.register_profile("effort", max_examples=times(50))
    settings.load_profile("effort")
