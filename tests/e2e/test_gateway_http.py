"""An attacker at the gateway's port who speaks HTTP."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from support.attackers import FAST, PATIENCE, Attack, Attacker, all_told, attack_all, says, told, trickles
from support.cluster import Target, in_thread, running_cluster
from support.plumbing import kept
from support.unharmed import unharmed


async def test_the_gateway_withstands_every_http_client(here: Path) -> None:
    """Oversized heads, origin form, smuggling: the status says what is wrong; slowness meets the deadline."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1)
        target = Target("127.1.0.1")
        url = f"http://127.1.0.1:{target.port}/".encode()
        attacks: dict[str, tuple[Attack, int, str]] = {
            "an oversized head": (says(b"GET " + url + b" HTTP/1.1\r\nX: " + b"x" * (1 << 16)), 431, "over 65536"),
            "an endless method": (says(b"G" * (1 << 16)), 431, "over 65536"),
            "origin form": (says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "not a web server"),
            "no URL at all": (says(b"GET x HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "absolute"),
            "https": (says(b"GET https://127.1.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "can't be forwarded"),
            "a user in the URL": (says(b"GET http://a@127.1.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "no proper host"),
            "CONNECT without port": (says(b"CONNECT 127.1.0.1 HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "needs a port"),
            "CONNECT to port 0": (says(b"CONNECT 127.1.0.1:0 HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "no port 0"),
            "CONNECT with a body": (
                says(b"CONNECT 127.1.0.1:9 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"), 400, "no body",
            ),
            "CONNECT to a name": (says(b"CONNECT x:9 HTTP/1.1\r\nHost: x\r\n\r\n"), 502, "is a name"),
            "HTTP/2": (says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505, "HTTP/2.0"),
            "LF alone": (says(b"GET " + url + b" HTTP/1.1\nHost: x\n\n"), 400, "LF alone"),
            "a folded line": (says(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n y\r\n\r\n"), 400, "folded"),
            "two framings": (
                says(
                    b"POST " + url + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                ), 400, "both Content-Length",
            ),
            "two lengths": (
                says(b"POST " + url + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n"),
                400, "malformed",
            ),
            "a NUL in a field": (says(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n"), 400, "malformed"),
            "half a head": (says(b"GET " + url + b" HTTP/1.1\r\n"), 0, "deadline"),
            "half a head and the end": (says(b"GET " + url + b" HTTP/1.1\r\n", fin=True), 0, "ended before"),
            "a slow head": (trickles(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n\r\n"), 0, "deadline"),
        }  # fmt: skip
        async with unharmed(cluster, target) as logs:
            done = await attack_all(cluster.gateway.bound, {name: a for name, (a, _, _) in attacks.items()})
            await all_told(cluster, logs, done)
        wrong = {
            name: (told(logs, done[name]), done[name].answer, done[name].ending)
            for name, (_, status, reason) in attacks.items()
            if reason not in told(logs, done[name])
            or not done[name].answer.startswith(b"HTTP/1.1 %d " % status if status else b"")
            or (not status and done[name].answer)
            or done[name].ending == "never"
        }
        assert not wrong


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_second_request_never_reaches_the_first_target(here: Path, pieces: int) -> None:
    """Pipelined behind a request in absolute form, at once or later: it could be meant for another host."""
    async with running_cluster(here, **FAST) as cluster:
        await cluster.start(brokers=1, agents=2)
        heard = bytearray()
        server = kept(socket.create_server(("127.1.0.1", 0)))
        first = f"GET http://127.1.0.1:{server.getsockname()[1]}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        second = b"GET http://127.1.0.2:80/secret HTTP/1.1\r\nHost: y\r\n\r\n"

        def serve() -> None:
            served = kept(server.accept()[0])
            served.settimeout(PATIENCE)
            try:
                while piece := served.recv(4096):
                    heard.extend(piece)
                    served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            except OSError:
                pass
            served.close()

        def client() -> None:
            attacker = Attacker(cluster.gateway.bound)
            attacker.say(first + (second if pieces == 1 else b""))
            if pieces == 2:
                attacker.answer += attacker.sock.recv(4096)
                attacker.say(second)
            else:
                attacker.sock.shutdown(socket.SHUT_WR)
            attacker.hear_out()

        async with unharmed(cluster, Target("127.1.0.1")), trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, serve)
            await in_thread(client)
        assert b"GET / HTTP/1.1" in heard and b"secret" not in heard
