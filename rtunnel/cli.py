"""The command `rtunnel`: its groups, flags and output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import msgspec
from click.shell_completion import get_completion_class

from rtunnel import __version__, cli_cluster, cli_events, config, roles, workers
from rtunnel.api_client import ask
from rtunnel.cli_doctor import doctor
from rtunnel.cli_pki import pki_group
from rtunnel.cli_trace import trace
from rtunnel.config import Config, Flag
from rtunnel.console import Failure, config_option, json_option, plural, print_json, print_table, report_errors
from rtunnel.errors import EXIT_FAILED, EXIT_USAGE, RoleMissing
from rtunnel.logs import printable
from rtunnel.registry import Duplicate, GatewayRecord, NodeRecord, Registry, Snapshot, Tuple, connect
from rtunnel.trust import policy, users
from rtunnel.trust.keys import load_api_token
from rtunnel.trust.policy import Policy, Question, Verdict

#: Agents that `rtunnel status` shows without --all.
SHOWN_AGENTS = 50
#: The exit code by convention, 128 + SIGINT.
EXIT_INTERRUPTED = 130

_EXAMPLES = """
\b
Examples:
  rtunnel demo                                 all parts on this machine, to look at
  rtunnel pki init ./pki                       keys and certificates of a new cluster
  rtunnel authority --directory ./pki          gives agents certificates, and says what is revoked
  rtunnel broker --config /etc/rtunnel.toml
  rtunnel pki token create --dir ./pki --cidr 10.1.0.7/32 --file host-7.token
  rtunnel agent --brokers vip.example:7000 --exposes 9100 --ca ca.pem --identity host-7 --join-token host-7.token
  rtunnel gateway --listen 0.0.0.0:1080 --registry-url redis://10.0.0.5/0 --key gateway.key --ca ca.pem
  rtunnel user add alice --file users
  rtunnel policy test --file policy.toml --user alice --from 10.9.0.4 10.1.0.7:22
  rtunnel resolve 10.1.0.7:9100                through which brokers is it reached?
  rtunnel trace 10.1.0.7:9100                  why is it not reached?
  rtunnel doctor --config /etc/rtunnel.toml    what is wrong with this machine?
  rtunnel config check /etc/rtunnel.toml --role broker

\b
Every key of the configuration file is also a variable, RTUNNEL_<SECTION>_<KEY>; flags override both.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 an address can't be listened on.
"""


def main() -> None:
    """Run the command, and exit with its code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    # `rtunnel status | head`: nobody wants the rest, nor a traceback when stdout is closed.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code if isinstance(code, int) else 0)


# --- flags from the keys of the configuration -----------------------------------------------------

_COMMON = ("registry.url", "registry.prefix", "log.level", "log.format")


def _config_option() -> click.Option:
    return click.Option(
        ["--config", "config_file"],
        type=click.Path(path_type=Path),
        envvar="RTUNNEL_CONFIG",
        help="Configuration file (TOML); also $RTUNNEL_CONFIG.",
    )


def _flag(path: str, prefixed: bool) -> str:
    section, _, name = path.partition(".")
    return "--" + (f"{section}-{name}" if prefixed else name).replace(".", "-").replace("_", "-")


def _flags(paths: Sequence[str], prefixed: bool) -> Iterator[click.Option]:
    for path in paths:
        leaf = config.KEYS[path]
        flag = _flag(path, prefixed)
        default = "" if leaf.default in ("", []) else f"  [{leaf.default}]"
        more = "; repeatable" if leaf.is_list else ""
        yield click.Option(
            [flag, _parameter(path)],
            metavar=(leaf.key.unit or "text").upper().replace(" ", "_"),
            multiple=leaf.is_list,
            help=f"{leaf.key.help}{more}{default}",
        )


def _parameter(path: str) -> str:
    return path.replace(".", "__")


def _load(config_file: Path | None, values: Mapping[str, Any], prefixed: bool = False) -> Config:
    """Return the configuration from all its sources; `values` are click's parameters."""
    overrides: dict[str, object] = {}
    for path in config.KEYS:
        value = values.get(_parameter(path))
        if value not in (None, ()):
            common = path.partition(".")[0] in ("registry", "log")
            overrides[path] = Flag(_flag(path, prefixed or common), value)
    return config.load(config_file, os.environ, overrides)


