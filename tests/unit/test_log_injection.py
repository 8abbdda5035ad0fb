"""Nothing that a peer names makes a second line, another field, or a terminal do something: in both formats."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtunnel import logs
from support.effort import times

#: What breaks lines for some reader (str.splitlines knows them all), drives terminals, turns text around, or ends a
#: quoted string.
EVIL = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00\x07\x08\x1b\x7f\x9b\u200b\u202e\u2066\ufeff\ud800\udfff\U000e0001"
FORGED = (
    '\n{"time": "2026-01-01T00:00:00.000Z", "level": "info", "event": "forged"}\n',
    '\r\n12:00:00.000 info     forged component="x"\r\n',
    '", "event": "forged", "x": "',
    '" event=forged x="',
    '\\" event=forged x=\\"',
    "a event=forged level=info",
    "\x1b]0;title\x07\x1b[2J\x1b[31m",
    "\ud83d\ude00",
    "x\\",
)
#: Names and values: any text, a good part of it evil.
TEXT = st.one_of(st.text(max_size=20), st.text(st.sampled_from(EVIL + '"\\= ab'), max_size=20), st.sampled_from(FORGED))


class Shown:
    """An object whose text is a peer's."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


SCALARS = st.one_of(
    TEXT,
    TEXT.map(Shown),
    TEXT.map(ValueError),
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.none(),
    st.booleans(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
NAMES = TEXT.map(lambda text: text[:64])
FIELDS = st.dictionaries(NAMES, VALUES, max_size=4)


def line_of(render: logs.Render, event: str, fields: dict[str, Any], trace: str = "") -> str:
    """What the whole way from a logging call to the descriptor makes of it, decoded strictly."""
    if trace:
        try:
            raise ValueError(trace)
        except ValueError as error:
            fields = fields | {"exc_info": error}
    line = logs.event_line(render, component="gateway")(None, "warning", {"event": event, **fields})
    assert isinstance(line, bytes)
    return line.decode("utf-8", "strict")


def assert_harmless(text: str) -> None:
    """Nothing in it but printable characters, by logs' own rule and by Python's."""
    assert logs.printable(text) == text
    assert all(char.isprintable() or unicodedata.category(char) == "Zs" for char in text)
    assert len(text.splitlines()) <= 1


@settings(max_examples=times(80), deadline=None, derandomize=True)
@given(TEXT, FIELDS, TEXT)
@example("x", {"agent": FORGED[0]}, FORGED[0])
def test_a_json_line_is_one_object_with_our_fields(event: str, fields: dict[str, Any], trace: str) -> None:
    """One line; level, event and component are ours whatever a field is called; no key twice."""
    text = line_of(logs.render_json, event, fields, trace)
    assert text.endswith("\n")
    assert_harmless(text[:-1])
    pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    keys = [key for key, _ in pairs]
    assert keys[:4] == ["time", "level", "event", "component"]
    assert len(set(keys)) == len(keys)
    found = dict(pairs)
    assert re.fullmatch(r"[0-9T:.-]+Z", found["time"])
    assert (found["level"], found["component"]) == ("warning", "gateway")
    assert ("exception" in found) >= bool(trace)


_BARE = r"[^\s\"'=\\]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PIECE = re.compile(rf"(?P<name>{_BARE}|{_QUOTED})(?:=(?P<value>{_BARE}|{_QUOTED}))?(?: |$)")


def pieces_of(line: str) -> list[tuple[str, str | None]]:
    """A console line as a reader cuts it: words, and name=value; both bare or in quotes. Fails when there is more."""
    found, position = [], 0
    while position < len(line):
        match = _PIECE.match(line, position)
        assert match, (line, position)
        found.append((unquoted(match["name"]), match["value"] and unquoted(match["value"])))
        position = match.end()
    return found


def unquoted(word: str) -> str:
    """The text of a word."""
    if not word.startswith('"'):
        return word
    plain = {"n": "\n", "r": "\r", "t": "\t"}

    def char(match: re.Match[str]) -> str:
        code = match[0][1:]
        return chr(int(code[1:], 16)) if code[0] in "uU" else plain.get(code, code)

    return re.sub(r"\\(?:u[0-9a-f]{4}|U[0-9a-f]{8}|.)", char, word[1:-1])


@settings(max_examples=times(80), deadline=None, derandomize=True)
@given(TEXT, FIELDS, TEXT)
@example("x", {"text": FORGED[4], "error": ValueError(FORGED[5])}, "")
def test_a_console_line_has_our_fields_and_no_others(event: str, fields: dict[str, Any], trace: str) -> None:
    """Time, level, event, then each field once, told apart by quotes; a traceback stands behind bars."""
    fields.pop("exception", None)  # that one is a traceback
    head, *rest = line_of(logs.render_console, event, fields, trace).removesuffix("\n").split("\n")
    for line in (head, *rest):
        assert_harmless(line)
    assert all(line.startswith("    | ") for line in rest)
    assert bool(rest) >= bool(trace)
    time, level, shown = head[:12], head[13:21], head[22:]
    assert re.fullmatch(r"[0-9:.]{12}", time)
    assert level == "warning "
    (found, nothing), component, *pairs = pieces_of(shown)
    assert nothing is None
    assert found == seen(event)
    assert component == ("component", "gateway")
    ours = {"time", "level", "event", "component"}
    wanted = {f"{name}_" if name in ours else name: value for name, value in fields.items() if name not in HOOKED}
    if len(wanted) == len(pairs):  # else names that differ in a surrogate only
        for (name, value), (wanted_name, wanted_value) in zip(pairs, wanted.items(), strict=True):
            assert name == seen(wanted_name)
            if isinstance(wanted_value, str):
                assert value == seen(wanted_value)


#: Fields that mean something to structlog.
HOOKED = {"exc_info", "stack_info", "event"}


def seen(text: str) -> str:
    """Text as a line can carry it: lone surrogates are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def test_a_quote_in_a_value_does_not_end_it() -> None:
    """A value with a backslash before its quote, and an exception with spaces, stay one value."""
    head = line_of(logs.render_console, "x", {"who": '\\" level=error', "why": OSError("no level=error")})
    assert pieces_of(head.rstrip("\n")[22:]) == [
        ("x", None),
        ("component", "gateway"),
        ("who", '\\" level=error'),
        ("why", "no level=error"),
    ]


@pytest.mark.parametrize("evil", FORGED)
def test_a_librarys_message_is_one_line(evil: str) -> None:
    """Text that a library logs about a peer (redis-py repeats what a server said) goes the same way."""
    record = logging.LogRecord("redis", logging.WARNING, "x.py", 1, "lost %s", (evil,), None)
    line = line_of(logs.render_json, "library_message_logged", {"text": record.getMessage()})
    assert_harmless(line[:-1])
    assert json.loads(line)["text"].startswith("lost ")


STRAYS = """
import sys, threading, warnings
from rtunnel import config, logs
logs.setup(config.LogConfig(format="json"))
evil = sys.argv[1]

class Dying:
    def __del__(self):
        raise ValueError(evil)

def die():
    raise ValueError(evil)

warnings.warn(evil)
Dying()
thread = threading.Thread(target=die, name=evil)
thread.start()
thread.join()
logs.get_logger("x").info("last")
"""


def test_what_python_itself_would_print_is_a_line_too() -> None:
    """A warning, an exception in a finaliser, a thread that died: nothing on stderr but JSON, one object a line."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", STRAYS, FORGED[0] + "\u2028\x1b[2J"],
        capture_output=True, check=True, timeout=30,
    )  # fmt: skip
    text = done.stderr.decode()
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events] == [
        "library_message_logged",
        "exception_ignored",
        "thread_died",
        "last",
    ]
    assert all("forged" in str(event) for event in events[:-1])
    for line in text.removesuffix("\n").split("\n"):
        assert_harmless(line)
