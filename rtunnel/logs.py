"""Writes logs: one event on each line of stderr, as JSON or for people, from any thread.

A logging call renders its line (microseconds) and puts it into a bounded queue; one daemon thread
writes. When stderr is stuck, the queue fills and further lines are dropped. `log_lines_dropped`
gives their number as soon as writing works again. Thus a stopped terminal or a full pipe cannot
stop a relay.

A peer's text cannot forge a line or control a terminal: all unprintable characters are escaped.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import select
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from types import NoneType
from typing import Any, cast

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger

from rtunnel.config import LogConfig

#: Lines that wait for stderr: some seconds of a busy gateway, a few MB.
QUEUE_LINES = 10_000
#: Characters of a line. The strings of a longer line are cut, so that no peer's value fills the
#: queue's memory.
MAX_LINE = 16 * 1024
_CUT = 512
#: Seconds that the writer sleeps after a first line, before it writes all lines together: to wake
#: it for every line would cost the caller more than the line.
GATHER = 0.02
#: Seconds that `flush` waits for a stuck stderr.
FLUSH_TIMEOUT = 2.0
_BATCH_LINES = 512
#: Seconds of one period of `Throttle`.
THROTTLE_SECONDS = 10.0

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

Fields = MutableMapping[str, Any]
Render = Callable[[dict[str, Any]], bytes]


# --- repeated lines -------------------------------------------------------------------------------


class Throttle:
    """Limits repeated lines: some of each kind in each period; the others are counted.

    Not thread-safe.
    """

    def __init__(self, seconds: float = THROTTLE_SECONDS) -> None:
        self._seconds = seconds
        # When the period began, lines in it, lines withheld.
        self._kinds: dict[str, tuple[float, int, int]] = {}

    def others(self, kind: str, now: float, lines: int = 1) -> int | None:
        """Return the lines of this kind withheld since the last one, or None to withhold this one.

        `lines` of a kind pass in each period. Kinds come from our own code: there are few. `now`:
        seconds of a monotonic clock.
        """
        began, told, withheld = self._kinds.get(kind, (now, 0, 0))
        if now >= began + self._seconds:
            began, told = now, 0
        if told >= lines:
            self._kinds[kind] = began, told, withheld + 1
            return None
        self._kinds[kind] = began, told + 1, 0
        return withheld


# --- the writer -----------------------------------------------------------------------------------


class Writer:
    """A bounded queue of lines, and the thread that writes them to a descriptor."""

    def __init__(self, fd: int, render: Render, limit: int = QUEUE_LINES) -> None:
        self.fd = fd
        self.limit = limit
        self.dropped = 0
        self._render = render
        self.restart()

    def restart(self) -> None:
        """Drop the queue and the thread, in a forked child: its parent writes the queue."""
        self._lines: deque[bytes | threading.Event] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        # Reentrant: a signal handler may log while its thread counts a drop.
        self._drops = threading.RLock()
        self._unreported = 0
        self._thread: threading.Thread | None = None

    def redirect(self, fd: int, render: Render) -> None:
        """Write the queued lines, then use another descriptor."""
        self.flush()
        self.fd, self._render = fd, render

    def put(self, line: bytes) -> None:
        """Queue a line, which includes its newline. Never waits for the descriptor."""
        if len(self._lines) >= self.limit:
            with self._drops:
                self._unreported += 1
                self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._start()

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait until all lines so far are written.

        Return False if that takes over `timeout` seconds.
        """
        if self._thread is None:
            return True
        done = threading.Event()
        self._lines.append(done)
        self._hurry.set()
        self._wake.set()
        return done.wait(timeout)

    def _start(self) -> None:
        with self._drops:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="rtunnel-log", daemon=True)
                try:
                    thread.start()
                # The process has too many threads, or is ending: the line waits for the next try.
                except RuntimeError:
                    self._wake.clear()
                    self._drain()
                else:
                    self._thread = thread

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(GATHER)
            self._hurry.clear()
            self._wake.clear()
            self._drain()

    def _drain(self) -> None:
        lines = self._lines
        while lines:
            batch: list[bytes] = []
            done: threading.Event | None = None
            while lines and len(batch) < _BATCH_LINES and done is None:
                item = lines.popleft()
                if isinstance(item, bytes):
                    batch.append(item)
                else:
                    done = item
            for piece in _pieces(batch):
                self._write(piece)
            self._report_drops()
            if done is not None:
                done.set()

    def _report_drops(self) -> None:
        with self._drops:
            count, self._unreported = self._unreported, 0
        if count:
            fields = {"level": "warning", "event": "log_lines_dropped", "component": "logs", "count": count}
            self._write(self._render({"time": timestamp(), **fields}))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                # Another holder of the pipe has made it non-blocking.
                select.select([], [self.fd], [], 1.0)
            except OSError:
                return  # nobody reads stderr any more, so that no report is possible


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """Yield pieces that a pipe writes atomically (pipe(7)), because workers share stderr."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > select.PIPE_BUF:
            yield piece
            piece = b""
        piece += line
    yield piece


# --- rendering ------------------------------------------------------------------------------------

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """Return the text with control, format and line-end characters escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _is_harmless(char) else _escape(char) for char in text)


