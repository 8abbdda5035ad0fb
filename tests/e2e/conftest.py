"""For every end-to-end test: nothing waits without need, and what the parts log is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from rtunnel import watch
from rtunnel.trust import follower, pki
from rtunnel_socks import hedge, resolver
from support.cluster import HEDGE_DELAY
from support.logs import Events

#: What a role waits for by itself, and so would each test.
_QUICK: list[tuple[Any, str, float]] = [
    (watch, "LOOK_SECONDS", 0.1),
    (follower, "FOLLOW_SECONDS", 0.1),
    (resolver, "FOLLOW_WAIT", 0.05),  # the end of a gateway waits for it
    (hedge, "LEAST_DELAY", HEDGE_DELAY),  # the other way round: a machine that is busy is no reason for a hedge
]
_OWN: list[tuple[Any, str, float]] = [(module, name, getattr(module, name)) for module, name, _ in _QUICK]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, seconds in _QUICK:
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def own_pace(_quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the product: for promises of how soon something is seen."""
    for module, name, seconds in _OWN:
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def events() -> Iterator[Events]:
    """What all parts of the test log."""
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cluster's keys for all tests of a file."""
    made = tmp_path_factory.mktemp("cluster") / "pki"
    pki.init(made)
    return made


@pytest.fixture
def here(tmp_path: Path, secrets: Path) -> Path:
    """A directory for `running_cluster` with the keys in it."""
    (tmp_path / "pki").symlink_to(secrets)
    return tmp_path
