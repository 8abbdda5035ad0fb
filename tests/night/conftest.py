"""The network and the system of the night, started once; and the page that a whole run can write."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from lab.topology import Topology, missing
from night import page
from night.system import Night

_NIGHTS: list[Night] = []


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    """The whole system, running."""
    if reason := missing():
        if os.environ.get("RTUNNEL_LAB_REQUIRED"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    logs: Path = tmp_path_factory.mktemp("night")
    with Topology(logs) as topology:
        night = Night(topology, logs)
        _NIGHTS.append(night)
        night.start()
        yield night


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The ends of the parts' logs beside a failure."""
    report = yield
    if report.failed and _NIGHTS:
        report.sections.append(("the parts' logs", _NIGHTS[-1].tails()))
    return report


def pytest_sessionfinish() -> None:
    """Write the page, when that is asked for and every fault was injected."""
    if os.environ.get("RTUNNEL_NIGHT_PAGE"):
        page.write()