def _is_harmless(char: str) -> bool:
    # C: controls, formats (bidirectional overrides), surrogates, unassigned; Zl and Zp: line ends
    # for some readers.
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")


def _escape(char: str) -> str:
    code = ord(char)
    return _ESCAPES.get(char) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


_second: tuple[int, str] = (0, "")


def timestamp() -> str:
    """Return the present time in UTC with milliseconds (RFC 3339)."""
    global _second
    now = time.time()
    whole = int(now)
    # One assignment below and one read here, so that threads cannot mix two seconds.
    known, text = _second
    if whole != known:
        text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        _second = (whole, text)
    return f"{text}{int((now - whole) * 1000):03d}Z"


_SIMPLE = (str, int, float, bytes, NoneType)
_SIMPLE_TYPES = frozenset((*_SIMPLE, bool))


def plain(value: Any) -> Any:
    """Return the value in types of JSON.

    An object becomes its text, not its fields, which may hold a key.
    """
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return str(value)


_encode = msgspec.json.Encoder(enc_hook=str).encode
_NOT_PLAIN = re.compile(r"[^\x20-\x7e]")


def render_json(fields: dict[str, Any]) -> bytes:
    """Return one JSON object and a newline, with printable characters only."""
    try:
        # Most lines have only these types.
        if not _SIMPLE_TYPES.issuperset(map(type, fields.values())):
            fields = {name: plain(value) for name, value in fields.items()}
        line = _encode(fields)
    except Exception:
        line = _encode(_tamed(fields))
    if len(line) > MAX_LINE:
        line = _encode(_tamed(fields))
    if not line.isascii() or b"\x7f" in line:
        line = _NOT_PLAIN.sub(_json_escape, line.decode()).encode()
    return line + b"\n"


