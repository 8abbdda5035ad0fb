"""`--workers N`: N processes of one role on one port, and the supervisor that keeps them running.

A worker is an independent process with a fresh interpreter: a broker's is a node of its own, with
its own name and its own part of the port ranges. Workers share the listening address (SO_REUSEPORT:
the kernel spreads connections), the `host` label and stderr, and nothing else. The supervisor
handles no connection.

    supervisor -> worker   its stdin: one line of JSON, the `Task`; then bytes: `LOOK` for "check
                           your files", `STOP` for "stop", another `STOP` for "at once". The end of
                           stdin means that the supervisor has ended: stop.
    worker -> supervisor   a pipe, with signs of life (rtunnel/pulse.py); its exit code; and its
                           health over HTTP, on a socket that the supervisor has handed down

A worker without signs of life is killed and started again, because its listener would keep its
share of the connections.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
import trio

from rtunnel import admin, logs, pulse, roles
from rtunnel.config import BrokerConfig, Config, format_endpoint, host_name, parse_endpoint, slice_of
from rtunnel.errors import EXIT_FAILED, EXIT_LISTEN, EXIT_OK, EXIT_USAGE
from rtunnel.net import bound_socket
from rtunnel.pulse import Watcher
from rtunnel.roles import Role
from rtunnel.watch import look_now

#: A worker that died is started again at once, then after this many seconds, doubled up to the cap.
#: The count starts again after it has lived for `STABLE`.
#: for `STABLE`.
BACKOFF_FIRST: Final = 0.25
BACKOFF_CAP: Final = 10.0
STABLE: Final = 60.0
#: Seconds after the order to stop at once, before a worker is killed.
KILL_AFTER: Final = 2.0
#: Seconds for a worker's answer about its health, after it had `START_PATIENCE` to start.
PATIENCE: Final = 1.0
START_PATIENCE: Final = 10.0
#: A worker gives a sign each second. One that is silent for this many seconds is killed: as long as
#: agents wait for a
#: silent link. Seconds are counted by the supervisor's own ticks, so that a machine that was
#: suspended kills nobody.
SILENCE: Final = 15
#: The first sign may take longer: when a machine starts 64 workers, the imports alone take seconds.
FIRST_SILENCE: Final = 60
TICK: Final = 1.0
STOP: Final = b"."
LOOK: Final = b"h"
#: Exit codes of a worker that was told to stop. A terminal's signal may arrive before its handlers
#: are set.
IN_ORDER: Final = (EXIT_OK, -signal.SIGTERM, -signal.SIGINT)

log = logs.get_logger("supervisor")


class Task(msgspec.Struct):
    """The task of a worker, sent by its stdin because it contains passwords."""

    role: str
    number: int
    config: Config
    pulse: int  # the descriptor for signs of life


def run(role: Role, config: Config) -> int:
    """Run a role as `roles.run` does, in as many processes as its `workers` key says.

    Return the exit code.
    """
    count = getattr(getattr(config, role.name), "workers", 1)
    if count == 1:
        return roles.run([role], config)
    notes = roles.check(config, role.name)
    logs.setup(config.log)
    supervisor = Supervisor(role.name, config, count)
    supervisor.watcher = pulse.from_environment(os.environ)
    return roles.run_process(role.name, notes, lambda: trio.run(supervisor.run), workers=count)


# --- the supervisor -------------------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """One worker, through all its processes."""

    number: int
    config: Config
    health: socket.socket | None  # a listening socket, the same for each process of the worker
    process: trio.Process | None = None
    since: float = 0.0  # trio's clock
    restarts: int = 0
    fate: str = "not started yet"  # of the last process
    # Held while something is written to its stdin.
    ordering: trio.Lock = field(default_factory=trio.Lock)
    silence: int = 0  # ticks since its last sign of life
    gives_signs: bool = False  # this process has given one
    serves: bool = False  # it has started


class Supervisor:
    """Starts the workers, passes orders to them, and starts those again that end.

    `run` returns the exit code.
    """

    def __init__(self, role: str, config: Config, count: int) -> None:
        self.role = role
        self.config = config
        self.count = count
        self.workers: list[Worker] = []
        self.stop = trio.Event()
        self.at_once = trio.Event()
        self.look = trio.Event()  # a new one after each request to look at the files
        self.code = EXIT_OK
        self.watcher: Watcher | None = None  # the watcher of the supervisor itself

    async def run(self) -> int:
        """Run until all workers have ended. Raises ListenError."""
        section = getattr(self.config, self.role)
        async with trio.open_nursery() as nursery:
            await nursery.start(roles.watch_signals, self.stop, self.at_once.set, self._look)
            if self.watcher is not None:
                nursery.start_soon(pulse.pulse, self.watcher, [self])
                nursery.start_soon(self._tell_stop, self.watcher)
            with _reserved(section.listen, f"{self.role}.listen") as listen, ExitStack() as stack:
                for number in range(1, self.count + 1):
                    health = stack.enter_context(socket.create_server(("127.0.0.1", 0))) if section.admin else None
                    self.workers.append(Worker(number, self._config(number, listen, health), health))
                if section.admin:
                    await nursery.start(partial(admin.serve, section.admin, self._routes(), key=f"{self.role}.admin"))
                async with trio.open_nursery() as serving:
                    for worker in self.workers:
                        serving.start_soon(self._keep, worker)
            nursery.cancel_scope.cancel()
        return self.code

    def _config(self, number: int, listen: str, health: socket.socket | None) -> Config:
        address = f"{admin.INHERITED}:{health.fileno()}" if health is not None else ""
        return worker_config(self.config, self.role, number, listen, address)

    # The protocol rtunnel.pulse.Part, for the supervisor's own watcher.

    def reasons(self) -> list[str]:
        return [f"worker {w.number}: {_absence(w)}" for w in self.workers if not w.serves]

    async def answered(self) -> None:
        """Return at once: the supervisor has one thread, which runs this."""
        await trio.lowlevel.checkpoint()

    async def _tell_stop(self, watcher: Watcher) -> None:
        await self.stop.wait()
        watcher.stopping()

    async def _keep(self, worker: Worker) -> None:
        pause = 0.0
        while True:
            worker.since = trio.current_time()
            status = await self._live(worker)
            if self.stop.is_set():
                if status not in IN_ORDER:
                    self.code = self.code or EXIT_FAILED
                return
            worker.fate = _describe_exit(status)
            log.error("worker_died", worker=worker.number, status=worker.fate, restarts=worker.restarts)
            if status in (EXIT_USAGE, EXIT_LISTEN) and worker.restarts == 0:
                # Wrong from the start, and it said why. Later it is worth trying again: the others
                # may do well.
                self.code = status
                self.stop.set()
                return
            if trio.current_time() - worker.since >= STABLE:
                pause = 0.0
            with trio.move_on_after(pause):
                await self.stop.wait()
                return
            pause = min(BACKOFF_CAP, max(BACKOFF_FIRST, pause * 2))
            worker.restarts += 1

    async def _live(self, worker: Worker) -> int:
        """Run one process to its end, and return how it ended."""
        try:
            signs, theirs = os.pipe()
        except OSError as error:  # no descriptors
            log.error("worker_not_started", worker=worker.number, reason=str(error))
            return EXIT_FAILED
        try:
            process = await self._open(worker, theirs)
        except OSError as error:  # no memory, too many processes
            os.close(signs)
            log.error("worker_not_started", worker=worker.number, reason=str(error))
            return EXIT_FAILED
        finally:
            os.close(theirs)
        worker.process = process
        worker.silence, worker.gives_signs, worker.serves = 0, False, False
        log.info("worker_started", worker=worker.number, pid=process.pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._instruct, worker, process, theirs)
            nursery.start_soon(self._hear, worker, trio.lowlevel.FdStream(signs))
            nursery.start_soon(self._kill_when_silent, worker, process)
            status = await process.wait()
            nursery.cancel_scope.cancel()
        worker.process = None
        worker.serves = False
        if process.stdin is not None:
            await process.stdin.aclose()
        return status

    async def _open(self, worker: Worker, pulse_fd: int) -> trio.Process:
        """Start the process. Raises OSError."""
        health = [worker.health.fileno()] if worker.health is not None else []
        # Modules come from where ours do, and never from the working directory (-P). What an init
        # system wants to hear comes from the supervisor alone.
        environ = {name: value for name, value in os.environ.items() if name not in pulse.VARIABLES}
        return await trio.lowlevel.open_process(
            command(self.role, worker.number),
            stdin=subprocess.PIPE,
            pass_fds=[*health, pulse_fd],
            env={**environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    async def _hear(self, worker: Worker, signs: trio.lowlevel.FdStream) -> None:
        """Read a process's signs of life until it closes its end of the pipe."""
        async with signs:
            async for sign in signs:
                worker.silence, worker.gives_signs = 0, True
                if pulse.STARTED in sign:
                    worker.serves = True
                    if self.watcher is not None and all(each.serves for each in self.workers):
                        self.watcher.started()

    async def _kill_when_silent(self, worker: Worker, process: trio.Process) -> None:
        while worker.silence < (SILENCE if worker.gives_signs else FIRST_SILENCE):
            await trio.sleep(TICK)
            worker.silence += 1
        log.error(
            "worker_killed", worker=worker.number, pid=process.pid, silence=worker.silence,
            reason="it gave no sign of life: stopped, or one of its threads hangs",
        )  # fmt: skip
        process.kill()

    async def _instruct(self, worker: Worker, process: trio.Process, pulse_fd: int) -> None:
        task = Task(self.role, worker.number, worker.config, pulse_fd)
        async with trio.open_nursery() as nursery:
            await self._order(worker, process, msgspec.json.encode(task) + b"\n")
            nursery.start_soon(self._pass_looks_on, worker, process)
            await self.stop.wait()
            await self._order(worker, process, STOP)
            await self.at_once.wait()
            await self._order(worker, process, STOP)
            await trio.sleep(KILL_AFTER)
            process.kill()
            nursery.cancel_scope.cancel()

    def _look(self) -> None:
        asked, self.look = self.look, trio.Event()
        asked.set()

    async def _pass_looks_on(self, worker: Worker, process: trio.Process) -> None:
        while True:
            await self.look.wait()
            await self._order(worker, process, LOOK)

    async def _order(self, worker: Worker, process: trio.Process, order: bytes) -> None:
        """Write to a worker's stdin. Ignores a worker that is ending, whose exit code says more."""
        assert process.stdin is not None
        async with worker.ordering:
            try:
                await process.stdin.send_all(order)
            except trio.BrokenResourceError:
                pass

    # Health.

    def _routes(self) -> dict[str, admin.Route]:
        return {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/statusz": self._statusz,
            "/metrics": self._metrics,
        }

    async def _livez(self) -> admin.Answer:
        """Return why a worker fails. One that does not answer fails like one that hangs."""
        answers = await self._ask_all("/livez")
        now = trio.current_time()
        silent = [
            worker.number
            for worker, answer in zip(self.workers, answers, strict=True)
            if not (answer and answer["live"]) and worker.process is not None and now - worker.since > START_PATIENCE
        ]
        return admin.json_answer({"live": not silent, "silent_workers": silent}, 503 if silent else 200)

    async def _readyz(self) -> admin.Answer:
        answers = await self._ask_all("/readyz")
        reasons = [
            f"worker {worker.number}: {reason}"
            for worker, answer in zip(self.workers, answers, strict=True)
            for reason in (answer["reasons"] if answer is not None else [_absence(worker)])
        ]
        warnings = [
            f"worker {worker.number}: {warning}"
            for worker, answer in zip(self.workers, answers, strict=True)
            for warning in (answer.get("warnings", ()) if answer is not None else ())
        ]
        whole = {"ready": not reasons, "reasons": reasons} | ({"warnings": warnings} if warnings else {})
        return admin.json_answer(whole, 503 if reasons else 200)

    async def _statusz(self) -> admin.Answer:
        return admin.json_answer(await self._status())

    async def _metrics(self) -> admin.Answer:
        return admin.metrics_answer(await self._status())

    async def _status(self) -> dict[str, Any]:
        answers = await self._ask_all("/statusz")
        shown = [
            {
                "worker": worker.number,
                "pid": worker.process.pid if worker.process is not None else 0,
                "admin": format_endpoint(*_address(worker)),
                "restarts": worker.restarts,
                **(answer if answer is not None else {"reason": _absence(worker)}),
            }
            for worker, answer in zip(self.workers, answers, strict=True)
        ]
        return {"role": self.role, "workers": shown}

    async def _ask_all(self, path: str) -> list[Mapping[str, Any] | None]:
        """Return every worker's own answer, or None from a worker that did not answer in time."""
        answers: list[Mapping[str, Any] | None] = [None] * len(self.workers)

        async def ask(index: int, worker: Worker) -> None:
            with trio.move_on_after(PATIENCE):
                try:
                    answers[index] = await _get(*_address(worker), path)
                except (OSError, trio.BrokenResourceError, msgspec.DecodeError):
                    pass

        async with trio.open_nursery() as nursery:
            for index, worker in enumerate(self.workers):
                if worker.process is not None:
                    nursery.start_soon(ask, index, worker)
        return answers


