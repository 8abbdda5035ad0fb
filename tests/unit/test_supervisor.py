"""Workers: their parts of the ranges, what configurations are refused, and a supervisor over processes that fail."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from rtunnel import workers
from rtunnel.config import Config, ConfigError, check_role, host_name, load, parse_range, slice_of
from rtunnel.workers import Supervisor, worker_config

#: A worker that knows its task and leaves when it is told to; `sys.argv` has its role and number.
GOOD = "import sys; sys.stdin.buffer.readline(); sys.stdin.buffer.read(1)"


@given(st.data())
def test_slices_are_disjoint_whole_and_fair(data: st.DataObject) -> None:
    first = data.draw(st.integers(1, 65535))
    last = data.draw(st.integers(first, 65535))
    count = data.draw(st.integers(1, min(64, last - first + 1)))
    parts = [parse_range(slice_of(f"{first}-{last}", number, count)) for number in range(1, count + 1)]
    assert (parts[0][0], parts[-1][1]) == (first, last)
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(parts))
    sizes = [high - low + 1 for low, high in parts]
    assert max(sizes) - min(sizes) <= 1 <= min(sizes)


def fault(keys: dict[str, object], role: str = "") -> str:
    """What is said of a configuration that is refused."""
    with pytest.raises(ConfigError) as caught:
        check_role(load(None, {}, keys), role)
    return str(caught.value)


def test_a_range_too_small_for_all_workers_is_refused() -> None:
    text = fault({"broker.workers": 3, "broker.port_range": "20000-20001"})
    assert "broker.port_range: 20000-20001 has 2 ports, and each of 3 workers needs one of its own" in text
    open_ports = {"broker.open_ports.range": "30000-30000", "broker.open_ports.allow": ["10.0.0.0/8"]}
    text = fault({"broker.workers": 2, **open_ports})
    assert "broker.open_ports.range: 30000-30000 has 1 ports" in text
    assert load(None, {}, {"broker.workers": 2, "broker.port_range": "20000-20001"}).broker.workers == 2


@pytest.mark.parametrize("count", [0, -1, 65, "two"])
@pytest.mark.parametrize("role", ["broker", "gateway"])
def test_the_number_of_workers_is_bounded(role: str, count: object) -> None:
    assert f"{role}.workers" in fault({f"{role}.workers": count})


def test_what_workers_can_not_be_combined_with() -> None:
    """A registry that nobody can share, a process that has a broker and a gateway, a name without room."""
    assert "workers are several processes that need one registry" in fault({"broker.workers": 2}, "broker")
    for key in ("broker.workers", "gateway.workers"):
        assert f"{key}: is over 1, and `rtunnel standalone` is one process" in fault({key: 2}, "standalone")
    assert "broker.node_id: is 127 characters long" in fault({"broker.workers": 2, "broker.node_id": "n" * 127})


def test_each_worker_is_a_node_with_its_part() -> None:
    keys: dict[str, object] = {
        "broker.workers": 3, "broker.node_id": "b", "broker.host": "h", "broker.port_range": "20000-20009",
        "broker.open_ports.range": "30000-30002", "broker.open_ports.allow": ["10.0.0.0/8"],
    }  # fmt: skip
    config = load(None, {}, keys)
    own = [worker_config(config, "broker", number, "127.0.0.1:7", "fd:9").broker for number in (1, 2, 3)]
    assert [worker.node_id for worker in own] == ["b.1", "b.2", "b.3"]
    assert [worker.port_range for worker in own] == ["20000-20002", "20003-20005", "20006-20009"]
    assert [worker.open_ports.own for worker in own] == ["30000-30000", "30001-30001", "30002-30002"]
    assert {(w.host, w.listen, w.admin, w.workers, w.open_ports.range) for w in own} == {
        ("h", "127.0.0.1:7", "fd:9", 3, "30000-30002")
    }
    unnamed = worker_config(load(None, {}, {"broker.workers": 2}), "broker", 2, "", "")
    assert (unnamed.broker.node_id, unnamed.broker.open_ports.own) == (f"{host_name()}.2", "")
    assert config.broker.node_id == "b"
    gateway = worker_config(load(None, {}, {"gateway.workers": 2}), "gateway", 2, "127.0.0.1:7", "")
    assert (gateway.gateway.listen, gateway.gateway.admin, gateway.broker) == ("127.0.0.1:7", "", Config().broker)
    assert gateway.gateway.name == f"{host_name()}.2"  # each worker has a record of its own in the registry


# --- the supervisor, over processes of our own ------------------------------------------------------------


class Scene:
    """A supervisor whose workers run these scripts; the log's lines."""

    def __init__(self, patch: pytest.MonkeyPatch, *scripts: str, admin: str = "") -> None:
        patch.setattr(workers, "command", lambda _, number: [sys.executable, "-c", scripts[number - 1]])
        keys = {"gateway.listen": "127.0.0.1:0", "gateway.workers": len(scripts), "gateway.admin": admin}
        self.supervisor = Supervisor("gateway", load(None, {}, keys), len(scripts))
        self.code: int | None = None

    async def run(self) -> None:
        with trio.fail_after(15):
            self.code = await self.supervisor.run()


