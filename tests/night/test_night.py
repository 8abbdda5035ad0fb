"""Each fault is injected into a running system and found by one command; then the system is whole again."""

from __future__ import annotations

import pytest

from night import page
from night.faults import FAULTS, Fault
from night.system import Night

pytestmark = pytest.mark.lab


def test_without_a_fault_no_trace_blames_anything(night: Night) -> None:
    """All hosts, by both gateways."""
    night.wait_healthy()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_one_command_names_the_fault(night: Night, fault: Fault) -> None:
    with fault.inject(night):
        answer = night.ask(fault.command, fault.place)
    found = page.Finding.of(fault, answer)
    missing = [word for word in fault.cause if word not in found.cause]
    night.wait_healthy()
    page.FOUND.append(found)
    assert not missing, f"{missing} not in {found.cause!r}:\n{answer.output}"