@contextmanager
def _reserved(address: str, key: str) -> Iterator[str]:
    """The address for all workers to share, ours until the end.

    Bound alone first, so that somebody else's socket is told now, also one that would share. The
    one that stays never listens, so that no connection comes to it: it makes port 0 one port, and
    keeps it while a worker is away.
    """
    host, port = parse_endpoint(address)
    if port:
        bound_socket(host, port, key=key).close()
    with bound_socket(host, port, key=key, shared=True) as sock:
        yield format_endpoint(*sock.getsockname()[:2])


def worker_config(config: Config, role: str, number: int, listen: str, admin_address: str) -> Config:
    """Return the configuration of one worker, with its own parts of what the workers share."""
    section = getattr(config, role)
    own: dict[str, Any] = {"listen": listen, "admin": admin_address}
    if isinstance(section, BrokerConfig):
        open_ports = section.open_ports
        part = slice_of(open_ports.range, number, section.workers) if open_ports.range else ""
        own["node_id"] = f"{section.node_id or host_name()}.{number}"
        own["port_range"] = slice_of(section.port_range, number, section.workers)
        own["open_ports"] = msgspec.structs.replace(open_ports, own=part)
    return msgspec.structs.replace(config, **{role: msgspec.structs.replace(section, **own)})


def command(role: str, number: int) -> list[str]:
    """Return the command line of a worker.

    Role and number are for `ps`; the task comes by stdin.
    """
    return [sys.executable, "-P", "-m", "rtunnel.workers", role, str(number)]


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # a realtime signal
        return f"signal {-status}"