def _section_keys(section: str) -> list[str]:
    return [path for path in config.KEYS if path.startswith(section + ".")]


# --- the group ------------------------------------------------------------------------------------


class _Group(click.Group):
    """The commands of this file, and one for each installed role, which is imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *roles.role_names()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        command = super().get_command(ctx, name)
        if command is None and name in roles.role_names() and name in config.SECTIONS:
            command = _role_command(name)
        return command


@click.group(cls=_Group, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="rtunnel %(version)s")
def cli() -> None:
    """Reach every host by its original IP across isolated VPCs, through agents that dial out.

    broker, agent, gateway and authority are the roles of a cluster; standalone is a broker and a
    gateway in one process.
    """


def _role_command(name: str) -> click.Command:
    try:
        text = roles.find_role(name).help
    except RoleMissing as error:
        text = f"(can't be used: {error})"

    def callback(config_file: Path | None, **values: Any) -> None:
        with report_errors():
            sys.exit(workers.run(roles.find_role(name), _load(config_file, values)))

    options = [_config_option(), *_flags(_section_keys(name), False), *_flags(_COMMON, True)]
    return click.Command(name, params=list(options), callback=callback, help=text)


def _standalone(config_file: Path | None, **values: Any) -> None:
    """Broker and gateway in one process, which needs no Redis."""
    with report_errors():
        parts = [roles.find_role(name) for name in ("broker", "gateway")]
        sys.exit(roles.run(parts, _load(config_file, values, prefixed=True), name="standalone"))


_standalone_keys = [*_section_keys("broker"), *_section_keys("gateway"), *_COMMON]
# It is one process.
_standalone_keys = [path for path in _standalone_keys if not path.endswith(".workers")]
cli.add_command(
    click.Command(
        "standalone",
        params=[_config_option(), *_flags(_standalone_keys, True)],
        callback=_standalone,
        help=_standalone.__doc__,
    )
)


@cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """All parts on this machine, and requests through them."""
    try:
        module = import_module("rtunnel.demo")
    except ModuleNotFoundError as error:
        raise Failure(f"the demo can't be loaded: {error}: install rtunnel with all its roles", EXIT_FAILED) from None
    sys.exit(module.main(list(arguments)))


_COMPLETION = """
\b
Examples:
  eval "$(rtunnel completion bash)"                                            # in ~/.bashrc
  eval "$(rtunnel completion zsh)"                                             # in ~/.zshrc, after compinit
  rtunnel completion fish > ~/.config/fish/completions/rtunnel.fish
"""


@cli.command(epilog=_COMPLETION)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes commands and options."""
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "rtunnel", "_RTUNNEL_COMPLETE").source())


# --- configuration, keys --------------------------------------------------------------------------


@cli.group("config")
def config_group() -> None:
    """Check a configuration file."""


@config_group.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--role", type=click.Choice(config.ROLES), help="Also check what this role needs on this machine.")
@click.option(
    "--unit",
    type=click.Path(path_type=Path),
    help="Check what this systemd unit will run: with its variables, its credentials and as its user.",
)
def config_check(file: Path, role: str | None, unit: Path | None) -> None:
    """Check FILE, with the RTUNNEL_ variables of this environment, and report all that is wrong."""
    with report_errors():
        runs_as = _read_unit(unit, role) if unit else None
        environment = os.environ if runs_as is None else runs_as.environment
        loaded = config.load(file, environment, {})
        notes = roles.check(loaded, role) if role else []
        if runs_as is not None and role and (closed := config.unreadable(loaded, runs_as, config.role_sections(role))):
            raise config.ConfigError(closed)
    for note in notes:
        click.echo(f"warning: {printable(str(note))}", err=True)
    click.echo(f"{file}: good{f' for {role}' if role else ''}")


