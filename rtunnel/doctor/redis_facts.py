"""Asks a Redis server about itself: latency, clock, memory policy, role and rights.

It writes nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from rtunnel.config import RegistryConfig
from rtunnel.doctor.facts import RedisFacts

#: PINGs that are timed.
PINGS: Final = 20
#: Commands of the registry's scripts that the user's ACL must allow, with an example of arguments
#: (docs/registry.md). ACL DRYRUN runs none of them.
_NEEDED: Final = (
    ("EVALSHA", "0" * 40, "0"),
    ("EVAL", "return 1", "0"),
    ("TIME",),
    ("GET", "{}:last:x"),
    ("SET", "{}:node:x", "x"),
    ("HSET", "{}:target:x", "x", "x"),
    ("XADD", "{}:changes", "*", "x", "x"),
    ("XREAD", "STREAMS", "{}:changes", "0"),
    ("PEXPIRE", "{}:node:x", "1"),
)


def collect(config: RegistryConfig) -> RedisFacts:
    """Return the facts about the server of `[registry]`; it must not be a memory registry."""
    import redis  # costs 0.1 s, which an agent's doctor need not pay

    from rtunnel.registry.redis_client import reason_of
    from rtunnel.registry.redis_url import pool_for

    try:
        url, pool, _ = pool_for(config.url, config.timeout)
    except ValueError as error:
        return RedisFacts("", error=str(error))
    client: Any = redis.Redis(connection_pool=pool)
    try:
        return _ask(client, url, config.prefix)
    except (redis.RedisError, OSError) as error:
        return RedisFacts(url, error=reason_of(error, config.timeout))
    finally:
        client.close()
        pool.disconnect()


def _ask(client: Any, url: str, prefix: str) -> RedisFacts:
    from redis.exceptions import ResponseError

    latency = []
    for _ in range(PINGS):
        began = time.monotonic()
        client.ping()
        latency.append(round((time.monotonic() - began) * 1000, 3))
    before = time.time()
    seconds, microseconds = client.time()
    offset = (before + time.time()) / 2 - (seconds + microseconds / 1e6)
    info: dict[str, Any] = {}
    with suppress(ResponseError):  # the ACL may deny it
        for section in ("server", "memory", "replication"):
            info |= client.info(section)
    return RedisFacts(
        url,
        version=str(info.get("redis_version", "")),
        latency_ms=tuple(latency),
        offset=round(offset, 3),
        role=str(info.get("role", "")),
        replicas=int(info.get("connected_slaves", 0)),
        policy=str(info.get("maxmemory_policy", "")),
        used=int(info.get("used_memory", 0)),
        most=int(info.get("maxmemory", 0)),
        denied=tuple(_denied(client, prefix)),
    )


def _denied(client: Any, prefix: str) -> list[str]:
    """Return the needed commands that the ACL denies.

    A server before 7.0 can't say, and then there are none.
    """
    from redis.exceptions import RedisError

    denied = []
    with suppress(RedisError):
        who = client.execute_command("ACL WHOAMI")
        for command, *arguments in _NEEDED:
            words = [word.replace("{}", prefix) for word in arguments]
            answer = client.execute_command("ACL DRYRUN", who, command, *words)
            if answer not in (b"OK", "OK"):
                denied.append(command)
    return denied
