"""Logs: lines that can't be forged, and a caller that never waits."""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from rtunnel import logs
from rtunnel.config import LogConfig
from rtunnel.trust.keys import new_token


class Pipe:
    """A descriptor to log to, and what arrived there."""

    def __init__(self) -> None:
        self.reader, self.fd = os.pipe()

    def lines(self) -> list[bytes]:
        """All lines so far."""
        assert logs.flush()
        return self.read().splitlines()

    def read(self) -> bytes:
        """What the pipe holds now."""
        os.set_blocking(self.reader, False)
        data = b""
        try:
            while chunk := os.read(self.reader, 65536):
                data += chunk
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        """Close both ends."""
        for fd in (self.reader, self.fd):
            try:
                os.close(fd)
            except OSError:
                pass


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    logs.setup(LogConfig())  # nothing later may write to a descriptor that is closed now
    structlog.reset_defaults()
    pipe.close()


def setup(pipe: Pipe, **values: str) -> Any:
    """Log to the pipe; a fresh logger."""
    logs.setup(LogConfig(**({"format": "json"} | values)), fd=pipe.fd)
    return logs.get_logger("test")


def test_a_line_is_one_json_object(pipe: Pipe) -> None:
    """time, level and event come first, then the component and the fields."""
    setup(pipe).info("stream_closed", target="10.1.0.7:9100", bytes_up=12, seconds=0.5, reason=None)
    (line,) = pipe.lines()
    event = json.loads(line)
    assert list(event) == ["time", "level", "event", "component", "target", "bytes_up", "seconds", "reason"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    assert (event["level"], event["event"], event["component"]) == ("info", "stream_closed", "test")
    assert (event["bytes_up"], event["seconds"], event["reason"]) == (12, 0.5, None)


def test_lines_below_the_level_are_not_written(pipe: Pipe) -> None:
    """level = warning leaves out debug and info."""
    log = setup(pipe, level="warning")
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [json.loads(line)["event"] for line in pipe.lines()] == ["c", "d"]


def test_fields_of_debug_lines_are_made_only_when_they_are_written(pipe: Pipe) -> None:
    """`debugging` follows the last set-up, and structlog's defaults, which drop nothing."""
    for level in ("info", "debug", "error"):
        setup(pipe, level=level)
        assert logs.debugging() == (level == "debug")
    structlog.reset_defaults()
    assert logs.debugging()


def test_fields_cant_replace_our_own(pipe: Pipe) -> None:
    """A field named time or level stands beside ours, not in its place."""
    setup(pipe).info("x", time="then", level="forged")
    event = json.loads(pipe.lines()[0])
    assert (event["level"], event["level_"], event["time_"]) == ("info", "forged", "then")


def test_a_traceback_is_a_field(pipe: Pipe) -> None:
    """An exception is logged in the same line."""
    log = setup(pipe)
    try:
        raise ValueError("broken\x1b[2J")
    except ValueError:
        log.exception("failed")
    (line,) = pipe.lines()
    event = json.loads(line)
    assert event["level"] == "error"
    assert "Traceback" in event["exception"] and "ValueError: broken" in event["exception"]
    assert b"\x1b" not in line


class Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_any_value_can_be_logged(pipe: Pipe) -> None:
    """Objects that can't be encoded, cycles, lone surrogates and huge numbers make a line all the same."""
    log = setup(pipe)
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (Unshowable(), cycle, "\ud800", 10**400, object(), {1: 2}, b"\xff", ValueError("x"), float("nan")):
        log.info("odd", value=value, after=1)
    lines = [json.loads(line) for line in pipe.lines()]
    assert [event["event"] for event in lines] == ["odd"] * 9
    assert all(event["after"] == 1 for event in lines)
    assert lines[7]["value"] == "ValueError: x"


def test_an_object_is_what_it_says_of_itself(pipe: Pipe) -> None:
    """Fields that a repr leaves out are left out of both formats: a token has its secret there."""
    token = new_token("ops")
    for format in ("json", "console"):
        log = setup(pipe, format=format)
        log.info("x", token=token, several=[token], named={"t": (token,)})
        (line,) = pipe.lines()
        assert line.count(b"Token(id='ops')") == 3
        assert base64.b64encode(token.secret)[:8] not in line


def test_long_values_are_cut(pipe: Pipe) -> None:
    """A line has a bounded length whatever a peer sends."""
    setup(pipe).info("long", value="x" * 1_000_000, **{f"field{n}": "y" * 10_000 for n in range(100)})
    (line,) = pipe.lines()
    assert len(line) < 2 * logs.MAX_LINE
    assert "999488 characters" in json.loads(line)["value"]


_nasty = st.text(st.characters() | st.sampled_from('\n\r\x1b\x7f\x9b\u2028\u202e\x00\t"\\\u0085'), max_size=30)


@given(_nasty, _nasty)
def test_no_value_breaks_a_line_or_a_terminal(event: str, value: str) -> None:
    """Whatever text an event or a value has, both formats are printable and in one line."""
    fields = {"time": logs.timestamp(), "level": "info", "event": event, "value": value, "list": [value]}
    for line in (logs.render_json(fields), logs.render_console(fields)):
        text = line.decode()
        assert text.endswith("\n")
        assert logs.printable(text[:-1]) == text[:-1]
    assert json.loads(logs.render_json(fields))["value"].encode("utf-8", "replace") is not None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_json_keeps_the_text(value: str) -> None:
    """Escaping for terminals does not change what a JSON reader gets."""
    assert json.loads(logs.render_json({"time": "", "level": "", "event": "", "value": value}))["value"] == value


def test_console_lines(pipe: Pipe) -> None:
    """The console format is readable, quotes what has spaces, and indents a traceback."""
    log = setup(pipe, format="console")
    log.warning("agent_joined", agent="h 7", port=31007, note='say "hi"', empty="")
    try:
        raise ValueError("multi\nline")
    except ValueError:
        log.exception("failed")
    first, *rest = (line.decode() for line in pipe.lines())
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} warning  agent_joined component=test agent="h 7" port=31007 '
        r'note="say \\"hi\\"" empty=""',
        first,
    )
    assert rest[0].endswith("failed component=test")
    assert rest[1] == "    | Traceback (most recent call last):"
    assert all(line.startswith("    | ") for line in rest[1:])


