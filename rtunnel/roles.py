"""Finds roles by their entry points, checks what they need, and runs them in a process.

The core imports no role. Each role is an entry point of the group `rtunnel.roles` that names a
`Role`.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import trio

from rtunnel import __version__, events, logs, pulse
from rtunnel.config import Config, ConfigError, Problem, check_role, host_name, is_memory, role_sections, warnings
from rtunnel.errors import (
    EXIT_FAILED,
    EXIT_LISTEN,
    EXIT_OK,
    EXIT_USAGE,
    ListenError,
    RegistryUnavailable,
    RoleMissing,
    Superseded,
    TrustError,
)
from rtunnel.pulse import Part, Watcher
from rtunnel.registry import Registry, connect
from rtunnel.trust import identity, keys, pki, policy, tls, users
from rtunnel.watch import look_now

GROUP = "rtunnel.roles"


#: Days: a certificate that ends sooner causes a warning at every start.
SOON_DAYS = 30

#: Thresholds of the garbage collector. A relay creates and drops thousands of small objects a
#: second that are in no cycle: with the interpreter's 700 the collector took 1-3 % of the CPU.
GC_THRESHOLDS = (10_000, 20, 20)

log = logs.get_logger("runner")


class Serve(Protocol):
    """The function that runs a role from its start to its end, in trio's thread.

    It calls `task_status.started()` when the role listens (or dials), and returns when the role has
    drained after `stop`. When it is cancelled it ends at once. It raises ListenError when an
    address is taken, and ConfigError or TrustError when a setting or a file cannot be used. Any
    other exception is a bug, and is logged with its traceback.
    """

    async def __call__(
        self, config: Config, registry: Registry | None, *, stop: trio.Event, task_status: trio.TaskStatus[Any]
    ) -> None:
        """Run the role until `stop` is set."""


@dataclass(frozen=True)
class Role:
    """The value that a role package exports as ROLE."""

    name: str  # also the name of its section in the configuration
    help: str
    serve: Serve
    needs_registry: bool = True


def role_names() -> list[str]:
    """Return the names of the installed roles."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def find_role(name: str) -> Role:
    """Return the role with this name. Raises RoleMissing."""
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        raise RoleMissing(f"no role {name!r} is installed: install the package that has it")
    try:
        role = points[0].load()
    except (ImportError, AttributeError) as error:
        raise RoleMissing(f"the role {name!r} can't be loaded: {error}") from error
    if not isinstance(role, Role):
        raise RoleMissing(f"the role {name!r} can't be loaded: {points[0].value} is not a Role")
    return role


# --- checks before a start ------------------------------------------------------------------------


def check(config: Config, role: str) -> list[Problem]:
    """Check a role's settings, files, keys and certificates before its start; return warnings.

    Raises ConfigError with every fault that was found.
    """
    check_role(config, role)
    problems: list[Problem] = []
    for key, load in _materials(config, role):
        try:
            load()
        except TrustError as error:
            problems.append(Problem(config.source(key), key, str(error)))
    if problems:
        raise ConfigError(problems)
    return [*warnings(config, role), *_expiring(config, role)]


def _materials(config: Config, role: str) -> Iterator[tuple[str, Callable[[], object]]]:
    sections = role_sections(role)
    broker, agent, gateway = config.broker, config.agent, config.gateway
    if "broker" in sections:
        yield "broker.cluster_key", partial(keys.load_cluster_keys, broker.cluster_key)
        if broker.join_token:
            yield "broker.join_token", partial(keys.load_tokens, broker.join_token)
        if broker.admin_token:
            yield "broker.admin_token", partial(keys.load_api_token, broker.admin_token)
        if broker.ca:
            yield "broker.ca", partial(identity.load_trust_store, broker.ca)
        if "tls" in (broker.security, broker.dial_security):
            yield "broker.certificate", partial(tls.server_context, broker.certificate, broker.key)
    if "agent" in sections:
        if agent.join_token:
            yield "agent.join_token", partial(keys.load_token, agent.join_token)
        if agent.security == "tls":
            yield "agent.ca", partial(tls.client_context, agent.ca)
        if agent.certificate:
            yield "agent.certificate", partial(identity.load_pair, agent.certificate, agent.key)
        if agent.identity:
            yield "agent.identity", partial(identity.check_directory, agent.identity)
    if "gateway" in sections:
        yield "gateway.key", partial(keys.load_gateway_key, gateway.key)
        if "broker" in sections:
            yield "gateway.key", partial(_of_one_cluster, broker.cluster_key, gateway.key)
        if gateway.ca:
            yield "gateway.ca", partial(identity.load_trust_store, gateway.ca)
        if gateway.policy:
            yield "gateway.policy", partial(policy.load_policy, gateway.policy)
        if gateway.admin_token:
            yield "gateway.admin_token", partial(keys.load_api_token, gateway.admin_token)
        if gateway.users:
            yield "gateway.users", partial(users.load_users, gateway.users)
    if "authority" in sections:
        yield "authority.directory", partial(_check_directory, Path(config.authority.directory))