def _read_unit(path: Path, role: str | None) -> config.Unit:
    if role is None:
        raise Failure("--unit needs --role: give the role that the unit runs", EXIT_USAGE)
    try:
        return config.read_unit(path)
    except (OSError, ValueError) as error:
        raise Failure(f"can't read the unit {path}: {error}", EXIT_USAGE) from None


cli.add_command(pki_group)
cli.add_command(trace)
cli.add_command(doctor)


# --- rules and users of a gateway -----------------------------------------------------------------


def _file_option(key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    text = f"The file; else the {key} of --config or ${config.KEYS[key].env}."
    return click.option("--file", "file", type=click.Path(path_type=Path), help=text)


@cli.group("policy")
def policy_group() -> None:
    """Test the rules of a gateway."""


@config_option
@policy_group.command("test")
@click.argument("target", metavar="IP:PORT")
@click.option("--user", metavar="NAME", help="The user who has logged in; default: no login.")
@click.option("--from", "source", metavar="IP", required=True, help="The client's address.")
@click.option("--namespace", help="The target's namespace; default: the gateway's.")
@_file_option("gateway.policy")
@json_option
def policy_test(
    target: str,
    user: str | None,
    source: str,
    namespace: str | None,
    file: Path | None,
    as_json: bool,
    config_file: Path | None,
) -> None:
    """Say whether a client may reach IP:PORT, and why.

    Exit code 0 when allowed, 1 when denied. `rtunnel resolve` says whether an agent exposes that
    port.
    """
    with report_errors():
        gateway = config.load(config_file, os.environ, {}).gateway
        path = file or (Path(gateway.policy) if gateway.policy else None)
        rules = policy.load_policy(path) if path else policy.LOCAL_ONLY
        question = _question(user, source, namespace or gateway.namespace, target)
    verdict = rules.verdict(question)
    if as_json:
        rule = rules.rules[verdict.number - 1] if verdict.number else None
        print_json({"allowed": verdict.allowed, "rule": verdict.number or None, "text": rule, "file": str(path or "")})
    else:
        for line in _explained(rules, question, verdict, str(path) if path else "no policy is given"):
            click.echo(printable(line))
    sys.exit(0 if verdict.allowed else EXIT_FAILED)


def _question(user: str | None, source: str, namespace: str, target: str) -> Question:
    ip, port = _parse_target(target)
    if not port:
        raise Failure(f"{target!r} has no port: write {config.format_endpoint(ip, 443)}", EXIT_USAGE)
    try:
        return Question(user, config.canonical_ip(source), namespace, ip, port)
    except ValueError as error:
        raise Failure(f"--from: {error}", EXIT_USAGE) from None


def _explained(rules: Policy, question: Question, verdict: Verdict, where: str) -> Iterator[str]:
    word = "allow" if verdict.allowed else "deny"
    if verdict.number:
        yield f"{word}: rule {verdict.rule} ({where})"
        if rules is policy.LOCAL_ONLY:
            return
        keys_of = msgspec.to_builtins(rules.rules[verdict.number - 1])
        yield from (f"  {key} = {_toml(value)}" for key, value in keys_of.items() if value not in (None, ""))
        return
    yield f"{word}: no rule matches ({where})"
    if kind := policy.special(question.ip):
        yield f"  {question.ip} is {kind}: only a rule whose `to` names it allows it"
    for near, key in rules.nearly(question):
        yield f"  except for `{key}`, rule {near.rule} would {'allow' if near.allowed else 'deny'} it"


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()


@cli.group("user")
def user_group() -> None:
    """Manage names and passwords of a gateway's clients."""


def _users_file(file: Path | None, config_file: Path | None) -> Path:
    path = file or config.load(config_file, os.environ, {}).gateway.users
    if not path:
        raise Failure("no users file is given: give --file, or --config with gateway.users", EXIT_USAGE)
    return Path(path)


@config_option
@user_group.command("add")
@click.argument("name")
@_file_option("gateway.users")
def user_add(name: str, file: Path | None, config_file: Path | None) -> None:
    """Add user NAME, or change the password of NAME.

    The command asks for the password, or reads it from the first line of stdin. Gateways use the
    file within seconds. A changed password ends the streams that were opened with the old one.
    """
    with report_errors():
        path = _users_file(file, config_file)
        try:
            users.check_name(name)
            entry = users.new_hash(_password(name))
        except config.BadValue as error:
            raise Failure(f"{error}" + (f" ({error.fix})" if error.fix else ""), EXIT_USAGE) from None
        new = users.put_user(path, name, entry)
    click.echo(f"{path}: {name} {'added' if new else 'has another password'}")


def _password(name: str) -> str:
    if sys.stdin.isatty():
        return str(click.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")


@config_option
@user_group.command("remove")
@click.argument("name")
@_file_option("gateway.users")
def user_remove(name: str, file: Path | None, config_file: Path | None) -> None:
    """Remove user NAME. Gateways use the file within seconds, and end the user's streams."""
    with report_errors():
        path = _users_file(file, config_file)
        users.remove_user(path, name)
    click.echo(f"{path}: {name} removed")


@config_option
@user_group.command("list")
@_file_option("gateway.users")
def user_list(file: Path | None, config_file: Path | None) -> None:
    """Print the names of the users."""
    with report_errors():
        for name in sorted(users.load_users(_users_file(file, config_file)).hashes):
            click.echo(printable(name))


# --- looking at the registry ----------------------------------------------------------------------


def _registry_options(command: Callable[..., Any]) -> click.Command:
    built = click.command()(command)
    built.params += [_config_option(), *_flags(("registry.url", "registry.prefix"), True)]
    built.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))
    cli.add_command(built)
    return built


