"""Asks the API of a role's admin address, for commands."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from rtunnel.api import DEADLINE
from rtunnel.config import format_endpoint, parse_endpoint
from rtunnel.console import Failure
from rtunnel.errors import EXIT_USAGE

#: Bytes of an answer that are read: a report of six paths has some 8 KiB, 1000 streams 400 KiB.
MAX_ANSWER: Final = 4 * 1024 * 1024
#: Seconds to connect to an admin address.
CONNECT_SECONDS: Final = 5.0


def ask(address: str, token: str, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Return the answer of the process at this admin address to a request.

    At a supervisor's address the first worker that answers is asked. `body` is sent as JSON. Raises
    Failure, which names the address and the reason.
    """
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = b"" if body is None else msgspec.json.encode(body)
    status, answer = _call(address, method, path, data, headers)
    if status == http.client.NOT_FOUND and (worker := _worker_of(address)):
        status, answer = _call(worker, method, path, data, headers)
    if status != http.client.OK or not isinstance(answer, dict):
        reason = answer.get("error", "") if isinstance(answer, dict) else ""
        raise Failure(f"{address} answers {status} to {method} {path.partition('?')[0]}: {reason}", EXIT_USAGE)
    return answer


def _worker_of(address: str) -> str:
    _, status = _call(address, "GET", "/statusz", b"", {})
    workers = status.get("workers", []) if isinstance(status, dict) else []
    return next((str(worker["admin"]) for worker in workers if "role" in worker), "")


def _call(address: str, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Any]:
    try:
        host, port = parse_endpoint(address)
    except ValueError as error:
        raise Failure(f"{address!r} is not an admin address: {error}", EXIT_USAGE) from None
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(DEADLINE)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"the admin address {format_endpoint(host, port)} can't be asked: {error}", EXIT_USAGE) from None
    finally:
        connection.close()
    try:
        return answer.status, msgspec.json.decode(data)
    except msgspec.DecodeError:
        return answer.status, {"error": data[:200].decode("utf-8", "replace").strip()}
