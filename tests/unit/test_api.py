"""The API by itself: who may ask it, and how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import h11
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from rtunnel.api import MAX_CALLS, Answer, Api, ApiRequest, Operation
from support.logs import Events, named

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture
def events() -> Iterator[Events]:
    """What the API logs."""
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "api.token"
    path.write_text(TOKEN + "\n")
    return str(path)


def request(method: str = "GET", target: str = "/v1/wait", token: str = TOKEN) -> h11.Request:
    headers = [("Host", "x"), ("Authorization", f"Bearer {token}")]
    return h11.Request(method=method, target=target, headers=headers)


def error_of(answer: Answer) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]


LOOPBACK = ("127.0.0.1", "127.9.9.9", "::1")
OTHERS = ("10.0.0.1", "192.0.2.1", "fd00::1", "fe80::1%eth0")


@pytest.mark.parametrize(("local", "may"), [*((ip, True) for ip in LOOPBACK), *((ip, False) for ip in OTHERS)])
async def test_the_api_is_answered_on_loopback_only(local: str, may: bool, token_file: str) -> None:
    """Also with the right token: on any other address somebody could have read it."""

    async def call(asked: ApiRequest) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        return dict(asked.query)

    api = Api(
        {("GET", "/v1/wait"): Operation(call, "", dict, query={"a": "", "b": ""})}, token_file, "gateway.admin_token"
    )
    answer = await api.answer(request(target="/v1/wait?a=1&b=%20"), b"", local, "10.9.0.4")
    if may:
        assert (answer[0], json.loads(answer[2])) == (200, {"a": "1", "b": " "})
    else:
        assert error_of(answer) == (403, "the API is answered on a loopback address only: others could read the token")


async def test_so_many_calls_are_answered_at_once(token_file: str) -> None:
    """One more gets 429; when one has ended there is room again."""
    go = trio.Event()

    async def wait(asked: ApiRequest) -> str:
        await go.wait()
        return "done"

    api = Api({("GET", "/v1/wait"): Operation(wait, "", str)}, token_file, "gateway.admin_token")
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await api.answer(request(), b"", "127.0.0.1", "127.0.0.1"))[0])

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert error_of(await api.answer(request(), b"", "127.0.0.1", "127.0.0.1"))[0] == 429
        go.set()
    assert statuses == [200] * MAX_CALLS
    await ask()
    assert statuses[-1] == 200


async def test_a_fault_of_a_call_is_an_answer(token_file: str, events: Events) -> None:
    """The log has it, and the caller gets no more than that."""

    async def fails(asked: ApiRequest) -> str:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("a detail")

    api = Api({("GET", "/v1/wait"): Operation(fails, "", str)}, token_file, "gateway.admin_token")
    assert error_of(await api.answer(request(), b"", "::1", "::1")) == (500, "internal error: see the log")
    assert named(events, "api_call_failed")


async def test_denied_requests_are_throttled_in_the_log(token_file: str, events: Events) -> None:
    """Nobody fills the log by asking without the token, and the token is in no line."""
    api = Api({}, token_file, "gateway.admin_token")
    for _ in range(100):
        assert (await api.answer(request(token="wrong"), b"", "::1", "::1"))[0] == 401
    assert len(named(events, "api_request_denied")) == 1
    assert TOKEN not in json.dumps(events, default=str)