@contextmanager
def _open_registry(config_file: Path | None, values: Mapping[str, Any]) -> Iterator[Registry]:
    with report_errors():
        loaded = _load(config_file, values)
        if config.is_memory(loaded):
            raise Failure(
                "the memory registry lives inside one process, and other processes cannot read it: ask that process "
                "(/statusz of its admin address), or give the shared one with --registry-url or --config",
                EXIT_USAGE,
            )
        registry = connect(loaded.registry)
        try:
            yield registry
        finally:
            registry.close()


@_registry_options
@click.argument("target", metavar="IP[:PORT]")
@click.option("--namespace", default="default", show_default=True, help="The agent's namespace.")
def resolve(target: str, namespace: str, config_file: Path | None, as_json: bool, **values: Any) -> None:
    """Show the tuples through which IP[:PORT] is reached, or why there are none.

    Exit code 1 when there are none.
    """
    ip, port = _parse_target(target)
    with _open_registry(config_file, values) as registry:
        states = {node.node: node.state for node in registry.nodes()}
        found = registry.with_exposes(registry.lookup(namespace, ip))
        tuples = [_as_it_is(item, states) for item in found]
        tuples.sort(key=lambda item: (item.state != "live", item.node))
        now = registry.now()
        missing = None if tuples else cli_cluster.missing(registry, namespace, ip)
    usable = [item for item in tuples if port == 0 or _serves(item, port)]
    reason = "" if usable else _why_none(ip, port, tuples, missing)
    if as_json:
        # An epoch has 64 bits, which jq and JavaScript would round.
        rows = [{**msgspec.to_builtins(item), "epoch": str(item.epoch), "age": _age(now, item.beat)} for item in usable]
        found_json = {"namespace": namespace, "ip": ip, "port": port, "now": now, "tuples": rows, "reason": reason}
        print_json(found_json | (missing.as_json() if missing is not None else {}))
    elif usable:
        columns = ("ps", "agent port", "node", "epoch", "state", "agent", "exposes", "heartbeat")
        print_table(columns, [_tuple_row(item, now) for item in usable], keep=("ps", "node", "agent"))
    if not usable:
        raise Failure(f"{config.format_endpoint(ip, port) if port else ip}: {reason}", EXIT_FAILED)


def _why_none(ip: str, port: int, tuples: Sequence[Tuple], missing: cli_cluster.Missing | None) -> str:
    """Return why no tuple serves the address and port, and what to do."""
    if missing is not None:
        return missing.text()
    exposed = tuples[0].exposes or "nothing"
    return (
        f"{_names_of(tuples)} has {ip}, but does not expose {port} (exposes: {exposed}): add the port to agent.exposes"
    )


