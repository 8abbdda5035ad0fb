"""Parses the URL of a Redis server, and makes redis-py's pool of connections for it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

_SENTINEL = "redis+sentinel"
_SCHEMES = ("redis", "rediss", "unix", _SENTINEL)
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")


def pool_for(url: str, timeout: float) -> tuple[str, ConnectionPool, list[Any]]:
    """Return the URL without its password, a connection pool, and its sentinels' clients.

    `timeout` is in seconds. Raises ValueError for a URL that cannot be right.
    """
    try:
        return _parse(url, timeout)
    except ValueError as error:
        # `from None`: the cause could quote the URL, and the password in it.
        raise ValueError(f"[registry] url can't be used: {error}; write it as redis://:password@host:6379/0") from None


def _parse(url: str, timeout: float) -> tuple[str, ConnectionPool, list[Any]]:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"scheme {parts.scheme!r} is not one of memory, {', '.join(_SCHEMES)}")
    options: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    common: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,  # the pool notices closed connections; a PING doubles the wait
        "protocol": 2,
    }
    login, _, place = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    kwargs = common | {
        "username": unquote(user) or options.pop("username", None),
        "password": unquote(password) or options.pop("password", None),
    }
    public = f"{parts.scheme}://{user + '@' if user else ''}{place}{parts.path}"
    if parts.scheme == "unix":
        return public, _unix(parts.path, options, kwargs), []
    if parts.scheme == _SENTINEL:
        pool, sentinels = _sentinel(place, parts.path, options, common, kwargs)
        return public, pool, sentinels
    kwargs["host"], kwargs["port"] = _host(place, 6379)
    kwargs["db"] = _db(parts.path.strip("/") or options.pop("db", ""))
    kind: type[Connection] = Connection
    if parts.scheme == "rediss":
        kind = SSLConnection
        kwargs |= {name: options.pop(name) for name in _TLS_OPTIONS if name in options}
        if "ssl_check_hostname" in kwargs:
            kwargs["ssl_check_hostname"] = kwargs["ssl_check_hostname"].lower() in ("1", "true", "yes")
    _reject_rest(options)
    return public, ConnectionPool(connection_class=kind, **kwargs), []


def _unix(path: str, options: dict[str, Any], kwargs: dict[str, Any]) -> ConnectionPool:
    if not path.strip("/"):
        raise ValueError("unix:// needs the path of a socket, as unix:///run/redis.sock?db=0")
    kwargs |= {"path": unquote(path), "db": _db(options.pop("db", ""))}
    _reject_rest(options)
    return ConnectionPool(connection_class=UnixDomainSocketConnection, **kwargs)


def _sentinel(
    place: str, path: str, options: dict[str, Any], common: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[ConnectionPool, list[Any]]:
    service, _, db = path.strip("/").partition("/")
    if not service:
        raise ValueError(f"{_SENTINEL}:// needs the service, as {_SENTINEL}://host:26379,host:26379/mymaster/0")
    hosts = [_host(host, 26379) for host in place.split(",")]
    kwargs["db"] = _db(db)
    # They are asked one after the other, and all of them together may take one timeout.
    patience = max(0.1, common["socket_timeout"] / len(hosts))
    asking = common | {"socket_timeout": patience, "socket_connect_timeout": patience}
    for name in ("username", "password"):
        if f"sentinel_{name}" in options:
            asking[name] = options.pop(f"sentinel_{name}")
    _reject_rest(options)
    untyped: Any = Sentinel
    manager = untyped(hosts, sentinel_kwargs=asking)
    untyped = SentinelConnectionPool
    return untyped(service, manager, **kwargs), list(manager.sentinels)


def _host(place: str, port: int) -> tuple[str, int]:
    found = urlsplit(f"//{place}")
    if not found.hostname:
        raise ValueError("the host is missing")
    return found.hostname, found.port or port


def _db(text: str) -> int:
    if text and not text.isdecimal():
        raise ValueError(f"database {text!r} is not a number")
    return int(text or 0)


def _reject_rest(options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"{', '.join(sorted(options))} is not a known option")
