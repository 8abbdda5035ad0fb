"""Attacks that need a network of their own and processes of their own, against the running system.

What one process can show is in tests/e2e (bad input, stale tuples, identity, proof); docs/security.md says which test
shows what. After each attack everybody is served as before.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from lab.roles import ADMIN_PORT, AUTHORITY_PORT, REDIS_PORT, Lab
from lab.target import ECHO_PORT, HTTP_PORT, UNEXPOSED_PORT
from lab.topology import BROKERS, HOSTS, LINK_PORT, PROXY_PORT, PYTHON_LAB, VIP, Host, Process, wait_for
from rtunnel.config import BrokerConfig, LimitsConfig
from rtunnel.trust.keys import load_gateway_key
from rtunnel.wire import messages
from rtunnel.wire.messages import Accepted, Decoder, Dial, DialBody, Hello, Refuse, encode, encode_body

pytestmark = pytest.mark.lab

FLOOD = 10_000
TRIES, RATE = 100, 20


@pytest.fixture(scope="module", autouse=True)
def _running(lab: Lab) -> None:
    """The scenarios of test_lab end every part."""
    lab.revive()


@pytest.fixture(autouse=True)
def _whole(lab: Lab) -> Iterator[None]:
    """Every attack begins with everything in order, and ends so: no part has died, each host answers by its IP."""
    lab.wait_whole()
    before = {name: part.pid for name, part in lab.parts.items()}
    yield
    assert not [name for name, part in lab.parts.items() if not part.alive and part.pid == before[name]]
    lab.wait_whole()
    for name in HOSTS:
        told = lab.client("controller", "get", lab.net[name].ip, str(HTTP_PORT))
        assert told["ok"], told
        assert json.loads(told["body"])["host"] == name


# A Dial by somebody who has a gateway's key, or has overheard one.


def ask_port(host: Host, place: tuple[str, int], dial: bytes) -> str:
    """Raw bytes to a guarded port from a place: the code of the refusal, or the first other answer's type."""
    decoder = Decoder[messages.DialAnswer](*messages.DIAL_ANSWERS)
    with host.connect(*place) as sock:
        sock.sendall(dial)
        while (answer := decoder.next()) is None:
            decoder.feed(sock.recv(4096) or b"\0\0\0\1\xc0")
    return answer.code if isinstance(answer, Refuse) else type(answer).__name__


def place_of(entry: dict[str, Any]) -> tuple[str, int]:
    """Where a tuple's guarded port is."""
    return entry["ps_ip"], int(entry["ps_port"])


def stolen_dial(lab: Lab, entry: dict[str, Any], **changes: Any) -> bytes:
    """A Dial with a good MAC for this tuple, or for whatever its maker likes."""
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "namespace": "default",
        "ip": entry["agent_ip"],
        "port": HTTP_PORT,
        "node": entry["node"],
        "epoch": int(entry["epoch"]),
        "nonce": os.urandom(messages.NONCE_BYTES),
        "time": int(time.time() * 1000),
    }
    body = encode_body(DialBody(**fields | changes))
    key = load_gateway_key(lab.secrets / "gateway.key")
    return encode(Dial(body=body, mac=key.sign(body), key=key.id))


def test_a_gateway_in_wrong_hands_reaches_only_what_agents_expose(lab: Lab) -> None:
    """With a gateway's key, past its rules: the host's other ports, its loopback, its neighbours and the centre stay
    out of reach."""
    entry = lab.guarded("a1")[0]
    a1, a2, gateway = lab.net["a1"], lab.net["a2"], lab.net["gateway"]
    assert ask_port(gateway, place_of(entry), stolen_dial(lab, entry)) == "Accepted"
    asked = {
        (a1.ip, UNEXPOSED_PORT): "not_exposed",
        (a1.ip, ADMIN_PORT): "not_exposed",
        ("127.0.0.1", HTTP_PORT): "stale_target",
        ("127.0.0.1", ADMIN_PORT): "stale_target",
        ("::1", HTTP_PORT): "stale_target",
        ("169.254.169.254", 80): "stale_target",
        (a2.ip, HTTP_PORT): "stale_target",
        (lab.net["redis"].ip, REDIS_PORT): "stale_target",
        (VIP, PROXY_PORT): "stale_target",
    }
    for (ip, port), code in asked.items():
        assert ask_port(gateway, place_of(entry), stolen_dial(lab, entry, ip=ip, port=port)) == code, (ip, port)