def _as_it_is(item: Tuple, states: Mapping[str, str]) -> Tuple:
    """Return the tuple with the state of its node, which stands only in the node's record."""
    state = states.get(item.node, "no heartbeat")
    return item if state == "live" else msgspec.structs.replace(item, state=state)


def _parse_target(text: str) -> tuple[str, int]:
    """Return (ip, port); port 0 for an address alone."""
    try:
        return config.canonical_ip(text.removeprefix("[").removesuffix("]")), 0
    except ValueError:
        pass
    try:
        host, port = config.parse_endpoint(text)
        return config.canonical_ip(host), port
    except ValueError as error:
        raise Failure(f"{text!r} is not IP or IP:PORT: {error}", EXIT_USAGE) from None


def _serves(item: Tuple, port: int) -> bool:
    if item.agent_port:
        return item.agent_port == port
    ranges = config.parse_exposes([word for word in item.exposes.split(",") if word])
    return any(low <= port <= high for low, high in ranges)


def _names_of(tuples: Sequence[Tuple]) -> str:
    return "agent " + ", ".join(sorted({item.agent_id for item in tuples}))


def _tuple_row(item: Tuple, now: float) -> tuple[str, ...]:
    return (
        config.format_endpoint(item.ps_ip, item.ps_port),
        str(item.agent_port or "any exposed"),
        item.node,
        str(item.epoch),
        item.state,
        item.agent_id,
        item.exposes.replace(",", ", "),  # so that a long list folds between ports
        f"{_age(now, item.beat):.1f} s ago",
    )


_age = cli_cluster.age


#: Printed by `rtunnel status` with an empty list of nodes.
NO_HEARTBEAT = (
    "no broker has a heartbeat here: either none runs, or this registry refuses writes, which /readyz and the log "
    "of each broker say (registry_unavailable); gateways go on with the tuples that they know"
)


class _Agent(msgspec.Struct):
    """The sessions and addresses of one agent, from the registry."""

    namespace: str
    agent_id: str
    addresses: list[str]
    sessions: int
    nodes: list[str]
    hosts: list[str]
    draining: int  # sessions
    live: int  # nodes that are neither draining nor without a heartbeat
    live_hosts: int  # theirs


@_registry_options
@click.option("--all", "everything", is_flag=True, help=f"Show all agents, not only {SHOWN_AGENTS}.")
def status(everything: bool, config_file: Path | None, as_json: bool, **values: Any) -> None:
    """Show the nodes and gateways, and the agents with their sessions.

    A node that has died is shown for an hour. Agents with the fewest nodes and hosts come first.
    """
    with _open_registry(config_file, values) as registry:
        snapshot = registry.snapshot()
        nodes = cli_cluster.Nodes(snapshot.nodes, registry.node_facts(), snapshot.now, registry.ttl)
        gateways = registry.gateways()
        url = registry.url
    agents = _agents(snapshot)
    warnings = [] if snapshot.nodes else [NO_HEARTBEAT]
    if as_json:
        rest = {"registry": url, "agents": agents, "summary": _summary(snapshot, agents)}
        print_json(cli_cluster.status_json(nodes, gateways, snapshot.now, rest, warnings))
        return
    _print_processes(nodes, gateways, snapshot.now)
    shown = agents if everything else agents[:SHOWN_AGENTS]
    click.echo()
    _print_agents(shown)
    if len(shown) < len(agents):
        click.echo(f"... and {plural(len(agents) - len(shown), 'more agent')} (--all shows them)")
    click.echo()
    for node in snapshot.nodes:
        for claim in node.duplicates:
            click.echo(_duplicate_line(node, claim))
    click.echo(_summary_line(url, _summary(snapshot, agents)))
    for text in [*warnings, *nodes.warnings(), *cli_cluster.gateway_warnings(gateways, snapshot.now)]:
        click.echo(f"warning: {text}")


