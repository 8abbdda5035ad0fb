"""An attacker at the gateway's port who speaks SOCKS5, or something that is no proxy protocol."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from support.attackers import ANY_PORT, FAST, Attack, all_told, attack_all, noise, says, told, trickles
from support.cluster import Target, running_cluster
from support.unharmed import unharmed


def socks_request(host: bytes, port: int, *, command: int = 1, kind: int | None = None) -> bytes:
    """A request; a name unless the host has the size of an address."""
    kind = kind if kind is not None else {4: 1, 16: 4}.get(len(host), 3)
    address = bytes((len(host),)) + host if kind == 3 else host
    return bytes((5, command, 0, kind)) + address + struct.pack(">H", port)


GREETING = b"\5\1\0"


async def test_the_gateway_withstands_every_socks_client(here: Path) -> None:
    """Unknown methods, commands, address types, odd names, other protocols: to each its own reply."""
    ip = socket.inet_aton("127.1.0.1")

    def replied(code: int) -> bytes:
        return b"\5\0\5" + bytes((code,)) + b"\0\1" + bytes(6)

    attacks: dict[str, tuple[Attack, bytes, str]] = {
        "a garbage byte": (says(b"\xfe"), b"", "the first byte is 0xfe"),
        "SOCKS4": (says(b"\4\1\0\x50\x7f\1\0\1\0"), b"\0\x5b" + bytes(6), "SOCKS4 is not supported"),
        "a TLS ClientHello": (says(b"\x16\3\1\2\0\1" + noise(600)), b"", "TLS to the proxy"),
        "no method": (says(b"\5\0"), b"\5\xff", "offers no method"),
        "unknown methods": (says(b"\5\3\1\x80\xfe"), b"\5\xff", "does not offer no authentication"),
        "255 unknown methods": (says(b"\5\xff" + bytes(range(1, 256))), b"\5\xff", "does not offer"),
        "login only": (says(b"\5\1\2"), b"\5\xff", "does not offer"),
        "BIND": (says(GREETING + socks_request(ip, ANY_PORT, command=2)), replied(7), "BIND is not supported"),
        "UDP ASSOCIATE": (says(GREETING + socks_request(ip, ANY_PORT, command=3)), replied(7), "UDP ASSOCIATE"),
        "command 0": (says(GREETING + socks_request(ip, ANY_PORT, command=0)), replied(7), "unknown command"),
        "command 255": (says(GREETING + socks_request(ip, ANY_PORT, command=255)), replied(7), "unknown command"),
        "address type 0": (says(GREETING + socks_request(ip, 9, kind=0)), replied(8), "address type 0x00"),
        "address type 2": (says(GREETING + socks_request(ip, 9, kind=2)), replied(8), "address type 0x02"),
        "address type 255": (says(GREETING + socks_request(ip, 9, kind=255)), replied(8), "address type 0xff"),
        "an empty name": (says(GREETING + socks_request(b"", 9, kind=3)), replied(1), "the name is empty"),
        "a name of 255 bytes": (says(GREETING + socks_request(b"x" * 255, 9)), replied(4), "is a name"),
        "a name with control characters": (
            says(GREETING + socks_request(b"a\r\nb\x1bc", 9)),
            replied(1),
            "printable",
        ),
        "a name with bytes over 127": (says(GREETING + socks_request(b"\xff\xfe\xfd", 9)), replied(1), "printable"),
        "a broken IPv6 literal": (says(GREETING + socks_request(b"[::1", 9, kind=3)), replied(1), "neither a name"),
        "an address with a zone": (says(GREETING + socks_request(b"fe80::1%eth0", 9)), replied(1), "zone"),
        "port 0": (says(GREETING + socks_request(ip, 0)), replied(1), "port 0"),
        "an address of nobody": (says(GREETING + socks_request(b"\0\0\0\0", 9)), replied(4), "no agent answers"),
        "a request of version 4": (says(GREETING + b"\4\1\0\1" + ip + b"\0\x09"), replied(1), "request of version 4"),
        "half a greeting": (says(b"\5\2\0"), b"", "deadline"),
        "half a request": (says(GREETING + socks_request(ip, ANY_PORT)[:7]), b"\5\0", "deadline"),
        "half a request and the end": (says(GREETING + b"\5\1\0", fin=True), b"\5\0", "ended before"),
        "silence": (says(b""), b"", "deadline"),
        "nothing and the end": (says(b"", fin=True), b"", "ended before"),
        "a slow request": (trickles(GREETING + socks_request(b"x" * 200, 9)), b"\5\0", "deadline"),
    }
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        async with unharmed(cluster, Target("127.1.0.1")) as logs:
            done = await attack_all(cluster.gateway.bound, {name: a for name, (a, _, _) in attacks.items()})
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, answer, reason) in attacks.items()
            if reason not in told(logs, done[name]) or done[name].answer != answer or done[name].ending == "never"
        }
        assert not wrong
