"""The promises of `tests/fuzz/targets.py`, in seconds: seeds, seeds changed a little, noise, and all that was found.

`make fuzz` looks further, led by coverage. What it finds stays in `tests/fuzz/cases/<target>/` and is tried here too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import targets
from fuzz.targets import MAX_INPUT, TARGETS, Target
from support.effort import times

CASES = Path(targets.__file__).with_name("cases")
#: Half a second for each target.
EXAMPLES = {
    "admin_request": 30, "hostile_kernel": 40, "policy_file": 50, "tls_handshake": 40, "trust_list": 50,
}  # fmt: skip


def changed(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with some places replaced, some of them by parts of another seed."""
    filling = st.one_of(
        st.binary(max_size=8),
        st.sampled_from((b"", b"\0" * 4, b"\xff" * 4, b"\r\n", b"\n", b'"', b"\x7f", b"\xed\xa0\x80")),
        st.builds(lambda seed, at, size: seed[at % (len(seed) + 1) :][:size], st.sampled_from(seeds), _AT, _SIZE),
    )

    def edit(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for at, size, new in edits:
            at %= len(seed) + 1
            seed = seed[:at] + new + seed[at + size :]
        return seed[:MAX_INPUT]

    return st.builds(edit, st.sampled_from(seeds), st.lists(st.tuples(_AT, _SIZE, filling), max_size=4))


_AT = st.integers(0, MAX_INPUT)
_SIZE = st.integers(0, 20)


@pytest.fixture(autouse=True)
def _odd_values() -> Iterator[None]:
    # cryptography warns of certificates that it reads all the same (a negative serial number).
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_promises_hold_for_whatever_comes(target: Target) -> None:
    """Named errors only, the same in any split, bounded, and quiet after an error."""
    seeds = list(target.seeds())
    for seed in seeds:
        target.check(seed)

    @settings(
        max_examples=times(EXAMPLES.get(target.name, 100)), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(changed(seeds), changed(seeds), st.binary(max_size=200)))
    def hold(data: bytes) -> None:
        target.check(data)

    hold()


@pytest.mark.parametrize("case", sorted(CASES.glob("*/*")), ids=lambda case: f"{case.parent.name}-{case.name}")
def test_what_was_found_stays_mended(case: Path) -> None:
    """Every input that ever broke a promise."""
    TARGETS[case.parent.name].check(case.read_bytes())


def test_every_case_has_a_target() -> None:
    """A renamed target takes its cases along."""
    assert {folder.name for folder in CASES.iterdir() if folder.is_dir()} <= set(TARGETS)