def _absence(worker: Worker) -> str:
    return "does not answer" if worker.process is not None else f"does not run: {worker.fate}"


def _address(worker: Worker) -> tuple[str, int]:
    assert worker.health is not None
    host, port = worker.health.getsockname()
    return host, port


async def _get(host: str, port: int, path: str) -> Mapping[str, Any]:
    """Return the JSON of one of our own endpoints, which closes the connection after it."""
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: worker\r\n\r\n".encode())
        answer = b"".join([piece async for piece in stream])
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=dict[str, Any])


# --- a worker -------------------------------------------------------------------------------------


def main() -> None:
    """Run a worker's process, which only a supervisor starts."""
    line, early = _first_line()
    try:
        task = msgspec.json.decode(line, type=Task)
    except msgspec.DecodeError:
        sys.exit("rtunnel: a worker is started by its supervisor: use `rtunnel ROLE --workers N`")
    logs.setup(task.config.log, worker=task.number)
    role = roles.find_role(task.role)
    watcher = pulse.Supervised(task.pulse)
    main = partial(roles.run_roles, [role], task.config, partial(_obey, early), watcher)
    # The supervisor has checked the configuration, and has logged the warnings.
    sys.exit(roles.run_process(role.name, [], main))


def _first_line() -> tuple[bytes, bytes]:
    """Return the first line of stdin, and the bytes behind it."""
    data = b""
    while b"\n" not in data and (piece := os.read(0, 1 << 16)):
        data += piece
    line, _, rest = data.partition(b"\n")
    return line, rest


