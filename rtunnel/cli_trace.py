"""The command `rtunnel trace`: asks a gateway to dial a target, and says what each hop saw."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from rtunnel import config
from rtunnel.api import DEADLINE
from rtunnel.config import format_endpoint, parse_endpoint
from rtunnel.console import Failure, plural, print_json, report_errors
from rtunnel.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from rtunnel.logs import printable
from rtunnel.trust.keys import load_api_token

#: Bytes of an answer that are read: a report of six paths has some 8 KiB.
MAX_ANSWER: Final = 4 * 1024 * 1024
#: Seconds to connect to the gateway's admin address.
CONNECT_SECONDS: Final = 5.0

_EXAMPLES = """
\b
Examples:
  rtunnel trace 10.1.0.7:22 --config /etc/rtunnel.toml      on the gateway's machine
  rtunnel trace 10.1.0.7:22 --as alice@10.9.0.4             may alice, and does it work for her?
  rtunnel trace 10.1.0.7:22 --json | jq -r .cause

\b
Exit codes: 0 the target is reached, 1 it is not, 2 the gateway can't be asked.
"""


@click.command(epilog=_EXAMPLES)
@click.argument("target", metavar="IP:PORT")
@click.option("--as", "client", metavar="[USER@]IP", default="127.0.0.1", show_default=True, help="For which client.")
@click.option("--gateway", metavar="HOST:PORT", help="The gateway's admin address; default: gateway.admin.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file with the API's token; default: gateway.admin_token.",
)
@click.option("--namespace", default="", help="The target's namespace; default: the gateway's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    envvar="RTUNNEL_CONFIG",
    help="Configuration file (TOML) of the gateway; also $RTUNNEL_CONFIG.",
)
def trace(
    target: str,
    client: str,
    gateway: str | None,
    token_file: Path | None,
    namespace: str,
    as_json: bool,
    config_file: Path | None,
) -> None:
    """Find out why IP:PORT is not reached.

    The gateway dials the target by every path at once, as it would for the client, and each hop
    says what it sees. Then CAUSE names the fault, and DO the next step. The trace obeys the policy
    and the limits of the client, and stands in the gateway's log (trace_ended).
    """
    with report_errors():
        section = config.load(config_file, os.environ, {}).gateway
        path = token_file or (Path(section.admin_token) if section.admin_token else None)
        if path is None:
            raise Failure("no token is given: give --token-file, or --config with gateway.admin_token", EXIT_USAGE)
        user, _, source = client.rpartition("@")
        asked = {"target": target, "user": user, "source": source, "namespace": namespace}
        report = _ask(gateway or section.admin, load_api_token(path), asked)
    if as_json:
        print_json(report)
    else:
        for line in _lines(report):
            click.echo(printable(line))
    sys.exit(EXIT_OK if report["code"] == "accepted" else EXIT_FAILED)


def _ask(address: str, token: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return the report of the gateway at this admin address. Raises Failure."""
    status, answer = _post(address, token, "/v1/trace", asked)
    if status == http.client.NOT_FOUND:  # a supervisor: one of its workers can do it
        status, answer = _post(_worker_of(address), token, "/v1/trace", asked)
    if status != http.client.OK:
        reason = answer.get("error", "") if isinstance(answer, dict) else ""
        raise Failure(f"the gateway at {address} answers {status}: {reason}", EXIT_USAGE)
    assert isinstance(answer, dict)
    return answer


def _worker_of(address: str) -> str:
    _, status = _call(address, "GET", "/statusz", b"", {})
    workers = status.get("workers", []) if isinstance(status, dict) else []
    found = next((str(worker["admin"]) for worker in workers if worker.get("role") == "gateway"), "")
    if not found:
        raise Failure(f"{address} is not the admin address of a gateway that can trace", EXIT_USAGE)
    return found


def _post(address: str, token: str, path: str, body: Mapping[str, str]) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return _call(address, "POST", path, msgspec.json.encode(body), headers)


def _call(address: str, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Any]:
    try:
        host, port = parse_endpoint(address)
    except ValueError as error:
        raise Failure(f"--gateway: {error}", EXIT_USAGE) from None
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(DEADLINE)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        where = format_endpoint(host, port)
        raise Failure(f"the gateway's admin address {where} can't be asked: {error}", EXIT_USAGE) from None
    finally:
        connection.close()
    try:
        return answer.status, msgspec.json.decode(data)
    except msgspec.DecodeError:
        return answer.status, {"error": data[:200].decode("utf-8", "replace").strip()}


# --- the report as text ---------------------------------------------------------------------------


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['target']} in {report['namespace']}, for {report['client']}, by the gateway {report['gateway']}"
    yield f"  rule      {report['rule'] or 'none'}: {'allowed' if report['allowed'] else 'not allowed'}"
    age = "never read" if report["table_age"] is None else f"{report['table_age']:.1f} s old"
    yield f"  routes    {plural(len(report['ways']), 'path')}; the table is {age}; registry: {report['registry']}"
    ways = {(way["node"], way["epoch"]): way for way in report["ways"]}
    for attempt in report["attempts"]:
        yield from _attempt_lines(attempt, ways.get((attempt["node"], attempt["epoch"])), report["time"])
    yield f"RESULT  {report['code']}" + (f": {report['text']}" if report["text"] else "")
    yield f"CAUSE   {report['cause'] or 'nothing is wrong: the target is reached by every path'}"
    if report["do"]:
        yield f"DO      {report['do']}"


def _attempt_lines(attempt: Mapping[str, Any], way: Mapping[str, Any] | None, now: float) -> Iterator[str]:
    node = attempt["node"]
    yield f"  path      {node} at {attempt['ps']}, agent {attempt['agent']}, epoch {attempt['epoch']}{_state(way)}"
    if attempt.get("connect_ms") is not None:
        yield f"    connect   {attempt['connect_ms']:.1f} ms"
    if (hop := attempt.get("broker")) is not None:
        link = (
            f"link of {hop['agent']} from {hop['peer']}, round trip {hop['rtt'] * 1000:.1f} ms, last byte "
            f"{hop['silence']:.1f} s ago, {plural(hop['streams'], 'stream')}"
            if hop["agent"]
            else "no session on that port"
        )
        yield f"    broker    {link}; clock {hop['time'] / 1000 - now:+.1f} s; version {hop['software']}"
    if (hop := attempt.get("at_agent")) is not None:
        yield f"    agent     {_way_of(hop)}; clock {hop['time'] / 1000 - now:+.1f} s; version {hop['software']}"
    proof = f", proof {attempt['proof']}" if attempt.get("proof") else ""
    text = f": {attempt['text']}" if attempt.get("text") else ""
    yield f"    result    {attempt['code']} after {attempt['ms']:.1f} ms ({attempt['phase']}{proof}){text}"


def _state(way: Mapping[str, Any] | None) -> str:
    if way is None:
        return ""
    age = way["heartbeat_age"]
    beat = "" if age is None else f", heartbeat {age:.1f} s ago"
    return f"; node {way['state']}{beat}" + ("; did not answer lately" if way["suspect"] else "")


def _way_of(hop: Mapping[str, Any]) -> str:
    if not hop["way"]:
        return f"{hop['agent']} has refused the Dial"
    own = ", its own address" if hop["local"] else ""
    out = f" through {hop['interface']}" if hop["interface"] else ""
    source = f" from {hop['source']}" if hop["source"] else ""
    failed = f", {hop['errno']}" if hop["errno"] else ""
    return f"{hop['agent']} connects to {hop['way']}{own}{source}{out} in {hop['connect'] * 1000:.1f} ms{failed}"
