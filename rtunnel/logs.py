"""Logs: one event a line on stderr, JSON or for people, from any thread, and never in the caller's way.

A logging call renders its line (microseconds) and puts it into a bounded queue; one daemon thread writes. When stderr
is stuck the queue fills, further lines are dropped, and `log_lines_dropped` tells how many as soon as writing works
again. So a terminal that somebody scrolls, or a full pipe, can't stop a relay.

Nothing that a peer sends can forge a line or drive a terminal: all characters outside the printable ones are escaped.
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

#: Lines waiting for stderr: some seconds of a busy gateway, a few MB.
QUEUE_LINES = 10_000
#: A longer line has its strings cut: no peer's value may fill the queue's memory.
MAX_LINE = 16 * 1024
_CUT = 512
#: The writer sleeps so long after a first line, and then writes all that came meanwhile at once: waking it for
#: every line would cost the caller more than the line.
GATHER = 0.02
#: How long `flush` waits for a stuck stderr.
FLUSH_TIMEOUT = 2.0
_BATCH_LINES = 512
#: A stretch of time for repeated lines.
THROTTLE_SECONDS = 10.0

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

Fields = MutableMapping[str, Any]
Render = Callable[[dict[str, Any]], bytes]


# --- repeated lines ---------------------------------------------------------------------------------------


class Throttle:
    """Keeps repeated lines few: so many of each kind in a stretch of time, the others are counted. One thread."""

    def __init__(self, seconds: float = THROTTLE_SECONDS) -> None:
        self._seconds = seconds
        self._kinds: dict[str, tuple[float, int, int]] = {}  # when the stretch began, lines in it, lines withheld

    def others(self, kind: str, now: float, lines: int = 1) -> int | None:
        """Return how many lines of this kind were withheld since the last one; None: withhold this one as well.

        `lines` of a kind are let through in each stretch. Kinds come from our own code: there are few. `now`: seconds
        of a monotonic clock.
        """
        began, told, withheld = self._kinds.get(kind, (now, 0, 0))
        if now >= began + self._seconds:
            began, told = now, 0
        if told >= lines:
            self._kinds[kind] = began, told, withheld + 1
            return None
        self._kinds[kind] = began, told + 1, 0
        return withheld


# --- the writer -------------------------------------------------------------------------------------------


class Writer:
    """A bounded queue of lines and the thread that writes them to a descriptor."""

    def __init__(self, fd: int, render: Render, limit: int = QUEUE_LINES) -> None:
        self.fd = fd
        self.limit = limit
        self.dropped = 0
        self._render = render
        self.restart()

    def restart(self) -> None:
        """Forget the queue and the thread: a forked child has no thread, and its parent writes the queue."""
        self._lines: deque[bytes | threading.Event] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._drops = threading.RLock()  # reentrant: a signal handler may log while its thread counts a drop
        self._unreported = 0
        self._thread: threading.Thread | None = None

    def redirect(self, fd: int, render: Render) -> None:
        """Write what is queued, then go on elsewhere."""
        self.flush()
        self.fd, self._render = fd, render

    def put(self, line: bytes) -> None:
        """Queue a line, newline included; never waits for the descriptor."""
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
        """Wait until all lines so far are written; False when the descriptor is still stuck after `timeout`."""
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
                except RuntimeError:  # the process is out of threads, or ending: better late than never
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
                # Somebody made the pipe non-blocking (it is shared with whoever holds the other copy).
                select.select([], [self.fd], [], 1.0)
            except OSError:
                return  # nobody reads any more: there is nowhere to say so


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """The lines in writes that a pipe takes whole (pipe(7)): workers share stderr, and larger ones could mix."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > select.PIPE_BUF:
            yield piece
            piece = b""
        piece += line
    yield piece


# --- rendering --------------------------------------------------------------------------------------------

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """The text with every character escaped that could move a cursor, break a line or turn the text around."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _is_harmless(char) else _escape(char) for char in text)


def _is_harmless(char: str) -> bool:
    # C: controls, formats (bidirectional overrides), surrogates, unassigned; Zl, Zp: line ends to some readers.
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")


def _escape(char: str) -> str:
    code = ord(char)
    return _ESCAPES.get(char) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


_second: tuple[int, str] = (0, "")


def timestamp() -> str:
    """Now, RFC 3339 in UTC with milliseconds."""
    global _second
    now = time.time()
    whole = int(now)
    known, text = _second  # one assignment below, one read here: threads can't mix two seconds
    if whole != known:
        text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        _second = (whole, text)
    return f"{text}{int((now - whole) * 1000):03d}Z"


_SIMPLE = (str, int, float, bytes, NoneType)
_SIMPLE_TYPES = frozenset((*_SIMPLE, bool))


def _plain(value: Any) -> Any:
    """The value as JSON has it. An object is what it says of itself, and not its fields: it may hold a key."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return str(value)