def _json_escape(match: re.Match[str]) -> str:
    char = match[0]
    if _is_harmless(char):
        return char
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def _tamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the event as short plain strings, when it cannot be encoded or is too long."""
    tamed: dict[str, Any] = {}
    for name, value in list(fields.items())[:32]:
        plain = isinstance(value, int | float) and -(2**63) <= value < 2**63
        tamed[_short(name, 64)] = value if plain else _short(value, _CUT if name != "exception" else MAX_LINE // 2)
    return tamed


def _short(value: Any, limit: int) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as error:
        text = f"<{type(value).__name__} that can't be shown: {type(error).__name__}>"
    if len(text) > limit:
        # The end of a traceback is more useful than its beginning.
        text = f"{text[: limit // 2]}... {len(text) - limit} characters ...{text[-(limit // 2) :]}"
    return text.encode("utf-8", "backslashreplace").decode()


#: Names of the Elastic Common Schema for fields that have one; others become `rtunnel.<name>`.
ECS_NAMES = {
    "time": "@timestamp", "level": "log.level", "event": "event.action", "component": "log.logger",
    "text": "message", "reason": "event.reason", "code": "event.code", "exception": "error.stack_trace",
    "client": "source.ip", "peer": "source.ip", "user": "user.name", "target": "destination.address",
    "host": "host.name", "pid": "process.pid", "version": "service.version",
    "bytes_up": "source.bytes", "bytes_down": "destination.bytes",
}  # fmt: skip
_ECS_COMMON = {"ecs.version": "8.11.0", "service.name": "rtunnel"}


def render_ecs(fields: dict[str, Any]) -> bytes:
    """Return the line of `render_json` with the names of the Elastic Common Schema.

    `seconds` becomes `event.duration`, in nanoseconds. The names have dots and no objects: Elastic
    takes both.
    """
    line: dict[str, Any] = dict(_ECS_COMMON)
    for name, value in fields.items():
        if name == "seconds" and isinstance(value, int | float):
            line["event.duration"] = int(value * 1e9)
        else:
            known = ECS_NAMES.get(name, "")
            line[known if known and known not in line else f"rtunnel.{name}"] = value
    return render_json(line)


_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_WORD = re.compile(r"[^\s\"'=\\]+")


def render_console(fields: dict[str, Any], colour: bool = False) -> bytes:
    """Return a line for people, with a traceback indented below.

    `12:00:01.123 info    event  key=value ...`
    """
    rest = dict(fields)
    clock, level, event = (_short(rest.pop(name, ""), _CUT) for name in ("time", "level", "event"))
    trace = rest.pop("exception", "")
    shown = f"{level:<8}"
    if colour:
        shown = f"{_COLOURS.get(level, _COLOURS['error'])}{shown}\x1b[0m"
    pairs = "".join(
        f" {_console_word(_short(name, 64))}={_console_word(_short(value, _CUT))}" for name, value in rest.items()
    )
    head = f"{clock[11:-1]} {shown} {_console_word(event)}{pairs}\n"
    lines = _short(trace, MAX_LINE).splitlines() if trace else ()
    return (head + "".join(f"    | {printable(line)}\n" for line in lines)).encode("utf-8", "backslashreplace")


def _console_word(text: str) -> str:
    """Return the text unchanged if it cannot look like the line's structure, else quoted."""
    if _WORD.fullmatch(text) and printable(text) == text:
        return text
    quoted = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{quoted}"'


# --- structlog ------------------------------------------------------------------------------------


def event_line(render: Render, **common: Any) -> structlog.typing.Processor:
    """The only processor: turns fields into the bytes of one line, with `common` in each.

    It never raises: on an error it returns a line about itself.
    """

    def process(logger: Any, method: str, fields: Fields) -> bytes:
        if "exc_info" in fields or "stack_info" in fields:
            fields = structlog.processors.format_exc_info(logger, method, fields)
        head = {"time": timestamp(), "level": method, "event": fields.pop("event", ""), **common}
        line = {**head, **fields}
        # A field has the name of a common one, which is kept.
        if len(line) != len(head) + len(fields):
            line = dict(head)
            line.update({name if name not in line else f"{name}_": value for name, value in fields.items()})
        if _tapped:
            _tell(line)
        try:
            return render(line)
        except Exception as error:
            return render({**dict(list(line.items())[:2]), "event": "log_failed", "error": type(error).__name__})

    return cast("structlog.typing.Processor", process)


#: Lines with these names are also given to the function of `tap`.
_tapped: frozenset[str] = frozenset()
_tap: Callable[[Mapping[str, Any]], None] | None = None


def tap(names: frozenset[str], take: Callable[[Mapping[str, Any]], None]) -> None:
    """Give the fields of all further lines with these names to `take`, in the thread that logs.

    One function takes them: a later call replaces it. It must be quick, and must not log.
    """
    global _tapped, _tap
    _tap, _tapped = take, names


def _tell(line: Mapping[str, Any]) -> None:
    try:
        if _tap is not None and line["event"] in _tapped:  # an event may be of any type
            _tap(line)
    except Exception:  # noqa: S110 - the line itself is written all the same
        pass


