"""The gateway as an HTTP proxy: probes of its port, requests in absolute form one after the other, and odd clients."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h11
import pytest
import trio

from rtunnel_socks import forward
from support.cluster import Cluster, in_thread, running_cluster
from support.logs import Events, named
from support.plumbing import kept, read_all, reset

PATIENCE = 10.0


def probe_blocking(cluster: Cluster, method: bytes = b"GET", source: str = "127.0.0.1") -> bytes:
    """What a load balancer gets from the proxy port."""
    sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE, source_address=(source, 0)))
    sock.sendall(method + b" /healthz HTTP/1.0\r\n\r\n")
    return read_all(sock)


async def probe(cluster: Cluster, method: bytes = b"GET", source: str = "127.0.0.1") -> bytes:
    """The same, from trio."""
    return await in_thread(lambda: probe_blocking(cluster, method, source))


# --- health ---------------------------------------------------------------------------------------------------


async def test_a_probe_of_the_proxy_port_hears_whether_it_is_ready(tmp_path: Path, events: Events) -> None:
    """200 and 503 as `/readyz`, for strangers without a login too; a probe is no client and no refusal."""
    (tmp_path / "users").touch(0o600)
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_gateway(users=str(tmp_path / "users"), limits__source_rate=1)
        gateway = cluster.gateway
        await cluster.until(lambda: gateway.ready)
        for _ in range(4):
            assert (await probe(cluster, source="127.66.0.1")).startswith(b"HTTP/1.1 200 ready\r\n")
        assert (await probe(cluster, b"HEAD")).endswith(b"\r\n\r\n")
        gateway.draining = True
        answer = await probe(cluster)
        assert answer.startswith(b"HTTP/1.1 503 not ready\r\n") and b"draining" not in answer
        assert gateway.counts.refused == {}
        await cluster.until(lambda: gateway.counts.clients == 0)
    assert not named(events, "request_refused")


@pytest.mark.parametrize("full", [{"max_clients": 3}, {"limits__source_handshakes": 3}])
async def test_a_full_gateway_answers_probes(tmp_path: Path, events: Events, full: dict[str, int]) -> None:
    """Who asks for health needs no place: a full gateway is not taken out of service."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_gateway(**full)
        gateway = cluster.gateway
        await cluster.until(lambda: gateway.ready)
        held = [kept(socket.create_connection(gateway.bound)) for _ in range(3)]
        for sock in held:
            sock.sendall(b"\5")
        await cluster.until(lambda: gateway.counts.clients == 3)
        for method in (b"GET", b"HEAD"):
            assert (await probe(cluster, method)).startswith(b"HTTP/1.1 200 ready\r\n")
        assert gateway.counts.refused == {}
        with trio.fail_after(PATIENCE):
            assert await in_thread(lambda: refused_blocking(cluster)) == b""
        assert sum(gateway.counts.refused.values()) == 1


def refused_blocking(cluster: Cluster) -> bytes:
    """What another client gets."""
    sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))
    sock.sendall(b"GET /healthy HTTP/1.0\r\n\r\n")
    try:
        return read_all(sock)
    except ConnectionResetError:
        return b""


# --- requests in absolute form --------------------------------------------------------------------------------


Answer = Callable[["Origin", socket.socket, h11.Request, bytes], bool]


@dataclass
class Origin:
    """A web server: `answer(origin, connection, request, body)` says whether the connection lives on."""

    answer: Answer
    ip: str = "127.1.0.1"
    requests: list[tuple[int, bytes, bytes]] = field(default_factory=list)  # connection, target, body
    heads: list[dict[bytes, bytes]] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)  # how connections ended, as the server saw it
    connections: int = 0

    def __post_init__(self) -> None:
        self.sock = kept(socket.create_server((self.ip, 0)))
        self.port: int = self.sock.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> bytes:
        """What a client asks its proxy for."""
        return f"http://{self.ip}:{self.port}".encode()

    def _serve(self) -> None:
        while True:
            try:
                served = kept(self.sock.accept()[0])
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(served, self.connections), daemon=True).start()

    def _talk(self, served: socket.socket, number: int) -> None:
        served.settimeout(PATIENCE)
        try:
            data = b""
            while True:
                reader = h11.Connection(h11.SERVER)
                if data:
                    reader.receive_data(data)
                request, body = self._read(reader, served)
                if request is None:
                    self.endings.append("FIN")
                    break
                data = reader.trailing_data[0]
                self.requests.append((number, request.target, body))
                self.heads.append(dict(request.headers))
                if not self.answer(self, served, request, body):
                    break
        except OSError as error:
            self.endings.append(type(error).__name__)
        served.close()

    @staticmethod
    def _read(reader: h11.Connection, served: socket.socket) -> tuple[h11.Request | None, bytes]:
        request, body = None, b""
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(served.recv(1 << 16))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return request, body
            else:
                return None, b""


