"""`--workers N`: N processes of one role on one port, and the supervisor that keeps them running.

A worker is an independent process with a fresh interpreter. A broker's worker is a node of its own:
it has its own name and its own part of the port ranges. Workers share the listening address
(SO_REUSEPORT: the kernel spreads connections), the `host` label and stderr, and nothing else. The
supervisor handles no connection.

    supervisor -> worker   the worker's stdin: one line of JSON, the `Task`; then single bytes:
                           `LOOK` for "check your files", `STOP` for "drain", another `STOP` for
                           "end at once". When stdin ends, the supervisor has ended: the worker
                           drains.
    worker -> supervisor   a pipe, with signs of life (rtunnel/pulse.py); the exit code; and health
                           over HTTP, on a listening socket that the worker inherits

The supervisor kills a worker that gives no signs of life, and starts it again: its listener would
go on taking its share of the connections.
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
from rtunnel.config import BrokerConfig, Config, GatewayConfig, format_endpoint, host_name, parse_endpoint, slice_of
from rtunnel.errors import EXIT_FAILED, EXIT_LISTEN, EXIT_OK, EXIT_USAGE
from rtunnel.net import bound_socket
from rtunnel.pulse import Watcher
from rtunnel.roles import Role
from rtunnel.watch import look_now

#: Seconds before a worker that died twice is started again (at once after its first death). The
#: pause doubles with each death up to the cap, and begins anew when a process has lived for
#: `STABLE` seconds.
BACKOFF_FIRST: Final = 0.25
BACKOFF_CAP: Final = 10.0
STABLE: Final = 60.0
#: Seconds from the order to end at once until a worker is killed.
KILL_AFTER: Final = 2.0
#: Seconds for a worker's answer about its health. A worker that does not answer counts as failing
#: only `START_PATIENCE` seconds after its start.
PATIENCE: Final = 1.0
START_PATIENCE: Final = 10.0
#: Seconds without a sign of life after which a worker is killed; a worker gives one each second. It
#: is the time after which agents give up a silent link. The supervisor counts its own ticks, so
#: that no worker is killed after the machine was suspended.
SILENCE: Final = 15
#: The same for the first sign, because the imports of 64 workers that start together take seconds.
FIRST_SILENCE: Final = 60
TICK: Final = 1.0
STOP: Final = b"."
LOOK: Final = b"h"
#: Exit codes of a worker that ended because it was told to. A terminal's signal may arrive before
#: the worker has set its handlers, and then kills it.
IN_ORDER: Final = (EXIT_OK, -signal.SIGTERM, -signal.SIGINT)

log = logs.get_logger("supervisor")


class Task(msgspec.Struct):
    """The task of a worker, sent by its stdin because it contains passwords."""

    role: str
    number: int
    config: Config
    pulse: int  # the descriptor for signs of life


def run(role: Role, config: Config) -> int:
    """Run a role in as many processes as its key `workers` says, and return the exit code.

    With one worker this is `roles.run`. Raises ConfigError when the checks before the start fail.
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
    """One worker: its settings, and the state of its present process."""

    number: int
    config: Config
    health: socket.socket | None  # a listening socket, the same for each process of the worker
    process: trio.Process | None = None
    since: float = 0.0  # trio's clock
    restarts: int = 0
    fate: str = "not started yet"  # of the last process
    # Held while an order is written to the worker's stdin.
    ordering: trio.Lock = field(default_factory=trio.Lock)
    silence: int = 0  # ticks since its last sign of life
    gives_signs: bool = False  # this process has given one
    serves: bool = False  # it has started


