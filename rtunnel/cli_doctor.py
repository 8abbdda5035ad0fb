"""The command `rtunnel doctor`: finds what is wrong with a machine or with the whole cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from rtunnel import config
from rtunnel.config import Config
from rtunnel.console import Failure, config_option, json_option, print_json, report_errors
from rtunnel.doctor import bundle as bundles
from rtunnel.doctor import checks, cluster, machine
from rtunnel.doctor.cluster import Cluster
from rtunnel.doctor.facts import Machine
from rtunnel.doctor.findings import Finding, Level, in_order
from rtunnel.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE

#: Facts that `--json` leaves out.
_UNPRINTED: Final = ("config", "tuples")

_EXAMPLES = """
\b
Examples:
  rtunnel doctor --config /etc/rtunnel.toml                 the roles that the file configures
  rtunnel doctor --role agent --config /etc/rtunnel.toml    one of them, also with variables only
  rtunnel doctor --cluster --config /etc/rtunnel.toml       nodes, agents, gateways, registry
  rtunnel doctor --role agent --bundle host-7.tar.gz --log /var/log/rtunnel-agent.log
  rtunnel doctor --json | jq -r '.findings[] | select(.level == "FAIL") | .text'

\b
Run it as the role's user, on the role's machine: it reads the same files, and connects as the role.
Exit codes: 0 no FAIL, 1 at least one FAIL, 2 wrong usage or configuration.
"""


@click.command(epilog=_EXAMPLES)
@click.option("--role", type=click.Choice(config.ROLES), help="The role to look at; default: those in the file.")
@click.option(
    "--cluster", "whole", is_flag=True, help="Look at the whole cluster, through the registry, instead of this machine."
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write findings, facts, configuration and versions to this tar.gz file, without a secret.",
)
@click.option(
    "--log",
    "logs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Put the last lines of this log into the bundle; repeatable.",
)
@json_option
@config_option
def doctor(
    role: str | None, whole: bool, bundle: Path | None, logs: tuple[Path, ...], as_json: bool, config_file: Path | None
) -> None:
    """Find out what is wrong with this machine, or with the cluster.

    The doctor looks at addresses, routes, the way to the brokers, the clock, ports, descriptors,
    certificates, Redis and the running role, and prints one line for each finding: FAIL, WARN or
    OK, with the fix. It changes nothing and registers nothing.

    With --cluster it compares what the registry, the nodes and the gateways say: dead nodes, agents
    below 2/2, addresses claimed twice, ports, clocks, old tables, namespaces and loops.
    """
    with report_errors():
        if logs and bundle is None:
            raise Failure("--log is given, and has no effect without --bundle: give both", EXIT_USAGE)
        loaded = config.load(config_file, os.environ, {})
        findings, facts = _look_at_cluster(role, loaded) if whole else _look_here(role, loaded)
    _print(findings, facts, as_json)
    if bundle is not None:
        _write_bundle(bundle, loaded, findings, facts, logs)
    sys.exit(_exit_code(findings))


def _write_bundle(
    path: Path, loaded: Config, findings: list[Finding], facts: dict[str, Any], logs: tuple[Path, ...]
) -> None:
    try:
        bundles.write(path, loaded, findings, facts, logs)
    except bundles.BundleError as error:
        raise Failure(f"--bundle: {error}", EXIT_USAGE) from None
    click.echo(f"{path}: written; look through it before you pass it on: it has addresses and names", err=True)


def _look_here(role: str | None, loaded: Config) -> tuple[list[Finding], dict[str, Any]]:
    facts = [machine.collect(loaded, name) for name in _roles(role, loaded)]
    findings = in_order(finding for each in facts for finding in checks.judge(each))
    return findings, {"roles": [_as_json(each) for each in facts]}


def _look_at_cluster(role: str | None, loaded: Config) -> tuple[list[Finding], dict[str, Any]]:
    if role is not None:
        raise Failure("--cluster and --role are given: leave one of them out", EXIT_USAGE)
    try:
        facts = cluster.collect(loaded)
    except ValueError as error:
        raise Failure(str(error), EXIT_USAGE) from None
    return cluster.judge(facts), {"cluster": _as_json(facts)}


def _roles(role: str | None, loaded: Config) -> list[str]:
    found = [role] if role else machine.roles_of(loaded)
    if not found:
        raise Failure("no role is given: give --role, or --config with the file of a role", EXIT_USAGE)
    return found


def _print(findings: list[Finding], facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"findings": findings, **facts})
        return
    for finding in findings:
        click.echo(finding.line)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    click.echo(", ".join(f"{count} {level}" for level, count in counts.items()))


def _as_json(facts: Machine | Cluster) -> dict[str, Any]:
    """Return the facts without the configuration, and without the tuples, of which there may be a
    million (`rtunnel status --json --all`).
    """
    return {name: getattr(facts, name) for name in facts.__dataclass_fields__ if name not in _UNPRINTED}


def _exit_code(findings: list[Finding]) -> int:
    return EXIT_FAILED if any(finding.level is Level.FAIL for finding in findings) else EXIT_OK