class Segment(NamedTuple):
    """A piece of a TCP connection."""

    source: str
    to: tuple[str, int]
    begins: bool  # SYN without ACK
    payload: bytes


class Tap:
    """What somebody on the path hears of a place's connections."""

    def __init__(self, host: Host) -> None:
        self._sock = host.new_packet_socket()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def heard(self) -> Iterator[Segment]:
        """TCP over IPv4, since the last call."""
        while True:
            try:
                packet = self._sock.recv(1 << 17)
            except BlockingIOError:
                return
            if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
                continue
            ip = packet[14 : 14 + int.from_bytes(packet[16:18], "big")]
            tcp = ip[(ip[0] & 15) * 4 :]
            to = socket.inet_ntoa(ip[16:20]), int.from_bytes(tcp[2:4], "big")
            yield Segment(socket.inet_ntoa(ip[12:16]), to, tcp[13] & 0x12 == 0x02, tcp[(tcp[12] >> 4) * 4 :])


def overheard_dial(lab: Lab, entry: dict[str, Any]) -> bytes:
    """The bytes of the gateway's own Dial to this guarded port."""
    with Tap(lab.net["gateway"]) as tap:

        def heard() -> bytes:
            assert lab.client("controller", "get", entry["agent_ip"], str(HTTP_PORT))["ok"]
            to_port = [segment.payload for segment in tap.heard() if segment.to == place_of(entry)]
            return next((payload for payload in to_port if b"dial" in payload[:16]), b"")

        payload, _ = wait_for("the gateway dials this port", heard, 20)  # it chooses one of two paths
    decoder = Decoder(Dial)
    decoder.feed(payload)
    frame = decoder.next_frame()
    assert frame is not None
    return frame[1]


def test_an_overheard_dial_opens_nothing(lab: Lab) -> None:
    """The bytes of a real Dial, sent again: to the same port, to other sessions' ports, and with one bit changed."""
    entry = lab.guarded("b1")[0]
    dial = overheard_dial(lab, entry)
    others = [t for t in lab.tuples() if t["agent_port"] == 0 and t["agent_id"] != "b1"]
    for thief in (lab.net["controller"], lab.net["gateway"]):
        assert ask_port(thief, place_of(entry), dial) == "replayed"
        for other in others:
            code = "stale_target" if other["node"] == entry["node"] else "stale_node"
            assert ask_port(thief, place_of(other), dial) == code
    other_port = dial.replace(struct.pack(">BH", 0xCD, HTTP_PORT), struct.pack(">BH", 0xCD, UNEXPOSED_PORT))
    assert other_port != dial
    assert ask_port(lab.net["controller"], place_of(entry), other_port) == "bad_mac"


# A registry that lies.


class Rogue:
    """A process in the centre that says Accepted to every Dial, and then speaks for the target."""

    ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\nConnection: close\r\n\r\n{"host": "rogue"}'

    def __init__(self, host: Host) -> None:
        self._sock = host.new_socket()
        self._sock.bind((host.ip, 0))
        self._sock.listen()
        self.place: tuple[str, int] = self._sock.getsockname()
        self.dials = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            with sock:
                self.dials += bool(sock.recv(4096))
                sock.sendall(encode(Accepted()) + self.ANSWER)
                read_all(sock)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def test_a_registry_that_lies_leads_nobody_astray(lab: Lab) -> None:
    """Who can write to Redis sends a1's clients to a place of his own: they are served by a1 all the same."""
    true = lab.guarded("a1")[0]
    rogue = Rogue(lab.net["controller"])
    since = lab.log_mark("gateway")
    try:

        def caught() -> bool:
            lab.forge({**true, "ps_ip": rogue.place[0], "ps_port": rogue.place[1]})
            got = lab.client("controller", "get", true["agent_ip"], str(HTTP_PORT))
            assert got["ok"] and json.loads(got["body"])["host"] == "a1", got
            return rogue.dials > 0 and "not_proven" in since()

        wait_for("the gateway finds the lie", caught, 20)  # it chooses one of two paths
    finally:
        lab.forge(true)
        rogue.close()


