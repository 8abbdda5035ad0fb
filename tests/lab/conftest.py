"""Fixtures of the lab: the network, the targets, the whole system; and the summary at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from lab.roles import Lab
from lab.target import ECHO_PORT, HALF_CLOSE_PORT, HTTP_PORT, UNEXPOSED_PORT
from lab.topology import HOSTS, PYTHON_LAB, Host, Process, Topology, missing, wait_for

_LABS: list[Lab] = []


def start_target(host: Host, *options: str) -> Process:
    """A target on a host (`lab.target`)."""
    return host.spawn(*PYTHON_LAB, "lab.target", "--name", host.name, *options, name=f"target@{host.name}")


def wait_listening(host: Host, *ports: int) -> None:
    """Until something accepts connections on these ports of a host."""

    def probe() -> bool:
        for port in ports:
            host.connect(host.ip, port, 1).close()
        return True

    wait_for(f"{host.name} listens on {ports}", probe, 10)


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """The VPCs and the VIP, with a target on every host and nothing else."""
    if reason := missing():
        if os.environ.get("RTUNNEL_LAB_REQUIRED"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    logs: Path = tmp_path_factory.mktemp("lab")
    with Topology(logs) as topology:
        for name in HOSTS:
            start_target(topology[name])
        for name in HOSTS:
            wait_listening(topology[name], HTTP_PORT, HALF_CLOSE_PORT, ECHO_PORT, UNEXPOSED_PORT)
        _LABS.append(Lab(topology, logs))
        yield topology


@pytest.fixture(scope="session")
def parts(net: Topology) -> Lab:
    """The system, not started."""
    return _LABS[-1]


@pytest.fixture(scope="session")
def lab(parts: Lab) -> Lab:
    """The whole system, running: Redis, three brokers, a gateway, four agents."""
    parts.start()
    return parts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The ends of the parts' logs beside a failure."""
    report = yield
    if report.failed and _LABS:
        report.sections.append(("the lab's logs", _LABS[-1].tails()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured, for whoever runs the lab."""
    if not _LABS or not _LABS[-1].notes:
        return
    notes = _LABS[-1].notes
    width = max(len(what) for what, _ in notes)
    terminalreporter.section("lab")
    for what, told in notes:
        terminalreporter.write_line(f"{what:>{width}}  {told}")
    terminalreporter.write_line(f"{'logs':>{width}}  {_LABS[-1].directory}")
