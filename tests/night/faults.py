"""The faults, in the words of an operator: how each is injected, which command finds it, and its cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from lab.conftest import start_target
from lab.target import HTTP_PORT, UNEXPOSED_PORT
from night.system import DENIED, Night

Inject = Callable[[Night], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """One fault. While `inject(night)` is entered, `command` on `place` shows all of `cause` in its CAUSE line, or in
    the line that `line` names."""

    name: str
    inject: Inject
    command: str
    cause: tuple[str, ...]
    place: str = "gateway"
    determined: bool = True  # False: the command only excludes other causes


FAULTS: list[Fault] = []


def fault(name: str, command: str, *cause: str, place: str = "gateway", determined: bool = True) -> Callable[..., None]:
    """Add a fault to the list; the decorated generator injects it, and undoes it behind its `yield`."""

    def added(inject: Callable[[Night], Iterator[None]]) -> None:
        FAULTS.append(Fault(name, contextmanager(inject), command, cause, place, determined))

    return added


A1, A2, B1, B2 = "10.1.0.7", "10.1.0.8", "10.2.0.7", "10.2.0.8"


def trace(ip: str, port: int = HTTP_PORT, *options: str) -> str:
    """Return the command that traces this target."""
    return " ".join(("rtunnel", "trace", f"{ip}:{port}", *options))


# -- the agent and its host --------------------------------------------------------------------------------------


@fault("agent killed", trace(A1), "a1 was here until", "left with: closed by peer")
def _agent_killed(night: Night) -> Iterator[None]:
    night.kill("a1")
    night.wait_gone("a1")
    yield
    night.start_agent("a1")


@fault("target down", trace(A1), "nobody listens on the target's port", "a1")
def _target_down(night: Night) -> Iterator[None]:
    night.targets["a1"].kill()
    yield
    night.targets["a1"] = start_target(night.net["a1"])
    night.wait_target("a1")


@fault("target dropped by a firewall", trace(A1), "the target drops packets", "a1")
def _target_dropped(night: Night) -> Iterator[None]:
    with night.filtered(night.net["a1"], "input", f"tcp dport {HTTP_PORT} drop"):
        yield


@fault("port not exposed", trace(A2, UNEXPOSED_PORT), "the agent a2 does not expose that port")
def _not_exposed(_night: Night) -> Iterator[None]:
    yield


@fault("policy denies", trace(A2, HTTP_PORT, "--as", DENIED), "no batch jobs on a2 denies it")
def _policy_denies(_night: Night) -> Iterator[None]:
    yield


# -- the network in the centre -----------------------------------------------------------------------------------

GUARDED = "tcp dport 20000-20999"


@fault("firewall between gateway and brokers' ports: drop", trace(B1), "drops the TCP connection")
def _ports_dropped(night: Night) -> Iterator[None]:
    with night.filtered(night.net["gateway"], "output", f"{GUARDED} drop"):
        yield


@fault("firewall between gateway and brokers' ports: reject", trace(B1), "rejects the TCP connection")
def _ports_rejected(night: Night) -> Iterator[None]:
    with night.filtered(night.net["gateway"], "output", f"{GUARDED} reject with tcp reset"):
        yield