# Being another host.


def told(line: dict[str, Any]) -> str:
    """Why an agent has no session, when a line of its log says so."""
    return str(line["reason"]) if line["event"] in ("session_not_opened", "enrolment_failed") else ""


def assert_nobody_comes(lab: Lab, place: str, owner: str, why: str, **keys: Any) -> None:
    """An attacker's agent on a host is refused for this reason, and the owner is still the owner."""
    before = lab.guarded(owner)
    impostor = lab.spawn_impostor(place, **keys)
    try:
        reasons, _ = wait_for("a refusal", lambda: [*filter(None, map(told, impostor.json_lines()))], 20)
        assert why in reasons[0]
        assert_owned(lab, owner, before)
        assert not [line for line in impostor.json_lines() if line["event"] == "session_opened"]
    finally:
        impostor.kill()


def assert_owned(lab: Lab, owner: str, before: list[dict[str, Any]]) -> None:
    """The registry has what it had for this agent, and clients reach it."""
    assert [t | {"beat": 0} for t in lab.guarded(owner)] == [t | {"beat": 0} for t in before]
    for _ in range(4):
        got = lab.client("controller", "get", lab.net[owner].ip, str(HTTP_PORT))
        assert got["ok"] and json.loads(got["body"])["host"] == owner, got


def framed(message: bytes) -> bytes:
    """On stream 1 of a link (yamux: Data, SYN)."""
    return struct.pack(">BBHII", 0, 0, 1, 1, len(message)) + message


def read_all(sock: socket.socket, until: bytes = b"\0" * 99) -> bytes:
    """Up to the end, or to this word."""
    heard = b""
    try:
        while until not in heard and (piece := sock.recv(4096)):
            heard += piece
    except OSError:
        pass
    return heard


def say_hello(lab: Lab, origin: str, hello: Hello, pair: tuple[str, str] | None = None) -> bytes:
    """What a broker answers to this on a link whose client shows this certificate, or none."""
    context = ssl.create_default_context(cafile=str(lab.secrets / "ca.pem"))
    context.set_alpn_protocols(["rtunnel/1"])
    if pair is not None:
        context.load_cert_chain(*pair)
    plain = lab.net[origin].connect(VIP, LINK_PORT, 20)
    with context.wrap_socket(plain, server_hostname="broker.rtunnel") as sock:
        sock.sendall(framed(encode(hello)))
        return read_all(sock, b"welcome")


def greeting(agent_id: str, *addresses: str, **changes: Any) -> Hello:
    """What an attacker's own program says: the real agent would not."""
    fields: dict[str, Any] = {
        "agent_id": agent_id,
        "addresses": list(addresses),
        "namespace": "default",
        "token_id": "",
    }
    return Hello(version=1, instance=bytes(16), nonce=bytes(16), **fields | changes)


def test_a_host_in_wrong_hands_is_no_other_host(lab: Lab) -> None:
    """Its own key and certificate, for another's address, beside its own address, for another's name and namespace."""
    ip, b1 = "10.1.0.77", lab.net["b1"].ip
    before = lab.guarded("b1")
    pair = lab.issue("mallory", "default", ip)
    assert b"welcome" in say_hello(lab, "a1", greeting("mallory", ip), pair)
    for claim in (
        greeting("mallory", b1),
        greeting("mallory", ip, b1),
        greeting("b1", b1),
        greeting("b1", ip),
        greeting("mallory", ip, namespace="blue"),
    ):
        assert b"bad_certificate" in say_hello(lab, "a1", claim, pair), claim
    assert_owned(lab, "b1", before)