def _check_directory(path: Path) -> None:
    with pki.open_directory(path):
        pass


def _of_one_cluster(cluster_key: str, gateway_key: str) -> None:
    """Raise TrustError unless the gateway's key comes from one of the broker's cluster keys."""
    key = keys.load_gateway_key(gateway_key)
    if not any(keys.gateway_key(cluster, key.id) == key for cluster in keys.load_cluster_keys(cluster_key)):
        raise TrustError(f"{gateway_key}: is not derived from a cluster key in {cluster_key}: use files of one cluster")


def _expiring(config: Config, role: str) -> Iterator[Problem]:
    files = (
        ("broker.certificate", config.broker.certificate, config.broker.security),
        ("agent.ca", config.agent.ca, config.agent.security),
        ("agent.certificate", config.agent.certificate, "tls"),
    )
    for key, path, security in files:
        if key.partition(".")[0] not in role_sections(role) or security != "tls" or not path:
            continue
        days = tls.days_left(path)
        fix = "renew it: `rtunnel pki issue broker`" if key == "broker.certificate" else "replace it"
        if days < 0:
            yield Problem(config.source(key), key, f"{path} expired {-days:.0f} days ago, and links fail", fix)
        elif days < SOON_DAYS:
            yield Problem(config.source(key), key, f"{path} expires in {days:.0f} days", fix)


# --- the runner -----------------------------------------------------------------------------------


def run(roles: Sequence[Role], config: Config, *, name: str = "") -> int:
    """Run roles in this process until they have ended, and return the process's exit code.

    SIGTERM and SIGINT set `stop`, so that the roles drain; a second one cancels the roles at once.
    SIGHUP makes them check their files. Raises ConfigError when the checks before the start fail;
    later failures are logged.
    """
    name = name or roles[0].name
    notes = check(config, name)
    logs.setup(config.log)
    watcher = pulse.from_environment(os.environ)
    return run_process(name, notes, lambda: run_roles(roles, config, watch_signals, watcher))


def run_process(name: str, notes: Sequence[Problem], main: Callable[[], int], **fields: object) -> int:
    """Set the process up for a role, run `main`, and return the exit code that it returns.

    `notes` are logged as warnings; `fields` go into the line `process_started`. An exception of
    `main` is logged, and gives another exit code.
    """
    raise_descriptor_limit()
    # SIGHUP means "check the files". It must not end a process that is starting or ending.
    # `watch_signals` sets a handler later.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Imported modules are never freed, so the collector need not visit them.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        for problem in notes:
            log.warning("config_warning", source=problem.source, key=problem.key, text=problem.reason, fix=problem.fix)
        python = sys.version.split()[0]
        log.info("process_started", role=name, version=__version__, pid=os.getpid(), python=python, **fields)
        code = main()
    except BaseException as error:
        code = _exit_code(error)
    log.info("process_stopped", role=name, code=code)
    logs.flush()
    return code


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard limit; log a warning when that fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            log.warning("descriptor_limit_not_raised", limit=soft, hint="raise it before the start (ulimit -n)")


#: A task that sets an event when the roles must drain, and calls a function when they must end at
#: once (`watch_signals`, `rtunnel.workers`).
Watch = Callable[..., Awaitable[None]]


def run_roles(roles: Sequence[Role], config: Config, watch: Watch, watcher: Watcher | None = None) -> int:
    """Run roles until `watch` stops them or one of them ends, and return the exit code.

    `watcher` gets signs of life while the roles answer.
    """
    registry = connect(config.registry) if any(role.needs_registry for role in roles) else None
    try:
        return trio.run(_serve_all, roles, config, registry, watch, watcher)
    finally:
        if registry is not None:
            registry.close()