def _print_processes(nodes: cli_cluster.Nodes, gateways: Sequence[GatewayRecord], now: float) -> None:
    print_table(cli_cluster.NODE_COLUMNS, nodes.rows(), keep=("node", "ps ip"))
    if gateways:
        click.echo()
        rows = cli_cluster.gateway_rows(gateways, now)
        print_table(cli_cluster.GATEWAY_COLUMNS, rows, keep=("gateway", "listen"))


def _print_agents(agents: Sequence[_Agent]) -> None:
    columns = ("agent", "namespace", "addresses", "sessions", "redundancy", "nodes")
    print_table(columns, [_agent_row(agent) for agent in agents], keep=("agent", "namespace"))


#: The columns of `rtunnel top`, and the fields of a stream in them.
_STREAM_COLUMNS = ("client", "user", "target", "agent", "node", "up", "down", "seconds", "idle")


@_registry_options
@click.option("--by", "order", type=click.Choice(["bytes", "age", "idle"]), default="bytes", show_default=True,
              help="The order of the streams.")  # fmt: skip
@click.option("--count", default=20, show_default=True, type=click.IntRange(1, 1000), help="Streams that are shown.")
@click.option("--gateway", metavar="HOST:PORT", help="The gateway's admin address; default: gateway.admin.")
@click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE",
              help="The file with the API's token; default: gateway.admin_token.")  # fmt: skip