class _Output:
    """A logger for structlog, which takes the line of any level."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = put
        self.msg = self.log = self.warn = self.fatal = put


class _Bridge(logging.Handler):
    """Passes on lines of libraries that use the standard module, and Python's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record on as an event."""
        level = record.levelname.lower()
        logger = get_logger(record.name)
        method = getattr(logger, level if level in LEVELS else "warning")
        info = {"exc_info": record.exc_info} if record.exc_info else {}
        try:
            method("library_message_logged", text=record.getMessage(), **info)
        except Exception:
            method("library_message_logged", text=str(record.msg))


_writer: Writer | None = None
_bridge: _Bridge | None = None
#: The same list for the life of the process: loggers in use follow a later set-up, and
#: `structlog.testing` finds it.
_processors: list[structlog.typing.Processor] = []
_without_debug: type | None = None  # the class of loggers that drop debug lines; None: none do


def setup(config: LogConfig, *, fd: int = 2, **common: Any) -> None:
    """Direct all logging of this process to `fd` as configured; every line carries `common`.

    May be called again: loggers in use follow in all but the level.
    """
    global _without_debug
    wrapper = structlog.make_filtering_bound_logger(LEVELS[config.level])
    _without_debug = None if config.level == "debug" else wrapper
    console = config.format == "console" or (config.format == "auto" and os.isatty(fd))
    colour = console and os.isatty(fd) and not os.environ.get("NO_COLOR")
    json_form = render_ecs if config.format == "ecs" else render_json
    render = (lambda fields: render_console(fields, colour)) if console else json_form
    output = _Output(_open_writer(fd, render).put)
    _processors[:] = [event_line(render, **common)]
    structlog.configure(
        processors=_processors,
        wrapper_class=wrapper,
        context_class=dict,
        logger_factory=lambda *_: output,
        cache_logger_on_first_use=True,
    )
    _bridge_standard_logging(max(LEVELS[config.level], logging.WARNING))
    _take_strays()


def _open_writer(fd: int, render: Render) -> Writer:
    global _writer
    if _writer is None:
        _writer = Writer(fd, render)
        atexit.register(flush)
        os.register_at_fork(after_in_child=_writer.restart)
    else:
        _writer.redirect(fd, render)
    return _writer


def _bridge_standard_logging(level: int) -> None:
    global _bridge
    if _bridge is None:
        _bridge = _Bridge()
        logging.getLogger().addHandler(_bridge)
    _bridge.setLevel(level)
    logging.captureWarnings(True)


def _take_strays() -> None:
    """Log exceptions that cannot be caught, because Python would print them unescaped.

    Hooks that another program has set (a test runner) stay.
    """
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _log_unraisable
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_dead_thread


def _log_unraisable(stray: sys.UnraisableHookArgs) -> None:
    fault = stray.exc_value or stray.exc_type
    get_logger("python").error("exception_ignored", where=stray.err_msg or repr(stray.object), exc_info=fault)


def _log_dead_thread(stray: threading.ExceptHookArgs) -> None:
    if not issubclass(stray.exc_type, SystemExit):
        name = stray.thread.name if stray.thread is not None else ""
        get_logger("python").critical("thread_died", thread=name, exc_info=stray.exc_value)


def flush(timeout: float = FLUSH_TIMEOUT) -> bool:
    """Wait until all lines so far are written.

    Return False if stderr is stuck after `timeout` seconds.
    """
    return _writer is None or _writer.flush(timeout)


def debugging() -> bool:
    """Return whether lines of level debug are written.

    On a hot path their fields are only made if so.
    """
    return structlog.get_config()["wrapper_class"] is not _without_debug


def get_logger(component: str) -> FilteringBoundLogger:
    """Return a logger whose lines have the field `component`.

    It may be called at import time: the set-up in force at the first line counts. On a hot path
    keep `get_logger(...).bind()`, which saves the lookup.
    """
    return cast("FilteringBoundLogger", structlog.get_logger(component=component))
