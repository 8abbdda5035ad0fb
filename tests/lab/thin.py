"""A smaller system in the lab's network: two brokers, a gateway, and one agent behind a thin line.

The line (`support.line`) stands between the agent and the VIP, on the agent's neighbour: its rate,
its delay and its small receive buffer make both ends of the links wait for the kernel again and
again. It must not stand on the agent's own host: over loopback (segments of 64 KB) the kernel
gives a sender a buffer of MBs, and no end ever waits. The target and the clients know each
stream's content to the byte (`support.exact`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.conftest import wait_listening
from lab.roles import ADMIN_PORT, Lab
from lab.topology import LINK_PORT, PROXY_PORT, PYTHON_LAB, VIP, Process, Topology, wait_for
from support.line import Shape

#: The rate and the buffer at which a link was seen to lose frames: 3 MB/s, 64 KiB.
THIN = Shape(rate=3e6, delay=0.01, buffer=64 << 10)
#: net.ipv4.tcp_wmem, in bytes: least, at first, at most. A link's end then waits for the kernel
#: after every few frames. Measured on a version that lost frames: 20 to 40 of 1,000 streams were
#: damaged with this, 0 or 1 with the usual 4 MB.
SMALL_SEND_BUFFERS = "4096 16384 65536"
NODES = ("broker1", "broker2")
AGENT = "a1"
NEIGHBOUR = "a2"
CLIENT = "controller"
LINE_PORT = 7700
EXACT_PORT = 9104
OPEN_PORT = 30060


class ThinLab(Lab):
    """Its parts have their own logs and files, and the places and ports of the whole lab's parts."""

    def __init__(self, net: Topology, directory: Path, security: str) -> None:
        super().__init__(net, directory, label=f"thin-{security}-")
        self.security = security
        self.target: Process | None = None
        self._usual_buffers = net[AGENT].check("sysctl", "-n", "net.ipv4.tcp_wmem").strip()

    def start(self) -> None:
        """Start everything; return when the gateway knows both sessions of the agent."""
        self._send_buffers(SMALL_SEND_BUFFERS)
        self._make_pki()
        self.start_redis()
        plain = {"ca": "", "join_token": self._secret("join.token")} if self.security == "plain" else {}
        for name in NODES:
            self.start_broker(name, authority="", trust="", security=self.security, **plain)
        self.start_gateway(authority="", trust="")
        for name in (*NODES, "gateway"):
            self.wait_ready(name)
        host = self.net[AGENT]
        self.target = self._spawn(AGENT, "support.exact", "target", str(EXACT_PORT), name="target")
        listen = f"{self.net[NEIGHBOUR].ip}:{LINE_PORT}"
        numbers = (str(number) for number in (THIN.rate, THIN.delay, THIN.buffer))
        self._spawn(NEIGHBOUR, "support.line", listen, f"{VIP}:{LINK_PORT}", *numbers, name="line")
        wait_listening(host, EXACT_PORT)
        self._start_thin_agent(listen)
        self.wait_ready(AGENT)
        wait_for("the gateway knows the agent's tuples", lambda: self.status("gateway")["tuples"] == 4, 15)

    def _spawn(self, place: str, module: str, *words: str, name: str) -> Process:
        """A helper; it ends with the parts."""
        name = f"{self.label}{name}@{place}"
        self.parts[name] = self.net[place].spawn(*PYTHON_LAB, module, *words, name=name)
        return self.parts[name]

    def _start_thin_agent(self, brokers: str) -> None:
        host = self.net[AGENT]
        certificate, key = self.issue(AGENT, "default", host.ip)
        keys: dict[str, Any] = {
            "brokers": [brokers],
            "agent_id": AGENT,
            "addresses": [host.ip],
            "exposes": [str(EXACT_PORT)],
            "ca": self._secret("ca.pem"),
            "certificate": certificate,
            "key": key,
            "security": self.security,
            "admin": f"127.0.0.1:{ADMIN_PORT}",
        }
        if self.security == "plain":
            keys["join_token"] = self._secret("join.token")
        publish = {"target": f"{host.ip}:{EXACT_PORT}", "port": OPEN_PORT, "allow": [f"{self.net[CLIENT].ip}/32"]}
        self._start(host, "agent", {"agent": keys, "agent.publish": [publish]})

    def exchange(self, streams: int, long: int, seconds: float) -> dict[str, Any]:
        """Do so many exchanges by SOCKS5 and by both open ports in turn; the load's `Outcome`."""
        target = f"{self.net[AGENT].ip}:{EXACT_PORT}"
        socks = f"socks={self.net['gateway'].ip}:{PROXY_PORT}={target}"
        opened = [f"open={self.net[name].ip}:{OPEN_PORT}" for name in NODES]
        ways = (socks, opened[0], socks, opened[1])
        words = ("support.exact", "client", str(streams), str(long), *ways)
        outcome: dict[str, Any] = json.loads(self.net[CLIENT].check(*PYTHON_LAB, *words, seconds=seconds))
        return outcome

    def damaged_uploads(self) -> list[str]:
        """What the target has found."""
        assert self.target is not None
        return self.target.text().splitlines()

    def _send_buffers(self, sizes: str) -> None:
        """Set net.ipv4.tcp_wmem where the links' ends are."""
        for name in (AGENT, *NODES):
            self.net[name].check("sysctl", "-qw", f"net.ipv4.tcp_wmem={sizes}")

    def stop(self) -> None:
        """End every part, and undo what was set: the whole lab needs these places."""
        for part in reversed(self.parts.values()):
            part.kill()
        self._send_buffers(self._usual_buffers)


@contextmanager
def thin_lab(net: Topology, directory: Path, security: str) -> Iterator[ThinLab]:
    """Running; at the end every part is gone, and the VIP is as before."""
    directory.mkdir()
    lab = ThinLab(net, directory, security)
    net.balance("random", NODES)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        net.balance("random")
