"""`rtunnel demo`, as far as it is not a story (tests/e2e/test_processes.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from rtunnel import demo
from rtunnel.trust import pki
from support.plumbing import free_port


async def test_two_gateways_at_once_have_a_port_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of SOCKS is taken by the bind itself: the second one gets a free port, and does not fail."""
    monkeypatch.setattr(demo, "SOCKS_PORT", free_port())
    started: list[demo.Running] = []

    async def start(cluster: demo.Cluster) -> None:
        started.append(await cluster._start_gateway())

    pki.init(tmp_path / "pki")
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as both:
            for _ in range(2):
                both.start_soon(start, demo.Cluster(tmp_path, nursery))
        ports = {running.role.bound[1] for running in started}
        assert len(ports) == 2 and demo.SOCKS_PORT in ports
        nursery.cancel_scope.cancel()
