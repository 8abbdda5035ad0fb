"""The services behind an agent: HTTP, a half-close service, an echo service. Run inside a host's namespace.

HTTP:       GET /whoami      -> {"host", "reached_at", "peer"}
            GET /big?bytes=N -> N bytes of `pattern`
            PUT /upload      -> {"bytes", "sha256"} of the body
half-close: reads until the client's FIN, then answers {"bytes", "sha256"} of what came, as one JSON line
echo:       whatever comes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import socketserver
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

HTTP_PORT = 9100
HALF_CLOSE_PORT = 9101
ECHO_PORT = 9102
#: listens like the others, but no agent of the lab exposes it
UNEXPOSED_PORT = 9103

BLOCK = 1 << 20


@cache
def _noise() -> bytes:
    return random.Random("rtunnel").randbytes(BLOCK - 8)


def pattern(size: int) -> Iterator[bytes]:
    """`size` bytes in which no MiB equals another: its number, then always the same noise."""
    for number in range(-(-size // BLOCK)):
        block = number.to_bytes(8, "big") + _noise()
        yield block[: size - number * BLOCK]


def pattern_sha256(size: int) -> str:
    """What a client must find for `pattern(size)`."""
    digest = hashlib.sha256()
    for block in pattern(size):
        digest.update(block)
    return digest.hexdigest()


class _Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host_name = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/whoami":
            self._answer({"host": self.host_name, "reached_at": _sockname(self.connection), "peer": self._peer()})
        elif url.path == "/big":
            size = int(parse_qs(url.query)["bytes"][0])
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            for block in pattern(size):
                self.connection.sendall(block)
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        digest = hashlib.sha256()
        left = size = int(self.headers["Content-Length"])
        while left:
            piece = self.rfile.read1(min(left, BLOCK))
            if not piece:
                self.close_connection = True
                return
            digest.update(piece)
            left -= len(piece)
        self._answer({"bytes": size, "sha256": digest.hexdigest()})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the lab makes many thousand requests."""

    def _peer(self) -> str:
        return str(self.client_address[0]).removeprefix("::ffff:")

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _HalfClose(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        digest, size = hashlib.sha256(), 0
        while piece := self.request.recv(BLOCK):
            digest.update(piece)
            size += len(piece)
        self.request.sendall(json.dumps({"bytes": size, "sha256": digest.hexdigest()}).encode() + b"\n")


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while piece := self.request.recv(65536):
            self.request.sendall(piece)


class _Tcp(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients of the lab break off on purpose."""


class _HttpServer(_Tcp, ThreadingHTTPServer):
    pass


def _sockname(sock: socket.socket) -> str:
    return str(sock.getsockname()[0]).removeprefix("::ffff:")


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--http", type=int, nargs="*", default=[HTTP_PORT, UNEXPOSED_PORT])
    parser.add_argument("--half-close", type=int, default=HALF_CLOSE_PORT)
    parser.add_argument("--echo", type=int, default=ECHO_PORT)
    options = parser.parse_args()
    _Http.host_name = options.name
    servers: list[socketserver.BaseServer] = [_HttpServer(("::", port), _Http) for port in options.http]
    servers.append(_Tcp(("::", options.half_close), _HalfClose))
    servers.append(_Tcp(("::", options.echo), _Echo))
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
