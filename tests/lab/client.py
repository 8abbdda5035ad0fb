"""The lab's own client, run inside a namespace: PySocks, half-close, steady tries, an idle connection.

Prints one JSON object a line. A failure is data here (`"ok": false`), not an exit status.

    lab.client [--proxy IP:PORT] [--http-proxy] get IP PORT [PATH]
    lab.client ...                              half-close IP PORT BYTES
    lab.client ...                              idle IP PORT  (speaks again at every line on standard input)
    lab.client ...                              tries COUNT RATE IP=NAME ...
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import importlib
import json
import socket
import sys
import threading
import time

from lab.target import HTTP_PORT, pattern

TIMEOUT = 15.0

#: PySocks; a type checker that reads `import socks` in this repository finds the gateway's folder instead
socks = importlib.import_module("socks")


class Dialler:
    """Connects through the proxy with PySocks, or directly when there is none."""

    def __init__(self, proxy: str, http_proxy: bool) -> None:
        self._host, _, port = proxy.rpartition(":")
        self._port = int(port or 0)
        self._kind = socks.HTTP if http_proxy else socks.SOCKS5

    def dial(self, ip: str, port: int, timeout: float = TIMEOUT) -> socket.socket:
        """A connected socket; OSError (PySocks' errors are OSErrors) when there is none."""
        if not self._host:
            return socket.create_connection((ip, port), timeout)
        sock: socket.socket = socks.create_connection(
            (ip, port),
            timeout=timeout,
            proxy_type=self._kind,
            proxy_addr=self._host,
            proxy_port=self._port,
            proxy_rdns=True,
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


def say(**fields: object) -> None:
    """One JSON line, in one write: several threads say."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def fetch(sock: socket.socket, ip: str, port: int, path: str) -> tuple[int, bytes]:
    """GET over a connected socket: status and body."""
    connection = http.client.HTTPConnection(ip, port)
    connection.sock = sock
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def get(dialler: Dialler, ip: str, port: int, path: str) -> None:
    """One GET."""
    start = time.monotonic()
    try:
        status, body = fetch(dialler.dial(ip, port), ip, port, path)
        say(ok=True, status=status, body=body.decode(), seconds=time.monotonic() - start)
    except (OSError, http.client.HTTPException) as error:
        say(ok=False, error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - start)


def half_close(dialler: Dialler, ip: str, port: int, size: int) -> None:
    """Send `size` bytes, shut the sending side, read the whole answer (which only comes after our FIN)."""
    start = time.monotonic()
    digest = hashlib.sha256()
    answer = b""
    try:
        with dialler.dial(ip, port) as sock:
            sock.settimeout(120)
            for block in pattern(size):
                sock.sendall(block)
                digest.update(block)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                answer += piece
        told = json.loads(answer)
        same = told == {"bytes": size, "sha256": digest.hexdigest()}
        say(ok=same, told=told, seconds=time.monotonic() - start)
    except (OSError, ValueError) as error:
        say(ok=False, error=f"{type(error).__name__}: {error}", answer=repr(answer[:200]))


def idle(dialler: Dialler, ip: str, port: int) -> None:
    """Open a connection, use it once, then again at every line on standard input; silent in between."""
    try:
        with dialler.dial(ip, port) as sock:
            sock.settimeout(10)
            _echo(sock, b"first words\n")
            silent_since = time.monotonic()
            say(ok=True, event="open")
            for line in sys.stdin:
                _echo(sock, line.encode())
                say(ok=True, event="echo", idle=time.monotonic() - silent_since)
                silent_since = time.monotonic()
    except OSError as error:
        say(ok=False, error=f"{type(error).__name__}: {error}")


def _echo(sock: socket.socket, words: bytes) -> None:
    sock.sendall(words)
    heard = b""
    while len(heard) < len(words):
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"the connection ended after {len(heard)} of {len(words)} bytes")
        heard += piece
    if heard != words:
        raise ConnectionError(f"said {words!r}, heard {heard!r}")


def tries(dialler: Dialler, count: int, rate: float, targets: list[tuple[str, str]]) -> None:
    """A new connection every 1/rate seconds, whatever became of those before; each in its own thread."""
    start = time.monotonic()
    threads = []
    for number in range(count):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        ip, name = targets[number % len(targets)]
        thread = threading.Thread(target=_one_try, args=(dialler, number, ip, name))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


def _one_try(dialler: Dialler, number: int, ip: str, name: str) -> None:
    """Tells the outcome, and when it began and was connected (CLOCK_MONOTONIC: the test's clock too)."""
    began = time.monotonic()
    connected = 0.0
    host, error = "", ""
    try:
        sock = dialler.dial(ip, HTTP_PORT)
        connected = time.monotonic()
        status, body = fetch(sock, ip, HTTP_PORT, "/whoami")
        host = json.loads(body)["host"] if status == 200 else f"status {status}"
    except (OSError, http.client.HTTPException, ValueError) as fault:
        error = f"{type(fault).__name__}: {fault}"
    say(
        number=number,
        ok=host == name,
        wanted=name,
        host=host,
        error=error,
        began=began,
        connected=connected,
        seconds=time.monotonic() - began,
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--proxy", default="")
    parser.add_argument("--http-proxy", action="store_true")
    parser.add_argument("verb", choices=["get", "half-close", "idle", "tries"])
    parser.add_argument("rest", nargs="+")
    options = parser.parse_args()
    dialler, rest = Dialler(options.proxy, options.http_proxy), options.rest
    match options.verb:
        case "get":
            get(dialler, rest[0], int(rest[1]), rest[2] if len(rest) > 2 else "/whoami")
        case "half-close":
            half_close(dialler, rest[0], int(rest[1]), int(rest[2]))
        case "idle":
            idle(dialler, rest[0], int(rest[1]))
        case _:
            pairs = [(ip, name) for ip, _, name in (word.partition("=") for word in rest[2:])]
            tries(dialler, int(rest[0]), float(rest[1]), pairs)


if __name__ == "__main__":
    main()