def test_auto_is_json_where_there_is_no_terminal(pipe: Pipe) -> None:
    """format = auto writes JSON into a pipe, and for people on a terminal."""
    setup(pipe, format="auto").info("x")
    assert json.loads(pipe.lines()[0])["event"] == "x"
    leader, follower = os.openpty()
    try:
        logs.setup(LogConfig(), fd=follower)
        logs.get_logger("test").info("x", a=1)
        assert logs.flush()
        assert b"component=test a=1" in os.read(leader, 4096)
    finally:
        logs.setup(LogConfig(), fd=pipe.fd)
        os.close(leader)
        os.close(follower)


def test_a_stuck_descriptor_blocks_nobody() -> None:
    """With a full pipe puts return at once; lines are dropped, and their count is told when it flows again."""
    reader, fd = os.pipe()
    size = fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
    writer = logs.Writer(fd, logs.render_json, limit=100)
    line = b"x" * 99 + b"\n"
    for _ in range(size // 100 + 2000):
        writer.put(line)
    assert not writer.flush(0.05)
    assert writer.dropped > 0
    dropped = writer.dropped
    data = bytearray()

    def read() -> None:
        while b"log_lines_dropped" not in data or not data.endswith(b"\n"):
            data.extend(os.read(reader, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    told = [msgspec.json.decode(item) for item in bytes(data).splitlines() if item.startswith(b"{")]
    assert (told[0]["event"], told[0]["count"]) == ("log_lines_dropped", dropped)
    os.close(reader)
    os.close(fd)


def test_a_non_blocking_descriptor_gets_everything(pipe: Pipe) -> None:
    """A pipe that someone made non-blocking loses nothing."""
    os.set_blocking(pipe.fd, False)
    log = setup(pipe)
    received = bytearray()
    os.set_blocking(pipe.reader, True)

    def read() -> None:
        while received.count(b"\n") < 3000:
            received.extend(os.read(pipe.reader, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(3000):
        log.info("x", number=number, fill="y" * 100)
    thread.join(10)
    assert [json.loads(line)["number"] for line in received.splitlines()] == list(range(3000))


def test_a_closed_reader_harms_nobody(pipe: Pipe) -> None:
    """When nobody reads stderr any more, logging goes on into nothing."""
    log = setup(pipe)
    os.close(pipe.reader)
    log.info("x")
    assert logs.flush()
    log.info("y")
    assert logs.flush()


def test_lines_of_threads_stay_whole(pipe: Pipe) -> None:
    """Many threads at once: every line arrives, whole, each thread's in its order."""
    log = setup(pipe)
    fcntl.fcntl(pipe.fd, fcntl.F_SETPIPE_SZ, 1 << 20)

    def work(name: int) -> None:
        for number in range(200):
            log.info("x", name=name, number=number)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in pipe.lines()]
    for name in range(8):
        assert [event["number"] for event in events if event["name"] == name] == list(range(200))


def test_loggers_in_use_follow_a_second_setup(pipe: Pipe) -> None:
    """A logger that has logged already writes to the new descriptor in the new format."""
    log = setup(pipe)
    log.info("first")
    other = Pipe()
    try:
        logs.setup(LogConfig(format="console"), fd=other.fd)
        log.info("second")
        assert b"second" in other.lines()[0]
        assert [json.loads(line)["event"] for line in pipe.read().splitlines()] == ["first"]
    finally:
        logs.setup(LogConfig(), fd=pipe.fd)
        other.close()


def test_structlogs_capture_works(pipe: Pipe) -> None:
    """Tests of other modules can use structlog.testing.capture_logs."""
    log = setup(pipe)
    log.info("before")
    with structlog.testing.capture_logs() as captured:
        log.info("inside", a=1)
    assert captured == [{"event": "inside", "a": 1, "component": "test", "log_level": "info"}]


def test_standard_logging_becomes_events(pipe: Pipe) -> None:
    """A library's warning is a line like ours, once, with its logger as component."""
    setup(pipe)
    setup(pipe)
    logging.getLogger("redis.client").warning("lost %s\n", "it")
    logging.getLogger("redis.client").info("quiet")
    (line,) = pipe.lines()
    event = json.loads(line)
    assert (event["event"], event["component"], event["text"]) == (
        "library_message_logged",
        "redis.client",
        "lost it\n",
    )


def run(code: str) -> subprocess.CompletedProcess[bytes]:
    """A program of its own."""
    # Python 3.12 warns of a fork beside a thread: that this one is safe is what is tested.
    quiet = ("-W", "ignore::DeprecationWarning")
    return subprocess.run([sys.executable, *quiet, "-c", code], capture_output=True, timeout=30, check=True)


def test_nothing_is_lost_at_exit() -> None:
    """What was logged just before the process ends is written."""
    code = "from rtunnel import logs, config; logs.setup(config.LogConfig()); logs.get_logger('x').info('last')"
    assert json.loads(run(code).stderr)["event"] == "last"


def test_a_forked_child_logs_too() -> None:
    """A child writes its own lines, and its parent's waiting ones only once."""
    code = (
        "import os\nfrom rtunnel import logs, config\nlogs.setup(config.LogConfig())\nlog = logs.get_logger('x')\n"
        "log.info('parent')\nchild = os.fork()\n"
        "if child == 0:\n    log.info('child'); logs.flush(); os._exit(0)\nos.waitpid(child, 0)\n"
    )
    events = [json.loads(line)["event"] for line in run(code).stderr.splitlines()]
    assert sorted(events) == ["child", "parent"]


def test_repeated_lines_are_few_and_counted() -> None:
    """So many of each kind in a stretch; the next stretch's first line tells how many were withheld."""
    throttle = logs.Throttle(10.0)
    assert [throttle.others("a", 0.1 * n, 2) for n in range(5)] == [0, 0, None, None, None]
    assert throttle.others("b", 0.5) == 0
    assert throttle.others("a", 9.9, 2) is None
    assert [throttle.others("a", 10.0, 2) for _ in range(3)] == [4, 0, None]
    assert throttle.others("a", 30.0, 2) == 1
