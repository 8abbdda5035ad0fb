"""The faults, in the words of an operator: how each is injected, which command finds it, and its cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from lab.conftest import start_target
from lab.target import HTTP_PORT, UNEXPOSED_PORT
from lab.topology import VIP
from night.system import DENIED, USER, Night

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


@fault("host silent", trace(A1), "the agent a1 is silent on its link", "its host hangs")
def _host_silent(night: Night) -> Iterator[None]:
    night.net["a1"].cut()
    try:
        night.wait_silent("a1")
        yield
    finally:
        night.net["a1"].mend()


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


@fault("slow target", trace(A1), "the target is slow")
def _slow_target(night: Night) -> Iterator[None]:
    """The host drops the first two SYNs; each comes again after a second."""
    with night.filtered(night.net["a1"], "input", f"tcp dport {HTTP_PORT} tcp flags syn quota until 120 bytes drop"):
        yield


@fault("port not exposed", trace(A2, UNEXPOSED_PORT), "the agent a2 does not expose that port")
def _not_exposed(_night: Night) -> Iterator[None]:
    yield


@fault("policy denies", trace(A2, HTTP_PORT, "--as", DENIED), "no batch jobs on a2 denies it")
def _policy_denies(_night: Night) -> Iterator[None]:
    yield


@fault("wrong password", trace(A1, HTTP_PORT, "--as", f"{USER}@10.9.0.40"), "alice", "password")
def _wrong_password(night: Night) -> Iterator[None]:
    proxy = f"socks5h://{USER}:wrong@{night.proxy('controller')}"
    assert night.net["controller"].curl("--proxy", proxy, f"http://{A1}:{HTTP_PORT}/").returncode
    yield


@fault("agent registered docker0's address", trace(A2), "the agent a2", "172.17.0.1", "docker0")
def _docker_address(night: Night) -> Iterator[None]:
    with night.interface("a2", "docker0", "172.17.0.1/16"), night.certified("a2", "default", "172.17.0.1"):
        night.wait_gone("a2")
        yield


@fault("host behind NAT", trace(A2), "the agent a2", "192.168.77.2", "NAT")
def _behind_nat(night: Night) -> Iterator[None]:
    """The agent has the address of the network behind the NAT; the centre knows the address outside."""
    with night.interface("a2", "inside0", "192.168.77.2/24"), night.certified("a2", "default", "192.168.77.2"):
        night.wait_gone("a2")
        yield


@fault("namespace mismatch", trace(A2), "exists in namespace blue", "serves default")
def _namespace(night: Night) -> Iterator[None]:
    with night.certified("a2", "blue", A2):
        night.wait_until(lambda: "blue" in night.traced(A2)["text"])
        yield


@fault("docker0's network hides the VIP on the agent's host", trace(B1), "b1", determined=False)
def _docker_hides(night: Night) -> Iterator[None]:
    with night.interface("b1", "docker0", "10.99.0.254/24"):
        night.wait_gone("b1", 40)
        yield


# -- identities --------------------------------------------------------------------------------------------------


@fault("certificate expired", trace(A2), "calls itself a2", "bad_certificate", "expired")
def _expired(night: Night) -> Iterator[None]:
    with night.certified("a2", "default", A2, clock=-86400):
        night.wait_refused("a2", "expired")
        yield


@fault("certificate of another CA", trace(A2), "calls itself a2", "bad_certificate", "CA")
def _other_ca(night: Night) -> Iterator[None]:
    with night.certified("a2", "default", A2, other_ca=True):
        night.wait_refused("a2", "CA")
        yield


@fault("certificate revoked", trace(B1), "revoked", "b1")
def _revoked(night: Night) -> Iterator[None]:
    night.revoke("agent/default/b1")
    night.wait_gone("b1")
    yield
    night.kill("b1")
    night.forget_identity("b1")
    night.start_agent("b1")


@fault("two agents claim one IP", trace(A2), "a2 was refused", "address_taken", A1)
def _two_claim(night: Night) -> Iterator[None]:
    with night.interface("a2", "moved0", f"{A1}/32"), night.certified("a2", "default", A2, A1):
        night.wait_refused("a2", "address_taken")
        yield


@fault("cloned agent_id", trace(A1), "a1", "10.2.0.8")
def _cloned(night: Night) -> Iterator[None]:
    with night.interface("b2", "cloned0", f"{A1}/32"), night.clone("a1", "b2"):
        night.wait_until(lambda: any(node["duplicates"] for node in night.rtunnel("status")["nodes"]))
        yield


# -- the VIP -----------------------------------------------------------------------------------------------------


@fault("VIP pins by source", trace(A1), "by one path only", "VIP")
def _vip_pins(night: Night) -> Iterator[None]:
    with night.balanced("pinned"):
        night.kill("a1")
        night.start_agent("a1")
        night.wait_until(lambda: night.reached_once("a1"))
        yield


@fault("VIP down", trace(A1), "VIP")
def _vip_down(night: Night) -> Iterator[None]:
    with night.filtered(night.net.router, "forward", "drop"):
        night.wait_silent("a1")
        night.wait_silent("b1")
        yield


@fault("VIP leads to a wrong port", trace(A1), "a1 was here until", determined=False)
def _vip_wrong_port(night: Night) -> Iterator[None]:
    with night.misdirected("10.9.0.11:7001"):
        night.kill("a1")
        night.start_agent("a1")
        night.wait_gone("a1")
        yield


# -- brokers -----------------------------------------------------------------------------------------------------

GUARDED = "tcp dport 20000-20999"


@fault("one broker black-holed", trace(A1), "broker1", "has no heartbeat")
def _black_hole(night: Night) -> Iterator[None]:
    night.place("a1", "broker1", "broker2")
    night.net["broker1"].cut()
    try:
        yield
    finally:
        night.net["broker1"].mend()


@fault("wrong advertise_ip", trace(A1), "broker1", "wrong PS IP")
def _advertise(night: Night) -> Iterator[None]:
    with night.replaced_broker("broker1", advertise_ip="10.9.0.99"):
        night.place("a1", "broker1", "broker2")
        yield


@fault("firewall between gateway and brokers' ports: drop", trace(B1), "drops the TCP connection")
def _ports_dropped(night: Night) -> Iterator[None]:
    with night.filtered(night.net["gateway"], "output", f"{GUARDED} drop"):
        yield


@fault("firewall between gateway and brokers' ports: reject", trace(B1), "rejects the TCP connection")
def _ports_rejected(night: Night) -> Iterator[None]:
    with night.filtered(night.net["gateway"], "output", f"{GUARDED} reject with tcp reset"):
        yield


@fault("clock of a broker 60 s off", trace(A1), "the clock of the broker broker1 is 60 s ahead")
def _clock(night: Night) -> Iterator[None]:
    with night.shifted_broker("broker1", 60):
        night.place("a1", "broker1", "broker2")
        yield


@fault("port range used up", trace(A2), "a2 was refused", "broker1: ports_exhausted")
def _used_up(night: Night) -> Iterator[None]:
    with night.replaced_broker("broker1", port_range="20500-20500"), night.balanced("random", ["broker1"]):
        for name in ("a1", "a2"):
            night.kill(name)
            night.wait_gone(name)
        night.start_agent("a1")
        night.wait_until(lambda: night.reached_once("a1"))
        night.start_agent("a2")
        night.wait_refused("a2", "ports_exhausted")
        yield


@fault("port ranges of two brokers overlap on one PS IP", trace(A1), "broker2", "broker1 has the same PS IP")
def _overlap(night: Night) -> Iterator[None]:
    with night.replaced_broker("broker2", advertise_ip="10.9.0.11"):
        night.place("a1", "broker2", "broker3")
        yield


@fault("broker without descriptors", "rtunnel status", "the descriptors of broker1 are nearly used up")
def _descriptors(night: Night) -> Iterator[None]:
    with night.without_descriptors("broker1"):
        night.wait_until(lambda: "descriptors" in str(night.rtunnel("status")["warnings"]))
        yield


# -- the registry ------------------------------------------------------------------------------------------------


@fault("Redis down", trace(A1), "registry", "10.9.0.20")
def _redis_down(night: Night) -> Iterator[None]:
    night.kill("redis")
    night.wait_until(lambda: night.traced(A1)["registry"] != "ok")
    yield
    night.start_redis()


@fault("wrong Redis password on one broker", "rtunnel status", "broker1", determined=False)
def _redis_password(night: Night) -> Iterator[None]:
    with night.wrong_password("broker1"):
        night.wait_until(lambda: any(node["node"] == "broker1" for node in night.rtunnel("status")["gone"]))
        yield


@fault("one gateway with a stale table", trace(A1), "table", "10.9.0.20", place="gateway2")
def _stale_table(night: Night) -> Iterator[None]:
    with night.filtered(night.net["gateway2"], "output", "ip daddr 10.9.0.20 drop"):
        night.wait_until(lambda: night.traced(A1, place="gateway2")["registry"] != "ok")
        night.kill("a1")
        night.start_agent("a1")
        night.wait_ready("a1")
        yield


# -- sizes of packets --------------------------------------------------------------------------------------------


@fault("MTU black hole between agent and VIP", trace(A1), "MTU")
def _mtu_of_links(night: Night) -> Iterator[None]:
    with night.filtered(night.net.router, "forward", f"ip saddr {A1} meta length > 1300 drop"), night.download(A1):
        night.wait_silent("a1", paths=1)
        yield


@fault("MTU black hole between gateway and broker", trace(A1), "MTU")
def _mtu_of_dials(night: Night) -> Iterator[None]:
    rule = "tcp sport 20000-20999 meta length > 1300 drop"
    with night.filtered(night.net["gateway"], "input", rule), night.download(A1):
        yield


# -- loops -------------------------------------------------------------------------------------------------------


@fault("loop: the target is the gateway", trace("10.9.0.30", 1080), "10.9.0.30 is the gateway")
def _loop_gateway(_night: Night) -> Iterator[None]:
    yield


@fault("loop: the target is a broker", trace("10.9.0.11", 7000), "10.9.0.11 is the broker broker1")
def _loop_broker(_night: Night) -> Iterator[None]:
    yield


@fault("loop: the target is the VIP", trace(VIP, 7000), "no agent", determined=False)
def _loop_vip(_night: Night) -> Iterator[None]:
    yield
