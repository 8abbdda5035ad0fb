"""The API at a role's admin address: the paths under `/v1/`, which need a token.

Health and metrics are open to everybody who reaches the address (`admin`). The API says more and
does more, so a request must have the token of the role's `admin_token` file, and its connection
must end at a loopback address, where nobody else can read the token.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

import h11
import msgspec
import trio

from rtunnel import __version__, logs
from rtunnel.errors import TrustError
from rtunnel.trust.keys import load_api_token

#: The prefix of the API's paths.
PREFIX: Final = "/v1/"
#: Bytes of a request's body.
MAX_BODY: Final = 16 * 1024
#: Seconds for an answer: a trace takes up to `dial_timeout` (15 s by default).
DEADLINE: Final = 90.0
#: Requests that are answered at once; with more of them the answer is 429.
MAX_CALLS: Final = 8

#: An answer: status, content type, body.
Answer = tuple[int, str, bytes]

log = logs.get_logger("api")


class Problem(msgspec.Struct, frozen=True):
    """The answer to a request that has failed."""

    error: str


class BadRequest(Exception):
    """A request asks for something that can't be understood; the text names the fault."""


@dataclass(frozen=True)
class ApiRequest:
    """One request, whose token was right."""

    query: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Operation:
    """One method of one path: the call, and what its description says.

    `call` returns a value of the type `answer`, or raises BadRequest. `body`: the type of the
    request's body; None: it has none. `query`: what each parameter means; others are refused.
    """

    call: Callable[[ApiRequest], Awaitable[object]]
    summary: str
    answer: type
    body: type | None = None
    query: Mapping[str, str] = field(default_factory=dict)


def error_answer(status: int, text: str) -> Answer:
    """Return an answer that says what is wrong."""
    return _answer(status, {"error": text})


def _answer(status: int, value: object) -> Answer:
    return status, "application/json", msgspec.json.encode(value, enc_hook=str) + b"\n"


@dataclass
class Api:
    """The operations at one admin address, by method ("GET", "POST") and path. In trio's thread.

    `token_file`: the file with
    the token; "": the API is off. It is read for each request, so that a changed token is in force
    at once. `key`: the name of that file's key in the configuration.
    """

    operations: Mapping[tuple[str, str], Operation]
    token_file: str
    key: str
    _running: int = field(default=0, init=False)
    _throttle: logs.Throttle = field(default_factory=logs.Throttle, init=False)

    async def answer(self, request: h11.Request, body: bytes, local: str, peer: str) -> Answer:
        """Return the answer to a request; `local` and `peer`: the connection's IPs."""
        path, _, query = request.target.decode("ascii", "replace").partition("?")
        if (denied := self._denied(request, local)) is not None:
            others = self._throttle.others(str(denied[0]), trio.current_time())
            if others is not None:
                log.warning("api_request_denied", peer=peer, path=path, status=denied[0], others_since=others)
            return denied
        operation = self.operations.get((request.method.decode("ascii", "replace"), path))
        if operation is None:
            known = ", ".join(f"{method} {at}" for method, at in self.operations)
            return error_answer(405 if any(at == path for _, at in self.operations) else 404, f"the API has {known}")
        if self._running >= MAX_CALLS:
            return error_answer(429, f"{MAX_CALLS} requests are being answered: try again later")
        self._running += 1
        try:
            asked = ApiRequest(dict(parse_qsl(query, keep_blank_values=True)), body)
            if unknown := asked.query.keys() - operation.query.keys():
                raise BadRequest(f"{path} has no parameter {min(unknown)!r}")
            return _answer(200, await operation.call(asked))
        except BadRequest as error:
            return error_answer(400, str(error))
        except Exception:
            log.exception("api_call_failed", path=path)
            return error_answer(500, "internal error: see the log")
        finally:
            self._running -= 1

    def description(self, title: str) -> dict[str, object]:
        """Return the description of the API (OpenAPI 3.1.0)."""
        types = {operation.answer for operation in self.operations.values()} | {Problem}
        types |= {operation.body for operation in self.operations.values() if operation.body is not None}
        ordered = sorted(types, key=lambda kind: kind.__name__)
        refs, schemas = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
        ref = dict(zip(ordered, refs, strict=True))
        paths: dict[str, dict[str, object]] = {}
        for (method, path), operation in self.operations.items():
            paths.setdefault(path, {})[method.lower()] = _described(operation, ref)
        return {
            "openapi": "3.1.0",
            "info": {"title": title, "version": __version__},
            "security": [{"token": []}],
            "paths": paths,
            "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        }

    def _denied(self, request: h11.Request, local: str) -> Answer | None:
        """Return the answer to a request that may not ask; None when it may."""
        if not self.token_file:
            return error_answer(403, f"the API is off: write {self.key} = the path of a file with a token")
        if not ipaddress.ip_address(local.partition("%")[0]).is_loopback:
            return error_answer(403, "the API is answered on a loopback address only: others could read the token")
        try:
            token = load_api_token(self.token_file)
        except TrustError as error:
            log.error("api_token_rejected", reason=str(error))
            return error_answer(503, f"the file of {self.key} can't be used: see the log")
        given = dict(request.headers).get(b"authorization", b"")
        scheme, _, word = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(word.strip(), token.encode()):
            return error_answer(401, f"the request needs the token of {self.key}: Authorization: Bearer <token>")
        return None


def _described(operation: Operation, ref: Mapping[type, object]) -> dict[str, object]:
    described: dict[str, object] = {
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in operation.query.items()
        ],
        "responses": {
            "200": {"description": "the answer", "content": _content(ref[operation.answer])},
            "default": {"description": "the request has failed", "content": _content(ref[Problem])},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(ref[operation.body])}
    return described


def _content(schema: object) -> dict[str, object]:
    return {"application/json": {"schema": schema}}
