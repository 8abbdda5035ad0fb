"""For every suite: real Redis servers, sockets that are closed in the end, and ears for secrets in logs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from support import effort, secrecy
from support.plumbing import close_kept
from support.redis_server import RedisServer

# How long an example takes depends on what else the machine does: `timeout` in pyproject.toml is the only clock.
settings.register_profile("rtunnel", deadline=None)
settings.load_profile("rtunnel")

# Without cached bytecode each of the some hundred processes of rtunnel in a run compiles all modules
# again (0.4 s), and each process of pytest-xdist compiles all tests (10 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure(config: pytest.Config) -> None:
    """Listen for secrets in logs, and set how many random examples are tried."""
    config.pluginmanager.register(secrecy, "secrecy")
    effort.load_profile()
    # A shell's background jobs ignore it, and so would the processes under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_socket_left() -> Iterator[None]:
    yield
    close_kept()


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the whole run; not to be killed. Use `redis_server`."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_session: RedisServer) -> RedisServer:
    """The run's server, empty; not to be killed."""
    with redis_session.client() as client:
        client.flushall()
    return redis_session


@pytest.fixture
def make_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Servers of the test's own, not yet started: `make_redis(tcp=True, password="x")`. Killed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> RedisServer:
            server = RedisServer(tmp_path_factory.mktemp("redis"), **options)
            stack.callback(server.kill)
            return server

        yield make