@click.option("--every", metavar="SECONDS", type=click.FloatRange(0.5, 3600), help="Show it again and again.")
def top(
    order: str,
    count: int,
    gateway: str | None,
    token_file: Path | None,
    every: float | None,
    config_file: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Show nodes, gateways, agents without redundancy, and a gateway's streams by size or age.

    The streams are those of one gateway, and need the token of its API.
    """
    with report_errors():
        section = config.load(config_file, os.environ, {}).gateway
        path = token_file or (Path(section.admin_token) if section.admin_token else None)
        token = load_api_token(path) if path is not None else ""
    with _open_registry(config_file, values) as registry:
        while True:
            streams = _streams(gateway or section.admin, token, order, count) if token else None
            _show_top(registry, streams, as_json=as_json)
            if every is None:
                return
            time.sleep(every)
            if sys.stdout.isatty():
                click.clear()


def _streams(address: str, token: str, order: str, count: int) -> dict[str, Any]:
    return ask(address, token, "GET", f"/v1/streams?by={order}&most={count}")


def _show_top(registry: Registry, streams: Mapping[str, Any] | None, *, as_json: bool) -> None:
    snapshot = registry.snapshot()
    nodes = cli_cluster.Nodes(snapshot.nodes, registry.node_facts(), snapshot.now, registry.ttl)
    gateways = registry.gateways()
    few = [agent for agent in _agents(snapshot) if agent.live < 2]
    if as_json:
        rest = {"registry": registry.url, "agents": few, "streams": streams}
        print_json(cli_cluster.status_json(nodes, gateways, snapshot.now, rest, []))
        return
    _print_processes(nodes, gateways, snapshot.now)
    click.echo()
    click.echo(f"{plural(len(few), 'agent')} on fewer than two live nodes")
    if few:
        _print_agents(few[:SHOWN_AGENTS])
    click.echo()
    if streams is None:
        click.echo("streams: give --token-file, or --config with gateway.admin_token")
        return
    click.echo(f"{plural(streams['open'], 'stream')} at the gateway {streams['gateway']}")
    print_table(_STREAM_COLUMNS, [_stream_row(stream) for stream in streams["streams"]], keep=("client", "target"))


def _stream_row(stream: Mapping[str, Any]) -> tuple[str, ...]:
    words = (stream["client"], stream["user"], stream["target"], stream["agent"], stream["node"])
    return (
        *words,
        *(f"{stream[name]:,}" for name in ("bytes_up", "bytes_down")),
        *(f"{stream[name]:.0f}" for name in ("seconds", "idle")),
    )


@_registry_options
@click.option("--follow", "-f", is_flag=True, help="Go on with new events until interrupted.")
@click.option("--since", metavar="DURATION", default="", help="How far back: 30s, 10m, 24h, 7d; default: all kept.")
@click.option("--event", metavar="NAME", help="Events with this name, such as session_ended.")
@click.option("--agent", metavar="ID", help="Events about this agent.")
@click.option("--node", metavar="NAME", help="Events of this node or gateway, or about this node.")
@click.option("--target", metavar="IP[:PORT]", help="Events about this target.")
@click.option("--code", metavar="WORD", help="Events with this refusal code or cause.")
def events(follow: bool, since: str, config_file: Path | None, as_json: bool, **values: Any) -> None:
    """Show what happened in the cluster: sessions, nodes, refusals, trust, clocks.

    Brokers and gateways publish these events to the registry, which keeps the newest 100,000. With
    --json each line is one event.
    """
    wanted = {option: str(values.pop(option)) for option in cli_events.FIELDS if values.get(option)}
    with _open_registry(config_file, values) as registry:
        cli_events.show(registry, wanted, since, follow=follow, as_json=as_json)


def _agents(snapshot: Snapshot) -> list[_Agent]:
    """Return the agents, the least redundant first."""
    hosts = {node.node: node.host for node in snapshot.nodes}
    states = {node.node: node.state for node in snapshot.nodes}
    groups: dict[tuple[str, str], list[Tuple]] = {}
    for item in snapshot.tuples:
        groups.setdefault((item.namespace, item.agent_id), []).append(item)
    agents = []
    for (namespace, agent_id), items in groups.items():
        sessions = {(item.node, item.epoch): _as_it_is(item, states).state for item in items}
        nodes = sorted({node for node, _ in sessions})
        live = {node for (node, _), state in sessions.items() if state == "live"}
        agents.append(
            _Agent(
                namespace,
                agent_id,
                sorted({item.agent_ip for item in items}),
                len(sessions),
                nodes,
                sorted({hosts.get(node, node) for node in nodes}),
                sum(state == "draining" for state in sessions.values()),
                len(live),
                len({hosts.get(node, node) for node in live}),
            )
        )
    return sorted(agents, key=lambda agent: (agent.live, agent.live_hosts, agent.namespace, agent.agent_id))


def _duplicate_line(node: NodeRecord, claim: Duplicate) -> str:
    agent = claim.agent_id if claim.namespace == "default" else f"{claim.namespace}/{claim.agent_id}"
    at = datetime.fromtimestamp(claim.at, UTC).strftime("%H:%M:%S UTC")
    return printable(
        f"two hosts are agent {agent}: {claim.holder} has the sessions, {claim.refused} was refused by {node.node}"
        f" (last at {at}, tries: {claim.tries}); stop one of them, or give it an agent_id of its own"
    )


def _agent_row(agent: _Agent) -> tuple[str, ...]:
    more = len(agent.addresses) - 2
    addresses = " ".join(agent.addresses[:2]) + (f" +{more}" if more > 0 else "")
    sessions = f"{agent.sessions}" + (f" ({agent.draining} draining)" if agent.draining else "")
    redundancy = plural(agent.live, "node") + (" on one host" if agent.live > 1 and agent.live_hosts == 1 else "")
    return agent.agent_id, agent.namespace, addresses, sessions, redundancy, " ".join(agent.nodes)


def _summary(snapshot: Snapshot, agents: Sequence[_Agent]) -> dict[str, int]:
    return {
        "nodes": len(snapshot.nodes),
        "nodes_draining": sum(node.state == "draining" for node in snapshot.nodes),
        "agents": len(agents),
        # Or on none: all theirs are draining.
        "agents_on_one_node": sum(agent.live < 2 for agent in agents),
        "agents_on_one_host": sum(agent.live_hosts < 2 for agent in agents),
        "sessions": sum(agent.sessions for agent in agents),
        "tuples": len(snapshot.tuples),
    }


def _summary_line(url: str, summary: Mapping[str, int]) -> str:
    agents, sessions = plural(summary["agents"], "agent"), plural(summary["sessions"], "session")
    return (
        f"{plural(summary['nodes'], 'node')} ({summary['nodes_draining']} draining), {agents} "
        f"({summary['agents_on_one_node']} on one node only, {summary['agents_on_one_host']} on one host only), "
        f"{sessions}, {plural(summary['tuples'], 'tuple')} in {url}"
    )