def says(body: bytes, *fields: bytes, close: bool = False) -> Answer:
    """200 with this body."""
    lines = (b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields)

    def answer(origin: Origin, served: socket.socket, request: h11.Request, _: bytes) -> bool:
        served.sendall(b"\r\n".join((*lines, b"", b"" if request.method == b"HEAD" else body)))
        return not close

    return answer


class Browser:
    """A client of the proxy with one connection; reads answers with h11."""

    def __init__(self, cluster: Cluster) -> None:
        self.sock = kept(socket.create_connection(cluster.gateway.bound, timeout=PATIENCE))
        self.left = b""

    def send(self, *requests: bytes) -> None:
        """Send raw requests in one piece."""
        self.sock.sendall(b"".join(requests))

    def hear(self, method: str = "GET") -> tuple[h11.Response, bytes]:
        """The next answer."""
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        if self.left:
            reader.receive_data(self.left)
        body = b""
        response = None
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(self.sock.recv(1 << 16))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert response is not None
                self.left = reader.trailing_data[0]
                return response, body
            else:
                assert isinstance(event, h11.InformationalResponse), event

    def ask(self, request: bytes, method: str = "GET") -> tuple[int, bytes]:
        """One request; the status and body of its answer."""
        self.send(request)
        response, body = self.hear(method)
        return response.status_code, body


def request(url: bytes, *fields: bytes, method: bytes = b"GET", body: bytes = b"", version: bytes = b"1.1") -> bytes:
    """In absolute form."""
    length = (b"Content-Length: %d" % len(body),) if body else ()
    return b"\r\n".join((method + b" " + url + b" HTTP/" + version, b"Host: x", *length, *fields, b"", body))


async def test_one_connection_serves_many_requests_each_to_its_own_target(tmp_path: Path, events: Events) -> None:
    """The same target reuses its stream, another one is dialled; each stream has its audit line."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1, agents=2)
        first, second = Origin(says(b"one")), Origin(says(b"two"), "127.1.0.2")
        gateway = cluster.gateway

        def browse() -> None:
            browser = Browser(cluster)
            for url, body in ((first.url, b"one"),) * 3 + ((second.url, b"two"),) * 2 + ((first.url, b"one"),):
                assert browser.ask(request(url + b"/a")) == (200, body)
            assert browser.ask(request(first.url + b"/b", method=b"POST", body=b"hello")) == (200, b"one")
            assert browser.ask(request(first.url + b"/c", method=b"HEAD"), "HEAD") == (200, b"")
            browser.send(request(first.url + b"/d", b"Connection: close"))
            response, _ = browser.hear()
            assert dict(response.headers)[b"connection"] == b"close"
            assert browser.sock.recv(1) == b""

        await in_thread(browse)
        assert [(number, target) for number, target, _ in first.requests] == [
            (1, b"/a"), (1, b"/a"), (1, b"/a"), (2, b"/a"), (2, b"/b"), (2, b"/c"), (2, b"/d"),
        ]  # fmt: skip
        assert [number for number, _, _ in second.requests] == [1, 1]
        assert first.requests[4][2] == b"hello"
        assert all(head[b"via"] == b"1.1 rtunnel" and b"connection" not in head for head in first.heads[:-1])
        assert first.heads[-1][b"connection"] == b"close"
        await cluster.until(lambda: not (gateway.counts.streams or gateway.counts.clients or gateway.relay.pairs))
        lines = named(events, "stream_ended")
        assert [(line["target"], line["requests"]) for line in lines] == [
            (f"127.1.0.1:{first.port}", 3), (f"127.1.0.2:{second.port}", 2), (f"127.1.0.1:{first.port}", 4),
        ]  # fmt: skip
        assert {line["reason"] for line in lines} == {"closed"}
        assert not named(events, "request_refused") and not named(events, "client_lost")


@pytest.mark.parametrize("surplus", [b"\r\n", b"GET http://127.9.9.9/ HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 300_000])
@pytest.mark.parametrize("close", [False, True])
async def test_surplus_bytes_do_not_harm_the_answer(tmp_path: Path, surplus: bytes, close: bool) -> None:
    """Behind a POST comes what does not belong to it, before, during and after the answer: that one is whole."""
    half = threading.Event()
    body = b"x" * 200_000

    def slowly(origin: Origin, served: socket.socket, request: h11.Request, _: bytes) -> bool:
        served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert half.wait(PATIENCE)
        served.sendall(body)
        return True  # whatever the request said of the connection

    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(slowly)
        fields = (b"Connection: close",) if close else ()

        def browse() -> None:
            browser = Browser(cluster)
            browser.send(request(origin.url + b"/", *fields, method=b"POST", body=b"hello"))
            sender = threading.Thread(target=send_surplus, args=(browser.sock, surplus), daemon=True)
            sender.start()
            browser.left = browser.sock.recv(1)
            half.set()
            response, got = browser.hear()
            assert (response.status_code, got) == (200, body)

        await in_thread(browse)
        assert origin.requests == [(1, b"/", b"hello")]


def send_surplus(sock: socket.socket, surplus: bytes) -> None:
    """As much as the other side takes."""
    try:
        sock.sendall(surplus)
    except OSError:
        pass


async def test_pipelined_requests_and_a_half_close(tmp_path: Path) -> None:
    """Three requests in one piece, then FIN: three answers in order, then FIN."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1, agents=2)
        first, second = Origin(says(b"one")), Origin(says(b"two"), "127.1.0.2")

        def browse() -> list[bytes]:
            browser = Browser(cluster)
            chunks = b"3\r\nabc\r\n0\r\n\r\n"
            browser.send(
                request(first.url, b"Transfer-Encoding: chunked", method=b"PUT") + chunks,
                b"\r\n",
                request(second.url + b"/2", method=b"POST", body=b"def"),
                request(first.url + b"/3"),
            )
            browser.sock.shutdown(socket.SHUT_WR)
            answers = [browser.hear()[1] for _ in range(3)]
            assert browser.left == b"" and browser.sock.recv(1) == b""
            return answers

        assert await in_thread(browse) == [b"one", b"two", b"one"]
        assert first.requests == [(1, b"/", b"abc"), (2, b"/3", b"")]
        assert second.requests == [(1, b"/2", b"def")]