async def _serve_all(
    roles: Sequence[Role], config: Config, registry: Registry | None, watch: Watch, watcher: Watcher | None
) -> int:
    stop = trio.Event()
    parts: list[Part] = []
    async with trio.open_nursery() as nursery:
        # Started before the roles, so that a signal during their start does not kill the process.
        await nursery.start(watch, stop, nursery.cancel_scope.cancel)
        if watcher is not None:
            nursery.start_soon(pulse.pulse, watcher, parts)
            nursery.start_soon(_tell_stop, watcher, stop)
        if registry is not None and not is_memory(config):
            outbox = events.Outbox(roles[0].name, _name_of(config, roles[0].name))
            logs.tap(events.PUBLISHED, outbox.add)
            nursery.start_soon(events.publish, outbox, registry)
        async with trio.open_nursery() as serving:
            for role in roles:
                part = await serving.start(_serve_one, role, config, registry, stop)
                if part is not None:
                    parts.append(part)
                log.info("role_started", role=role.name)
            if watcher is not None and not stop.is_set():
                watcher.started()
        nursery.cancel_scope.cancel()
        return EXIT_OK
    return EXIT_FAILED  # reached after a second signal only, which cancelled the drain


def _name_of(config: Config, role: str) -> str:
    """Return the name of a process of this role in events."""
    names = {"broker": config.broker.node_id, "gateway": config.gateway.name}
    return names.get(role, "") or host_name()


async def _tell_stop(watcher: Watcher, stop: trio.Event) -> None:
    await stop.wait()
    watcher.stopping()


async def _serve_one(
    role: Role,
    config: Config,
    registry: Registry | None,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[Part | None],
) -> None:
    status = _Status(task_status)
    await role.serve(config, registry if role.needs_registry else None, stop=stop, task_status=status)
    # One role that ends stops the others. A role that was stopped during its start has not called
    # `started`: the caller waits for it.
    stop.set()
    status.started()


class _Status:
    """A task status whose `started` may be called twice."""

    def __init__(self, status: trio.TaskStatus[Part | None]) -> None:
        self._status: trio.TaskStatus[Part | None] | None = status

    def started(self, value: Part | None = None) -> None:
        """Pass on the first call only."""
        status, self._status = self._status, None
        if status is not None:
            status.started(value)


async def watch_signals(
    stop: trio.Event,
    at_once: Callable[[], object],
    look: Callable[[], object] = look_now,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Set `stop` at the first SIGTERM or SIGINT, call `at_once` at the second, and return.

    Calls `look` at each SIGHUP.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                log.info("file_check_requested", signal=name, hint="files that have changed are read now")
                look()
                continue
            if stop.is_set():
                log.warning("abort_requested", signal=name)
                at_once()
                return
            log.info("stop_requested", signal=name, hint="a second signal stops at once")
            stop.set()


# --- exit codes -----------------------------------------------------------------------------------

#: Exit codes and log events of failures that need no traceback; others are logged with one.
_CODES: Mapping[type[BaseException], tuple[int, str]] = {
    ConfigError: (EXIT_USAGE, "config_rejected"),
    TrustError: (EXIT_USAGE, "config_rejected"),
    ListenError: (EXIT_LISTEN, "listen_failed"),
    RegistryUnavailable: (EXIT_FAILED, "registry_unavailable"),
    Superseded: (EXIT_FAILED, "node_superseded"),
}
_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)


def _exit_code(fault: BaseException) -> int:
    """Log the failure that ended the process, and return the process's exit code.

    Raises KeyboardInterrupt and SystemExit again.
    """
    leaves = list(_leaves(fault))
    if any(isinstance(leaf, KeyboardInterrupt | SystemExit) for leaf in leaves):
        raise fault
    for leaf in leaves:
        if isinstance(leaf, OSError) and leaf.errno in _TAKEN:
            log.error("listen_failed", text=str(leaf))
            return EXIT_LISTEN
        for kind, (code, event) in _CODES.items():
            if isinstance(leaf, kind):
                log.error(event, text=str(leaf))
                return code
    log.critical("process_crashed", exc_info=fault)
    return EXIT_FAILED


def _leaves(fault: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions inside groups, because nurseries wrap each exception in a group."""
    if isinstance(fault, BaseExceptionGroup):
        for inner in fault.exceptions:
            yield from _leaves(inner)
    else:
        yield fault