_encode = msgspec.json.Encoder(enc_hook=str).encode
_NOT_PLAIN = re.compile(r"[^\x20-\x7e]")


def render_json(fields: dict[str, Any]) -> bytes:
    """One JSON object and a newline, in printable ASCII and printable Unicode only."""
    try:
        if not _SIMPLE_TYPES.issuperset(map(type, fields.values())):  # most lines have nothing else
            fields = {name: _plain(value) for name, value in fields.items()}
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
    """The same event made of short plain strings: values that can't be encoded, and far too long ones, end here."""
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
        # The end of a traceback says more than its beginning.
        text = f"{text[: limit // 2]}... {len(text) - limit} characters ...{text[-(limit // 2) :]}"
    return text.encode("utf-8", "backslashreplace").decode()


_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_WORD = re.compile(r"[^\s\"'=\\]+")


def render_console(fields: dict[str, Any], colour: bool = False) -> bytes:
    """`12:00:01.123 info    event  key=value ...`; a traceback follows indented."""
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
    """As it is when nothing in it could be taken for the line's own structure; else in quotes, with escapes."""
    if _WORD.fullmatch(text) and printable(text) == text:
        return text
    quoted = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{quoted}"'


# --- structlog --------------------------------------------------------------------------------------------


def event_line(render: Render, **common: Any) -> structlog.typing.Processor:
    """The only processor: fields in, bytes of one line out, with `common` in each. It never raises: a line about
    itself comes instead."""

    def process(logger: Any, method: str, fields: Fields) -> bytes:
        if "exc_info" in fields or "stack_info" in fields:
            fields = structlog.processors.format_exc_info(logger, method, fields)
        head = {"time": timestamp(), "level": method, "event": fields.pop("event", ""), **common}
        line = {**head, **fields}
        if len(line) != len(head) + len(fields):  # a field of our own name: ours wins
            line = dict(head)
            line.update({name if name not in line else f"{name}_": value for name, value in fields.items()})
        try:
            return render(line)
        except Exception as error:
            return render({**dict(list(line.items())[:2]), "event": "log_failed", "error": type(error).__name__})

    return cast("structlog.typing.Processor", process)


class _Output:
    """What structlog calls a logger: takes the line of any level."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = put
        self.msg = self.log = self.warn = self.fatal = put


class _Bridge(logging.Handler):
    """Lines of libraries that log with the standard module, and Python's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record on as an event."""
        level = record.levelname.lower()
        logger = get_logger(record.name)
        method = getattr(logger, level if level in LEVELS else "warning")
        info = {"exc_info": record.exc_info} if record.exc_info else {}
        try:
            method("library_message", text=record.getMessage(), **info)
        except Exception:
            method("library_message", text=str(record.msg))


_writer: Writer | None = None
_bridge: _Bridge | None = None
#: One list for good: loggers that are already in use follow a later set-up, and `structlog.testing` finds it.
_processors: list[structlog.typing.Processor] = []
_debugging = True  # as structlog before `setup`


def setup(config: LogConfig, *, fd: int = 2, **common: Any) -> None:
    """Direct all logging of this process to `fd` as configured; every line carries `common`.

    May be called again: loggers in use follow in all but the level.
    """
    global _debugging
    _debugging = config.level == "debug"
    console = config.format == "console" or (config.format == "auto" and os.isatty(fd))
    colour = console and os.isatty(fd) and not os.environ.get("NO_COLOR")
    render = (lambda fields: render_console(fields, colour)) if console else render_json
    output = _Output(_open_writer(fd, render).put)
    _processors[:] = [event_line(render, **common)]
    structlog.configure(
        processors=_processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[config.level]),
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
    """Exceptions that nobody can catch become lines too: Python would print them raw, with what a peer put in them.

    Hooks that somebody else has set (a test runner) stay.
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
    """Wait until all lines so far are written; False when stderr is still stuck after `timeout`."""
    return _writer is None or _writer.flush(timeout)


def debugging() -> bool:
    """Return whether lines of level debug are written. On a hot path their fields are only made if so."""
    return _debugging


def get_logger(component: str) -> FilteringBoundLogger:
    """A logger whose lines carry `component`. On a hot path keep `get_logger(...).bind()`: it saves the look-up.

    Usable at import time: it takes the set-up that is in force at its first line.
    """
    return cast("FilteringBoundLogger", structlog.get_logger(component=component))
