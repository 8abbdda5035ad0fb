"""Sends commands and scripts to Redis, and maps each failure to `RegistryUnavailable`.

redis-py supplies connections, the pool, TLS and Sentinel. Commands are sent here, one exchange at a
time, so that timeouts, the single retry and the mapping of errors stand in one place (`_exchange`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from redis import exceptions as errors

from rtunnel.errors import RegistryUnavailable, Superseded
from rtunnel.logs import get_logger
from rtunnel.registry.redis_url import pool_for

# The server's clock is read again after this many seconds. Meanwhile the two clocks drift apart by
# some milliseconds.
CLOCK_SECONDS = 10.0
# Seconds in which the same faulty key is not logged again, and the number of keys remembered for
# it.
LOG_AGAIN = 60.0
MAX_LOGGED = 1000

_log = get_logger("registry")


class WrongType(RegistryUnavailable):
    """A key is of another type than docs/registry.md says."""


class LateCall(Exception):
    """The server received a call after its deadline, and did not run it."""


class Script:
    """A Lua script, and the hash under which Redis caches it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class RedisClient:
    """One process's connections to a Redis server, one for each thread that is in a call.

    `timeout`: seconds that each command may take. `arguments` go before those of each script.
    `clock` returns monotonic seconds. Raises ValueError for a URL that cannot be right.
    """

    def __init__(
        self, url: str, timeout: float, arguments: tuple[Any, ...], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url, self._pool, self._sentinels = pool_for(url, timeout)
        self._timeout = timeout
        self._arguments = arguments
        self._closed = False
        self._monotonic = clock
        # Our time, and the server's at that time or later.
        self._clock: tuple[float, float] | None = None
        # Faulty keys, and the time until which they are not logged.
        self._logged: dict[str, float] = {}

    def ping(self) -> None:
        """Raise RegistryUnavailable when the server does not answer."""
        self._command("PING")

    def close(self) -> None:
        """Close all connections. Later calls raise RegistryUnavailable."""
        self._closed = True
        self._pool.disconnect()
        for sentinel in self._sentinels:
            sentinel.connection_pool.disconnect()

    def _command(self, *command: Any) -> Any:
        return self._exchange(command)[0]

    def _write(self, script: Script, *args: Any) -> Any:
        """Run a script that does nothing when it begins after this caller has given up.

        A server that is frozen keeps commands in its buffers, also after their connection was
        closed. A START that then runs last would take the node_id from the process that uses it by
        then.
        """
        for _ in range(2):
            try:
                return self._run(script, *args, not_after=f"{self._server_time() + self._timeout + 0.1:.3f}")
            except LateCall:
                self._clock = None  # the clock stepped forward, or this is another server
        text = (
            f"the server's clock jumps, or a call takes more than {self._timeout:g} s to reach it: "
            "check the clock, or raise [registry] timeout"
        )
        raise RegistryUnavailable(f"registry {self.url}: {text}")

    def _server_time(self) -> float:
        """Return seconds by the server's clock: never less, and at most one round trip more."""
        now = self._monotonic()
        clock = self._clock
        if clock is None or now - clock[0] > CLOCK_SECONDS:
            clock = self._clock = now, float(seconds_of(self._command("TIME")))
        return clock[1] + self._monotonic() - clock[0]

    def _run(self, script: Script, *args: Any, not_after: str = "") -> Any:
        args = (0, *self._arguments, not_after, *args)
        try:
            answer, faulty = self._command("EVALSHA", script.sha, *args)
        except errors.NoScriptError:  # after a restart of the server, or a failover
            answer, faulty = self._command("EVAL", script.source, *args)
        if faulty:
            self._log_faulty_keys(faulty)
        return answer

    def _log_faulty_keys(self, faulty: list[bytes]) -> None:
        """Log the keys that a script could not use, each at most once in `LOG_AGAIN` seconds."""
        now = self._monotonic()
        for key in (name.decode(errors="replace") for name in faulty):
            if self._logged.get(key, 0.0) <= now:
                if len(self._logged) >= MAX_LOGGED:
                    self._logged.clear()
                self._logged[key] = now + LOG_AGAIN
                _log.warning("registry_key_ignored", registry=self.url, key=key, reason=_WRONG_KEY)

    def _exchange(self, *commands: tuple[Any, ...], wait: float = 0.0) -> list[Any]:
        """Send the commands together and return their replies.

        `wait`: seconds that the last command may take beyond the timeout. When a pooled connection
        turns out to be broken (the server restarted), the commands are sent once more on a new one:
        every command here may run twice. A connection that is refused or slow is not tried again,
        which would only double the wait.
        """
        if self._closed:
            raise RegistryUnavailable(f"registry {self.url}: this client was closed")
        for attempt in (1, 2):
            try:
                connection: Any = self._pool.get_connection()
            except (errors.RedisError, OSError) as error:
                raise self._unavailable(error) from error
            try:
                return _converse(connection, commands, wait and wait + self._timeout)
            except errors.NoScriptError:
                raise
            except (errors.ConnectionError, OSError) as error:
                if attempt == 2 or isinstance(error, (errors.AuthenticationError, errors.BusyLoadingError)):
                    raise self._unavailable(error) from error
            except errors.ResponseError as error:
                raise self._refused(str(error)) or self._unavailable(error) from error
            except errors.RedisError as error:
                raise self._unavailable(error) from error
            finally:
                if self._closed:
                    connection.disconnect()
                self._pool.release(connection)
        raise AssertionError("unreachable")

    def _refused(self, text: str) -> Exception | None:
        """Return the exception for an error that one of our scripts raised, or None."""
        if "SUPERSEDED" in text:
            return Superseded(f"this node was started again elsewhere ({text})")
        if "LATE call" in text:
            return LateCall(text)
        if "POISONED" in text:
            key = text.rpartition("POISONED ")[2]
            fix = f'stop any other process with this node_id, then delete the key (redis-cli DEL "{key}")'
            return RegistryUnavailable(f"registry {self.url}: the key {key} holds no incarnation (below 2^32); {fix}")
        if "WRONGTYPE" in text:
            return WrongType(f"registry {self.url}: {reason_of(errors.ResponseError(text), self._timeout)}")
        return None

    def _unavailable(self, error: Exception) -> RegistryUnavailable:
        self._clock = None  # the next answer may come from another server
        return RegistryUnavailable(f"registry {self.url}: {reason_of(error, self._timeout)}")


def _converse(connection: Any, commands: tuple[tuple[Any, ...], ...], wait: float) -> list[Any]:
    """Send the commands and return their replies.

    Closes the connection when an exchange is left unfinished: its next reply would belong to this
    one.
    """
    replies: list[Any] = []
    failure: errors.ResponseError | None = None
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        if wait and not connection.can_read(wait):
            raise errors.TimeoutError("no reply to a blocking read")
        for _ in commands:
            try:
                replies.append(connection.read_response())
            except errors.ResponseError as error:
                failure = failure or error
    except BaseException:
        connection.disconnect()
        raise
    if failure is not None:
        if "READONLY" in str(failure):  # not the master now: a new connection asks the sentinels
            connection.disconnect()
            raise errors.ConnectionError(str(failure)) from failure
        raise failure
    return replies


# Why a script ignores a key, and what to do.
_WRONG_KEY = (
    "it has another type, or holds nonsense: find the program that writes it (docs/registry.md), then delete it"
)
# Errors of a server that answers reads and refuses writes, and what to do.
_REFUSED_WRITES = {
    "NOREPLICAS": "it takes no writes until enough replicas are connected: check min-replicas-to-write",
    "MISCONF": "it takes no writes because it can't save to disk: check its log, its disk and its save configuration",
    "WRONGTYPE": "a key " + _WRONG_KEY.removeprefix("it "),
}


def reason_of(error: Exception, timeout: float) -> str:
    """Return what went wrong, and what to do about it. `timeout` is in seconds."""
    text = str(error) or type(error).__name__
    if isinstance(error, errors.TimeoutError):
        return f"no answer within {timeout:g} s; check the load of the server, or raise [registry] timeout"
    if isinstance(error, errors.AuthenticationError):
        return f"{text}; give the right password in [registry] url, as redis://[user]:password@host:port"
    if isinstance(error, errors.NoPermissionError):
        return f"{text}; the user's ACL must allow the commands and keys of docs/registry.md"
    if isinstance(error, errors.OutOfMemoryError) or "OOM" in text:
        return f"{text}; raise the server's maxmemory"
    if isinstance(error, errors.ReadOnlyError) or "READONLY" in text:
        return f"{text}; [registry] url must name the master, or the sentinels"
    for word, fix in _REFUSED_WRITES.items():
        if word in text:
            return f"{text}; {fix}"
    if isinstance(error, errors.BusyLoadingError):
        return f"{text}; wait until the server has loaded its data"
    if isinstance(error, (errors.ConnectionError, OSError)):
        return f"{text.rstrip('.')}; check that the server runs and that [registry] url is right"
    return f"{text}; the server refused a command: rtunnel needs Redis 6.2 or later"


def seconds_of(reply: list[bytes]) -> str:
    """Return the reply to TIME as seconds, rounded down to the millisecond."""
    return f"{int(reply[0])}.{int(reply[1]) // 1000:03d}"