class _Orders:
    """What a worker does at the supervisor's orders, and at signals."""

    def __init__(self, stop: trio.Event, at_once: Callable[[], object]) -> None:
        self._stop = stop
        self._at_once = at_once
        self._stops = 0  # orders to stop, so far

    def take(self, orders: bytes | bytearray) -> None:
        """Follow a piece of the supervisor's orders; the second order to stop means "at once"."""
        if LOOK in orders:
            self._look("the supervisor")
        self._stops += orders.count(STOP)
        if self._stops:
            self.stop("the supervisor")
        if self._stops > 1:
            log.warning("stopping_at_once", by="the supervisor")
            self._at_once()

    async def heed(self, signals: AsyncIterator[int]) -> None:
        """Follow signals: SIGHUP means "check the files", and every other one means "stop"."""
        async for number in signals:
            name = signal.Signals(number).name
            self._look(name) if number == signal.SIGHUP else self.stop(name)

    def stop(self, by: str) -> None:
        """Stop the roles in order. Later calls have no effect."""
        if not self._stop.is_set():
            log.info("stopping", by=by)
            self._stop.set()

    def _look(self, by: str) -> None:
        log.info("file_check_requested", by=by)
        look_now()


async def _obey(
    early: bytes, stop: trio.Event, at_once: Callable[[], object], *, task_status: trio.TaskStatus[None]
) -> None:
    """Watch for the end of a worker, instead of `roles.watch_signals`.

    `early`: orders that have been read already. Orders count, and the first signal, because a
    terminal and an init system may send signals to every process, beside the supervisor's orders.
    """
    todo = _Orders(stop, at_once)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as orders:
            nursery.start_soon(todo.heed, signals)
            task_status.started()
            todo.take(early)
            async for piece in orders:
                todo.take(piece)
            todo.stop("the supervisor's end")


if __name__ == "__main__":
    main()