async def test_a_kept_stream_that_has_ended_is_dialled_again(tmp_path: Path) -> None:
    """A target that closes or resets idle connections costs no request; a POST that is lost is not sent twice."""
    ends = threading.Event()

    def once(origin: Origin, served: socket.socket, request: h11.Request, _: bytes) -> bool:
        served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        # The next request is taken, and not answered: the connection ends just then.
        served.recv(1)
        if request.target == b"/reset":
            reset(served)
        ends.set()
        return False

    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(once)

        def browse() -> None:
            browser = Browser(cluster)
            for path in (b"/", b"/reset", b"/", b"/last"):
                assert browser.ask(request(origin.url + path)) == (200, b"ok")
            browser.send(request(origin.url + b"/", method=b"POST", body=b"hello"))
            try:
                assert browser.sock.recv(100) == b""
            except ConnectionResetError:
                pass

        await in_thread(browse)
        assert [number for number, _, _ in origin.requests] == [1, 2, 3, 4]


async def test_a_parked_stream_that_ends_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the target's FIN, by bytes that nobody asked for, and after a while by the gateway; the client lives on."""
    monkeypatch.setattr(forward, "PARK_SECONDS", 0.05)
    say = {b"/surplus": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"/fin": b"", b"/": b""}

    def answer(origin: Origin, served: socket.socket, request: h11.Request, _: bytes) -> bool:
        path = bytes(request.target)
        served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + say[path])
        return path != b"/fin"

    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(answer)
        browser = await in_thread(lambda: Browser(cluster))
        for path in (b"/surplus", b"/fin", b"/"):
            assert await in_thread(lambda path=path: browser.ask(request(origin.url + path))) == (200, b"ok")  # type: ignore[misc]
            await cluster.until(lambda: not cluster.gateway.counts.streams)
        assert await in_thread(lambda: browser.ask(request(origin.url + b"/"))) == (200, b"ok")
        assert [number for number, _, _ in origin.requests] == [1, 2, 3, 4]


# --- a WebSocket in absolute form -----------------------------------------------------------------------------


def websocket(origin: Origin, served: socket.socket, request: h11.Request, _: bytes) -> bool:
    """RFC 6455: the handshake, then each message comes back."""
    head = dict(request.headers)
    assert head[b"upgrade"].lower() == b"websocket" and b"upgrade" in head[b"connection"].lower()
    accept = base64.b64encode(
        hashlib.sha1(head[b"sec-websocket-key"] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    )
    served.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + b"\x81\x05hello"
    )
    while frame := served.recv(2, socket.MSG_WAITALL):
        size = frame[1] & 0x7F
        mask, data = served.recv(4, socket.MSG_WAITALL), served.recv(size, socket.MSG_WAITALL)
        served.sendall(bytes((frame[0], size)) + bytes(b ^ mask[n % 4] for n, b in enumerate(data)))
    return False