class Supervisor:
    """Starts the workers, passes orders to them, and starts a worker again when it ends."""

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
        """Run until all workers have ended, and return the exit code. Raises ListenError."""
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
                # The first process found a fault in its settings, and has logged it: a new process
                # would find it too. Later the fault may be temporary, and other workers may serve.
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
        """Run one process of the worker to its end, and return its exit status."""
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
        # The worker imports from the same folders as this process, and never from the working
        # directory (-P). Only the supervisor notifies the init system.
        environ = {name: value for name, value in os.environ.items() if name not in pulse.VARIABLES}
        return await trio.lowlevel.open_process(
            command(self.role, worker.number),
            stdin=subprocess.PIPE,
            pass_fds=[*health, pulse_fd],
            env={**environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    async def _hear(self, worker: Worker, signs: trio.lowlevel.FdStream) -> None:
        """Read a process's signs of life until the process closes its end of the pipe."""
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
            reason="it gave no sign of life: it is stopped, or one of its threads hangs",
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
        """Write an order to a worker's stdin. An error is ignored: the process has ended."""
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
        """Answer `/livez`: 503 when a worker says so, or has not answered in time."""
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
    """Hold the address that all workers share during the block, and yield it with its port.

    A first bind without SO_REUSEPORT fails when another program has the port, even if that program
    would share it. The socket that stays bound never listens, so the kernel gives it no connection.
    It turns port 0 into one port for all workers, and keeps the port while no worker runs. Raises
    ListenError.
    """
    host, port = parse_endpoint(address)
    if port:
        bound_socket(host, port, key=key).close()
    with bound_socket(host, port, key=key, shared=True) as sock:
        yield format_endpoint(*sock.getsockname()[:2])


def worker_config(config: Config, role: str, number: int, listen: str, admin_address: str) -> Config:
    """Return the configuration of worker `number`, with its own addresses, name and port ranges."""
    section = getattr(config, role)
    own: dict[str, Any] = {"listen": listen, "admin": admin_address}
    if isinstance(section, GatewayConfig):
        own["name"] = f"{section.name or host_name()}.{number}"
    if isinstance(section, BrokerConfig):
        open_ports = section.open_ports
        part = slice_of(open_ports.range, number, section.workers) if open_ports.range else ""
        own["node_id"] = f"{section.node_id or host_name()}.{number}"
        own["port_range"] = slice_of(section.port_range, number, section.workers)
        own["open_ports"] = msgspec.structs.replace(open_ports, own=part)
    return msgspec.structs.replace(config, **{role: msgspec.structs.replace(section, **own)})


def command(role: str, number: int) -> list[str]:
    """Return the command line of a worker. Role and number are there for `ps` only."""
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
    """Return the JSON that a worker's health endpoint answers for `path`."""
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: worker\r\n\r\n".encode())
        answer = b"".join([piece async for piece in stream])
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=dict[str, Any])


# --- a worker -------------------------------------------------------------------------------------


def main() -> None:
    """Run the process of a worker, and exit with its code. Only a supervisor starts it."""
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
    """Follows the supervisor's orders, and signals, in a worker."""

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
            log.warning("abort_requested", by="the supervisor")
            self._at_once()

    async def heed(self, signals: AsyncIterator[int]) -> None:
        """Follow signals: SIGHUP means "check the files", and every other one means "stop"."""
        async for number in signals:
            name = signal.Signals(number).name
            self._look(name) if number == signal.SIGHUP else self.stop(name)

    def stop(self, by: str) -> None:
        """Stop the roles in order. Later calls have no effect."""
        if not self._stop.is_set():
            log.info("stop_requested", by=by)
            self._stop.set()

    def _look(self, by: str) -> None:
        log.info("file_check_requested", by=by)
        look_now()


async def _obey(
    early: bytes, stop: trio.Event, at_once: Callable[[], object], *, task_status: trio.TaskStatus[None]
) -> None:
    """Set `stop` at the first order or signal to stop, and call `at_once` at the second order.

    This is a worker's `roles.watch_signals`. `early`: orders that were read behind the task. Only
    orders count towards `at_once`, because a terminal or an init system may send each signal to
    the workers too, beside the supervisor's orders.
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