def test_a_certificate_of_another_namespace_is_worth_nothing_here(lab: Lab) -> None:
    """The same id and the same address, in a namespace of a tenant's own."""
    b1 = lab.net["b1"].ip
    before = lab.guarded("b1")
    pair = lab.issue("b1", "blue", b1)
    assert b"bad_certificate" in say_hello(lab, "a1", greeting("b1", b1), pair)
    assert b"welcome" in say_hello(lab, "a1", greeting("b1", b1, namespace="blue"), pair)
    assert_owned(lab, "b1", before)


def test_two_hosts_with_good_certificates_for_one_address(lab: Lab) -> None:
    """An operator's mistake: the one that is there stays, and the other's log says whose the address is."""
    ip = lab.net["b1"].ip
    certificate, key = lab.issue("b1-too", "default", ip)
    keys = {"certificate": certificate, "key": key, "agent_id": "b1-too", "addresses": [ip]}
    lab.net["b2"].check("ip", "address", "add", f"{ip}/32", "dev", "lo")  # an agent looks whether its host has it
    try:
        assert_nobody_comes(lab, "b2", "b1", f"address_taken: {ip} is taken: the agent 'b1' has it", **keys)
    finally:
        lab.net["b2"].check("ip", "address", "del", f"{ip}/32", "dev", "lo")


def test_a_stolen_token_is_worth_nothing_after_its_use(lab: Lab) -> None:
    """Nor before, for an address that it is not for."""
    a1, b1 = lab.net["a1"], lab.net["b1"]
    keys = {"identity": str(lab.directory / "identity-thief"), "agent_id": "b1", "addresses": [b1.ip]}
    used = str(lab.directory / "b1.token")
    assert_nobody_comes(lab, "a1", "b1", "used up", **keys, join_token=used)
    fresh = lab.directory / "fresh.token"
    fresh.write_text(lab.new_token(a1.ip))
    assert_nobody_comes(lab, "a1", "b1", "not_authorised", **keys, join_token=str(fresh))


def stream(lab: Lab, ip: str) -> socket.socket:
    """To a host's echo service, by SOCKS5 from the controller."""
    sock = lab.net["controller"].connect(lab.net["gateway"].ip, PROXY_PORT)
    sock.sendall(b"\5\1\0\5\1\0\1" + socket.inet_aton(ip) + struct.pack(">H", ECHO_PORT))
    heard = b""
    while len(heard) < 12:
        heard += sock.recv(12 - len(heard)) or b"\xff" * 12
    assert heard[:4] == b"\5\0\5\0", heard
    sock.sendall(b"there?")
    assert sock.recv(6, socket.MSG_WAITALL) == b"there?"
    return sock


def test_a_revoked_host_is_out_within_seconds_also_without_redis(lab: Lab) -> None:
    """Its open stream ends, another host's does not; a new token, put in the old one's place, lets it in again."""
    b2 = lab.net["b2"]
    lab.parts["redis"].kill()
    with stream(lab, b2.ip) as lost, stream(lab, lab.net["b1"].ip) as kept:
        lab.revoke("agent/default/b2")
        began = time.monotonic()
        lost.settimeout(20)
        assert read_all(lost) == b""
        took = time.monotonic() - began
        kept.sendall(b"there?")
        assert kept.recv(6, socket.MSG_WAITALL) == b"there?"
    lab.start_redis()
    lab.note("revoked", f"a host's stream ended {took:.2f} s after `rtunnel pki revoke`, with Redis dead")
    assert took <= 5.0
    (lab.directory / "b2.token").write_text(lab.new_token(b2.ip, b2.ip6))
    lab.wait_ready("b2", 30)