@pytest.mark.parametrize("eager", [False, True])
async def test_a_websocket_in_absolute_form(tmp_path: Path, events: Events, eager: bool) -> None:
    """The upgrade passes, frames flow both ways from the first byte on, and each side ends by its own FIN."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(websocket)
        key = base64.b64encode(b"0123456789abcdef")
        mask = b"\1\2\3\4"
        frame = b"\x81\x83" + mask + bytes(b ^ mask[n] for n, b in enumerate(b"abc"))

        def talk() -> bytes:
            browser = Browser(cluster)
            browser.send(request(
                origin.url + b"/chat", b"Upgrade: websocket", b"Connection: Upgrade, keep-alive",
                b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + key,
            ), frame if eager else b"")  # fmt: skip
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += browser.sock.recv(1)
            if not eager:
                browser.send(frame)
            browser.sock.shutdown(socket.SHUT_WR)
            assert read_all(browser.sock) == b"\x81\x05hello" + b"\x81\x03abc"
            return answer

        answer = await in_thread(talk)
        assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"Upgrade: websocket\r\n" in answer and b"Connection: Upgrade\r\n" in answer
        await cluster.until(lambda: bool(named(events, "stream_ended")))
        (line,) = named(events, "stream_ended")
        assert line["reason"] == "closed"


# --- ends -----------------------------------------------------------------------------------------------------


async def test_broken_chunks_are_told_and_do_not_pass(tmp_path: Path, events: Events) -> None:
    """A chunk end that is none: 400, and the target sees a reset, never an end."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        heard = bytearray()
        server = kept(socket.create_server(("127.1.0.1", 0)))
        url = f"http://127.1.0.1:{server.getsockname()[1]}/".encode()

        def serve() -> str:
            served = kept(server.accept()[0])
            served.settimeout(PATIENCE)
            try:
                while piece := served.recv(4096):
                    heard.extend(piece)
            except ConnectionResetError:
                return "reset"
            return "FIN"

        async with trio.open_nursery() as nursery:
            endings: list[str] = []
            nursery.start_soon(lambda: run_into(endings, serve))
            browser = await in_thread(lambda: Browser(cluster))
            browser.send(request(url, b"Transfer-Encoding: chunked", method=b"POST") + b"3\r\nabc\r\n")
            await cluster.until(lambda: b"abc\r\n" in heard)
            browser.send(b"3\r\nabcXX0\r\n\r\n" + request(url + b"smuggled"))
            response, body = await in_thread(browser.hear)
        assert response.status_code == 400 and b"illegal chunk end" in response.reason and b"illegal" in body
        assert endings == ["reset"] and b"smuggled" not in heard and b"XX" not in heard
        (line,) = named(events, "request_refused")
        assert (line["code"], line["target"]) == ("bad_request", url.decode()[7:-1])
        assert named(events, "stream_ended")[0]["reason"] == "overrun"
        await cluster.until(lambda: not (cluster.gateway.counts.clients or cluster.gateway.counts.streams))


async def run_into(results: list[str], call: Callable[[], str]) -> None:
    """Keep what a blocking call returns."""
    results.append(await in_thread(call))


async def test_a_waiting_client_is_closed_in_order(tmp_path: Path, events: Events) -> None:
    """After gateway.keep_alive, and when the gateway drains: FIN, and no line."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(says(b"ok"))
        part = await cluster.start_gateway(keep_alive=0.1)
        await cluster.whole()
        browser = await in_thread(lambda: Browser(cluster))
        assert await in_thread(lambda: browser.ask(request(origin.url))) == (200, b"ok")
        assert await in_thread(lambda: browser.sock.recv(1)) == b""
        await part.shut()
        part = await cluster.start_gateway()
        await cluster.whole()
        browser = await in_thread(lambda: Browser(cluster))
        assert await in_thread(lambda: browser.ask(request(origin.url))) == (200, b"ok")
        with trio.fail_after(PATIENCE):
            await part.shut()
        assert await in_thread(lambda: browser.sock.recv(1)) == b""
        assert not named(events, "client_lost") and not named(events, "request_refused")


@pytest.mark.parametrize("keep_alive", [0.0, 60.0])
async def test_a_client_of_http_1_0_gets_one_answer(tmp_path: Path, keep_alive: float) -> None:
    """It may not know where an answer ends: the connection says so. Nor is any kept with `gateway.keep_alive` = 0."""
    async with running_cluster(tmp_path, gateway__keep_alive=keep_alive) as cluster:
        await cluster.start(brokers=1)
        origin = Origin(says(b"ok"))
        version = b"1.0" if keep_alive else b"1.1"
        answer = await cluster.http(request(origin.url, b"Connection: keep-alive", version=version))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"\r\nConnection: close" in head and body == b"ok"
        assert origin.heads[0][b"connection"] == b"close"
