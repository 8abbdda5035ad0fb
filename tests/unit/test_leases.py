"""Test processes side by side have ports of their own: blocks that the machine gives to one at a time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import pytest

from support import plumbing, ports
from support.ports import NoBlock, lease, own_ports

#: The tests lease from this process's own block, cut into small ones: no other run notices.
BLOCK: Final = 16
BLOCKS: Final = 5

OTHER: Final = """
import sys
from support import ports
first, ports.BLOCK, ports._end = int(sys.argv[1]), int(sys.argv[2]), lambda: int(sys.argv[3])
ports.FIRST = first
print(ports.lease(int(sys.argv[2]) - 1, 0).start, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BLOCKS blocks of BLOCK ports, all free; what the test has leased is given back."""
    first = own_ports()[-1] - BLOCK * BLOCKS
    monkeypatch.setattr(ports, "FIRST", first)
    monkeypatch.setattr(ports, "BLOCK", BLOCK)
    monkeypatch.setattr(ports, "_end", lambda: first + BLOCK * BLOCKS)
    monkeypatch.setattr(ports, "_held", [])
    yield
    for lock in ports._held:
        lock.close()


def lease_block(patience: float = 0) -> range:
    """A whole small block."""
    return lease(BLOCK - 1, patience)


@contextmanager
def another_process() -> Iterator[tuple[int, IO[str]]]:
    """The first port of the block that it leases; it gives it back when its input ends."""
    span = (ports.FIRST, BLOCK, ports.FIRST + BLOCK * BLOCKS)
    command = [sys.executable, "-c", OTHER, *map(str, span)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.stdin
        finally:
            process.kill()


def test_leases_never_overlap_and_end_with_a_clear_error() -> None:
    leased = [lease_block() for _ in range(BLOCKS)]
    assert len({port for block in leased for port in block}) == BLOCKS * (BLOCK - 1)
    with pytest.raises(
        NoBlock, match=f"no 15 ports in a row are free for a test run.*of 16 ports between {ports.FIRST}"
    ):
        lease_block()


def test_a_lease_may_fill_several_blocks() -> None:
    """Only blocks in a row count."""
    many = lease(2 * BLOCK, 0)
    assert many.stop - many.start == 2 * BLOCK
    assert len(ports._held) == 3
    rest = [lease_block() for _ in range(BLOCKS - 3)]
    assert not {port for block in rest for port in block} & set(many)
    with pytest.raises(NoBlock):
        lease(2 * BLOCK, 0)


def test_processes_lease_different_blocks_and_a_killed_one_gives_its_block_back() -> None:
    """Whatever each does: the kernel keeps the locks."""
    ours = [lease_block() for _ in range(BLOCKS - 1)]
    with another_process() as (theirs, _):
        assert theirs not in {block.start for block in ours}
        with pytest.raises(NoBlock):
            lease_block()
    assert lease_block(patience=10).start == theirs


def test_free_ports_pass_over_those_that_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from this process's block only, in a row, and others each time."""
    loose = range(ports.FIRST, ports.FIRST + 12)
    monkeypatch.setattr(plumbing, "loose_ports", lambda: loose)
    monkeypatch.setattr(plumbing, "_next_loose", 0)
    taken = plumbing.kept(socket.socket())
    taken.bind(("127.0.0.1", loose[4]))
    assert [plumbing.free_ports(3) for _ in range(4)] == [loose[0:3], loose[5:8], loose[8:11], loose[0:3]]
    with pytest.raises(AssertionError, match="no 13 ports in a row are free"):
        plumbing.free_ports(13)