async def test_a_worker_that_can_not_start_ends_all_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a wrong configuration or a taken address; the other worker is told to leave."""
    for code in (2, 3):
        scene = Scene(monkeypatch, GOOD, f"raise SystemExit({code})")
        with structlog.testing.capture_logs() as lines:
            await scene.run()
        assert scene.code == code
        deaths = [(line["worker"], line["status"]) for line in lines if line["event"] == "worker_died"]
        assert deaths == [(2, f"exit code {code}")]


async def test_a_worker_that_dies_is_started_again_and_later_failures_do_not_end_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It dies by a signal, then can't start twice, then lives: the pauses grow, the other worker goes on."""
    monkeypatch.setattr(workers, "BACKOFF_FIRST", 0.05)
    tries = tmp_path / "tries"
    script = f"""
import os, sys, pathlib
tries = pathlib.Path({str(tries)!r})
count = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (count + 1))
if count == 0:
    os.kill(os.getpid(), 9)
if count < 3:
    sys.exit(3)
{GOOD}"""
    scene = Scene(monkeypatch, GOOD, script)
    with structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.run)
            with trio.fail_after(10):
                while not (tries.exists() and len(tries.read_text()) == 4):
                    await trio.sleep(0.01)
            assert [worker.restarts for worker in scene.supervisor.workers] == [0, 3]
            os.kill(os.getpid(), signal.SIGTERM)
    assert scene.code == 0
    deaths = [line["status"] for line in lines if line["event"] == "worker_died"]
    assert deaths == ["SIGKILL", "exit code 3", "exit code 3"]


async def test_a_worker_that_ends_badly_when_told_to_is_in_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, GOOD, f"{GOOD}; sys.exit(1)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.run)
        await running(scene)
        scene.supervisor.stop.set()
    assert scene.code == 1


async def test_a_worker_that_hears_nothing_is_killed_at_the_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "KILL_AFTER", 0.1)
    scene = Scene(monkeypatch, GOOD, "import time; time.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.run)
        await running(scene)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert scene.code == 1


async def running(scene: Scene) -> None:
    with trio.fail_after(10):
        while not (scene.supervisor.workers and all(worker.process for worker in scene.supervisor.workers)):
            await trio.sleep(0.01)


async def test_health_tells_of_workers_that_are_away_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer from these: the first never accepts, the second is dead."""
    monkeypatch.setattr(workers, "BACKOFF_FIRST", 60.0)
    monkeypatch.setattr(workers, "PATIENCE", 0.1)
    scene = Scene(monkeypatch, GOOD, "raise SystemExit(7)", admin="127.0.0.1:0")
    supervisor = scene.supervisor
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.run)
        with structlog.testing.capture_logs() as lines, trio.fail_after(10):
            while sum(line["event"] == "worker_died" for line in lines) < 2:
                await trio.sleep(0.01)
        code, _, body = await supervisor._readyz()
        reasons = ["worker 1: does not answer", "worker 2: does not run: exit code 7"]
        assert (code, json.loads(body)) == (503, {"ready": False, "reasons": reasons})
        shown = json.loads((await supervisor._statusz())[2])["workers"]
        assert [(worker["worker"], worker["pid"] > 0) for worker in shown] == [(1, True), (2, False)]
        assert json.loads((await supervisor._livez())[2]) == {"live": True, "silent_workers": []}, "it may be starting"
        monkeypatch.setattr(workers, "START_PATIENCE", 0.0)
        code, _, body = await supervisor._livez()
        assert (code, json.loads(body)) == (503, {"live": False, "silent_workers": [1]})
        supervisor.stop.set()
    assert scene.code == 0