def test_nothing_goes_down_to_less_than_it_was_told(lab: Lab) -> None:
    """A plain link, TLS 1.2, TLS without a certificate: the broker says no, and nothing of its own."""
    a1 = lab.net["a1"]
    hello = greeting("a1", a1.ip)
    with a1.connect(VIP, LINK_PORT) as sock:
        sock.sendall(framed(encode(hello)))
        assert read_all(sock)[:1] in (b"", b"\x15")  # nothing, or an alert of TLS
    old = ssl.create_default_context(cafile=str(lab.secrets / "ca.pem"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with a1.connect(VIP, LINK_PORT) as sock, pytest.raises(ssl.SSLError, match="VERSION"):
        old.wrap_socket(sock, server_hostname="broker.rtunnel")
    assert b"bad_certificate" in say_hello(lab, "a1", hello)


# Into the centre through the tunnel, or round and round.


def test_the_gateway_is_no_way_into_the_centre(lab: Lab) -> None:
    """Itself, a broker, Redis, its own loopback, the VIP, a cloud's metadata: it never dials an address itself, and no
    agent has these."""
    centre = {name: lab.net[name].ip for name in (*BROKERS, "redis", "gateway", "controller")}
    places = [f"{ip}:{port}" for ip in centre.values() for port in (LINK_PORT, PROXY_PORT, REDIS_PORT, ADMIN_PORT)]
    places += [
        f"{ip}:{ADMIN_PORT}" for ip in ("127.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "127.1", "2130706433")
    ]
    places += [f"{VIP}:{PROXY_PORT}", f"{VIP}:{LINK_PORT}", "169.254.169.254:80", f"localhost:{ADMIN_PORT}"]
    places += [f"{entry['ps_ip']}:{entry['ps_port']}" for entry in lab.tuples()]
    with Tap(lab.net["gateway"]) as tap:
        for place in places:
            for how in ("--socks5-hostname", "--proxy"):
                done = lab.net["app"].curl(how, lab.proxy("app"), "--globoff", f"http://{place}/", seconds=5)
                assert done.returncode, (how, place, done.stdout)
        ours = lab.net["gateway"].ip
        dialled = {segment.to for segment in tap.heard() if segment.begins and segment.source == ours}
    assert dialled <= {(lab.net["redis"].ip, REDIS_PORT), (lab.net["authority"].ip, AUTHORITY_PORT)}
    assert lab.status("gateway")["streams"] == 0


# Words that would like to be lines.

#: An end of line in three spellings, a line of their own, and what a terminal would obey.
FORGED = '\r\n{"event": "forged", "level": "info"}\n\u2028\x1b[2J\x9b2J\u202e'
#: The real agent, which calls its version so.
SPOOFER = f"import rtunnel; rtunnel.__version__ = {FORGED!r}; from rtunnel.cli import main; main()"


def say_everywhere(lab: Lab) -> None:
    """Names of clients, targets, users, agents and Dials: whatever a peer may say before and after it is believed."""
    app, words = lab.net["app"], FORGED.encode()
    basic = base64.b64encode(words + b":" + words)
    plain = bytes(b for b in words if b not in b"\r\n")
    requests = [
        b"\5\1\0\5\1\0\3" + bytes([len(words)]) + words + b"\0\x50",
        b"\5\1\2\1" + 2 * (bytes([len(words)]) + words),
        b"CONNECT 10.1.0.7:9100 HTTP/1.1\r\nProxy-Authorization: Basic " + basic + b"\r\n\r\n",
        b"CONNECT " + plain + b":80 HTTP/1.1\r\nHost: " + plain + b"\r\n\r\n",
        b"GET http://" + plain + b"/ HTTP/1.1\r\nHost: x\r\nUser-Agent: " + words + b"\r\n\r\n",
        words,
    ]
    for request in requests:
        with app.connect(VIP, PROXY_PORT) as sock:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    entry = lab.guarded("a1")[0]
    for changes in ({"namespace": FORGED}, {"ip": FORGED[:45]}, {"node": FORGED}, {"who": FORGED}):
        ask_port(lab.net["gateway"], place_of(entry), stolen_dial(lab, entry, **changes))
    for key, value in {"agent_id": FORGED, "namespace": FORGED, "token_id": FORGED, "exposes": [FORGED]}.items():
        fields: dict[str, Any] = {"agent_id": "x", "software": FORGED, key: value}
        say_hello(lab, "a1", greeting(**fields))


def test_no_name_makes_a_line_of_a_log(lab: Lab) -> None:
    """Every line of every part's log is one JSON object, and none of them is the attacker's."""
    lab.parts["b2"].terminate()
    lab.parts["b2"] = lab.net["b2"].spawn(
        *(sys.executable, "-c", SPOOFER, "agent", "--config", str(lab.config("b2"))), name="agent@b2"
    )
    lab.wait_ready("b2")
    say_everywhere(lab)
    lab.restart_agents(["b2"])
    lab.wait_ready("b2")
    said = 0
    for name in (*BROKERS, *HOSTS, "gateway"):
        log = lab.parts[name].log.read_bytes()
        said += log.count(b"forged")
        for line in log.rstrip(b"\n").split(b"\n"):
            assert json.loads(line)["event"] != "forged", line
            assert not [c for c in line.decode() if not c.isprintable()], line
    assert said >= 5  # it was told, and told as what it is


# Too much of a good thing.


@dataclass
class Flood:
    """Connections that begin to speak and then say nothing."""

    process: Process

    def look(self) -> dict[str, int]:
        """How many are open, ended by the other end, or never came about."""
        count = len(self.process.json_lines())
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        lines, _ = wait_for("the flood answers", lambda: self.process.json_lines()[count:], 10)
        found: dict[str, int] = lines[0]
        return found


def flood(lab: Lab, origin: str, port: int, first: bytes) -> Flood:
    """FLOOD of them from one place to the VIP, all begun."""
    words = ("lab.flood", VIP, str(port), str(FLOOD), first.hex())
    process = lab.net[origin].spawn(*PYTHON_LAB, *words, name=f"flood@{origin}", stdin=True, fresh=True)
    wait_for("the flood is there", process.json_lines, 30)
    return Flood(process)


def let_in(attack: Flood, most: int) -> dict[str, int]:
    """What became of the flood, once it has no more than `most` left open: who is closed at last, hears it later."""
    return wait_for(f"at most {most} are let in", lambda: (seen := attack.look())["open"] <= most and seen, 10)[0]  # type: ignore[return-value]


def test_half_open_handshakes_at_the_gateway_cost_others_nothing(lab: Lab) -> None:
    """10,000 from one source, which gets its share; every connection of another source is served."""
    attack = flood(lab, "app", PROXY_PORT, b"\5")
    try:
        before = let_in(attack, LimitsConfig().source_handshakes)
        client = lab.tries("tries-flood-gateway", TRIES, RATE)
        assert client.wait(30) == 0
        tries = client.json_lines()
        slowest = max(t["seconds"] for t in tries)
        lab.note("10,000 half-open", f"at the gateway: {before}; others: {len(tries)} ok, slowest {slowest:.3f} s")
        assert not [t for t in tries if not t["ok"]]
        assert before["open"] + before["ended"] + before["failed"] == FLOOD
    finally:
        attack.process.kill()


def test_half_open_handshakes_at_the_brokers_cost_others_nothing(lab: Lab) -> None:
    """10,000 of one host, which stop in TLS's first record: streams go on, and another host's agent comes back."""
    attack = flood(lab, "a1", LINK_PORT, bytes.fromhex("1603010200010001fc0303"))
    try:
        before = let_in(attack, len(BROKERS) * BrokerConfig().source_handshakes)
        client = lab.tries("tries-flood-broker", TRIES, RATE)
        lab.restart_agents(["b1"])
        back = wait_for("an agent comes back", lambda: lab.reached("b1"), 60)[1]
        assert client.wait(30) == 0
        tries = client.json_lines()
        slowest = max(t["seconds"] for t in tries)
        lab.note("10,000 half-open", f"at the brokers: {before}; others: {len(tries)} tries, slowest {slowest:.3f} s")
        lab.note("10,000 half-open", f"at the brokers: an agent that restarts is back after {back:.1f} s")
        assert not [t for t in tries if not t["ok"] and t["wanted"] != "b1"]
        assert back <= 10.0
    finally:
        attack.process.kill()
