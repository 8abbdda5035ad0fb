"""The command `rtunnel trace`: asks a gateway to dial a target, and says what each hop saw."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from rtunnel import config
from rtunnel.api_client import ask
from rtunnel.console import Failure, config_option, json_option, plural, print_json, report_errors
from rtunnel.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from rtunnel.logs import printable
from rtunnel.trust.keys import load_api_token

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
@json_option
@config_option
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
        report = ask(gateway or section.admin, load_api_token(path), "POST", "/v1/trace", asked)
    if as_json:
        print_json(report)
    else:
        for line in _lines(report):
            click.echo(printable(line))
    sys.exit(EXIT_OK if report["code"] == "accepted" else EXIT_FAILED)


# --- the report as text ---------------------------------------------------------------------------


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['target']} in {report['namespace']}, for {report['client']}, by the gateway {report['gateway']}"
    yield f"  rule      {report['rule'] or 'none'}: {'allowed' if report['allowed'] else 'not allowed'}"
    age = "never read" if report["table_age"] is None else f"{report['table_age']:.1f} s old"
    yield f"  routes    {plural(len(report['ways']), 'path')}; the table is {age}; registry: {report['registry']}"
    for refused in report.get("recent", ()):
        yield f"  refused   {refused['at']:.0f} s ago: {refused['code']}: {refused['text']}"
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
        link += f", TCP sends again ({hop['resending']} times)" if hop.get("resending") else ""
        link += f"; {hop['silent']} of {plural(hop['sessions'], 'session')} silent" if hop.get("silent") else ""
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
    failed += f"; not ready: {hop['doubt']}" if hop.get("doubt") else ""
    return f"{hop['agent']} connects to {hop['way']}{own}{source}{out} in {hop['connect'] * 1000:.1f} ms{failed}"
