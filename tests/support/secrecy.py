"""No secret in a log, ever: a pytest plugin that listens to a whole session, and at its end looks for every secret.

What is listened to: each structlog event of this process as both formats would write it, what tests print to stderr,
what the helpers pass to `heard`, and every `*.log` below pytest's directory: there the processes of roles write theirs.

What counts as a secret: keys, tokens, private keys, password hashes and passwords in URLs that stand in any file below
the machine's directory for temporary files, from when this process first touches the file to the session's end; each
password that is hashed; and what is passed to `is_secret`. Each is looked for as it is and in hex, base64 (at any place
in something longer) and escapes. 16 characters of one are enough to be found.

The session fails when one is found, and names the test or file, the line without the secret, and whose secret it was.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rtunnel import logs

#: So much of a secret must be in a log to be found: less can be chance.
WINDOW: Final = 16
#: Raw bytes, as an escaped repr shows them.
RAW_WINDOW: Final = 10
#: Shorter passwords are words that stand in logs by themselves.
SHORTEST: Final = 8
#: Files that hold secrets are small.
_MAX_FILE: Final = 1 << 18
_TEMPORARY: Final = os.path.realpath(tempfile.gettempdir()) + "/"

_LINE = re.compile(rb"rtunnel-[a-z-]+-\d+[ .](?:[A-Za-z0-9_-]+[ .])?([A-Za-z0-9+/_-]{40,}=*)")
_PEM = re.compile(rb"-----BEGIN (?:EC )?PRIVATE KEY-----.*?-----END (?:EC )?PRIVATE KEY-----", re.DOTALL)
_HASH = re.compile(rb"\$scrypt\$[^$\s]{1,40}\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})")
_URL = re.compile(rb"(?:rediss?|redis\+sentinel|unix)://[^\s:@/\"']*:([^\s@/\"']+)@")
_RUN = re.compile(rf"[A-Za-z0-9+/_-]{{{WINDOW},}}")
_DIGITS = re.compile(r"[0-9]+")
_ESCAPED = re.compile(r"\\+(?:x([0-9a-fA-F]{2})|u00([0-9a-fA-F]{2}))")


@dataclass
class Secrets:
    """What must not be seen, and whose it is."""

    binary: dict[bytes, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)

    def add_bytes(self, secret: bytes, whose: str) -> None:
        """A key."""
        if len(secret) >= SHORTEST:
            self.binary.setdefault(secret, whose)

    def add_text(self, secret: str, whose: str) -> None:
        """A password. One word, or a few different letters, could stand anywhere."""
        if len(secret) >= SHORTEST and not secret.isalpha() and len({char for char in secret if char.isalnum()}) > 4:
            self.text.setdefault(secret, whose)

    def add_content(self, data: bytes, whose: str) -> None:
        """Whatever secrets a file or text has in it."""
        for found in _LINE.finditer(data):
            self.add_bytes(_decoded(found[1]), whose)
        for found in _PEM.finditer(data):
            self._add_key(found[0], whose)
        for found in _HASH.finditer(data):
            self.add_bytes(_decoded(found[1]), f"salt in {whose}")
            self.add_bytes(_decoded(found[2]), f"hash in {whose}")
        for found in _URL.finditer(data):
            self.add_text(unquote(found[1].decode("utf-8", "replace")), whose)

    def _add_key(self, pem: bytes, whose: str) -> None:
        try:
            key = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            return  # a damaged one, to be refused
        if isinstance(key, ec.EllipticCurvePrivateKey):
            # The number alone: around it a file has the public key, and constants. In PEM it begins at a multiple of
            # three bytes, or close enough to the start of a line that 16 characters of it stand in one.
            self.add_bytes(key.private_numbers().private_value.to_bytes(32, "big"), whose)


def _decoded(text: bytes) -> bytes:
    plain = text.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4))
    except ValueError:
        return b""


def _base64_of(secret: bytes) -> Iterator[str]:
    """The characters that any base64 of something with the secret in it has, wherever it begins."""
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret).decode()
        yield text[(0, 2, 3)[before] : len(text) - (0, 3, 2)[(before + len(secret)) % 3]]


def _windows(text: Any, size: int) -> Iterator[Any]:
    return (text[at : at + size] for at in range(len(text) - size + 1))


class Needles:
    """All forms of all secrets, ready to be looked for."""

    def __init__(self, secrets: Secrets) -> None:
        self._spelled: dict[str, str] = {}  # windows of base64 in one alphabet, and of hex in lower case
        self._raw: dict[bytes, str] = {}
        self._plain: dict[str, list[tuple[str, str]]] = {}  # by their first characters
        for secret, whose in secrets.binary.items():
            for form in (*_base64_of(secret), secret.hex()):
                for window in _windows(form, WINDOW):
                    self._spelled[window] = whose
            for raw in _windows(secret, RAW_WINDOW):
                self._raw[raw] = whose
        for text, whose in secrets.text.items():
            data = text.encode("utf-8", "surrogatepass")
            for form in (text, quote(text, safe=""), logs.printable(text), data.hex(), *_base64_of(data)):
                if len(form) >= SHORTEST:
                    self._plain.setdefault(form[:SHORTEST], []).append((form, whose))

    def find(self, line: str) -> tuple[str, str] | None:
        """(whose secret it is, the line without it) when the line has one."""
        for run in _RUN.findall(line):
            for at, window in enumerate(_windows(run, WINDOW)):
                same = window.replace("-", "+").replace("_", "/")
                whose = self._spelled.get(same) or self._spelled.get(window.lower())
                if whose:
                    return whose, line.replace(run[at:], "[...]")
        if "\\" in line:
            raw = _unescaped(line)
            for window in _windows(raw, RAW_WINDOW):
                if window in self._raw:
                    return self._raw[window], line[:40] + "[...]"
        for start in _windows(line, SHORTEST):
            for form, whose in self._plain.get(start, ()):
                if form in line:
                    return whose, line.replace(form, "[...]")
        return None


def _unescaped(line: str) -> bytes:
    """The bytes of a repr, however often it was escaped."""
    plain = _ESCAPED.sub(lambda found: chr(int(found[1] or found[2], 16)), line)
    return plain.encode("latin-1", "replace")


# --- one session ------------------------------------------------------------------------------------------------------

secrets = Secrets()


class Ears:
    """Writes down what is said, and by whom."""

    def __init__(self) -> None:
        self.test = "before the first test"
        #: By the line without its numbers, so that each kind is kept once: a secret has letters too.
        self._lines: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def hear(self, text: str, who: str = "") -> None:
        """Some lines."""
        with self._lock:
            for line in text.splitlines():
                self._lines.setdefault(_DIGITS.sub("0", line), (line, who or self.test))

    def event(self, method: str, fields: dict[str, Any]) -> None:
        """A log event, as each format writes it."""
        for render in (logs.render_json, logs.render_console):
            line = logs.event_line(render)(None, method, dict(fields))
            assert isinstance(line, bytes)
            self.hear(line.decode("utf-8", "replace"))

    def lines(self) -> Iterator[tuple[str, str]]:
        """(line, who said it first), for all that differ in more than their numbers."""
        return iter(self._lines.values())


ears = Ears()


def heard(text: str, who: str = "") -> None:
    """What a process said on a stream that is for logs."""
    ears.hear(text, who)


def is_secret(text: str, whose: str) -> str:
    """The text, which no log may have from now on."""
    secrets.add_text(text, whose)
    return text


def _listen_to_structlog() -> None:
    base: Any = structlog.BoundLoggerBase
    process = base._process_event

    def listening(self: Any, method: str, event: str | None, fields: dict[str, Any]) -> Any:
        ears.event(method, {**self._context, **fields, "event": event})
        return process(self, method, event, fields)

    base._process_event = listening


_busy = threading.local()


def _watch_files(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: before a file is read, overwritten, replaced or removed, it may hold a secret that goes then."""
    if event == "open" or event == "os.remove":
        path = arguments[0]
    elif event == "os.rename":
        path = arguments[1]
    else:
        return
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str) and path.startswith(_TEMPORARY) and not getattr(_busy, "now", False):
        _busy.now = True
        try:
            read_for_secrets(path)
        finally:
            _busy.now = False


#: Not looked into: logs, and code, whose examples are no secrets.
_NO_SECRETS: Final = (".log", ".sock", ".py", ".pyc")


def read_for_secrets(path: str) -> None:
    """Take in the secrets of a file, if it is one and small."""
    if path.endswith(_NO_SECRETS):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return
    try:
        if os.fstat(descriptor).st_size <= _MAX_FILE:
            secrets.add_content(os.read(descriptor, _MAX_FILE), path)
    except OSError:
        pass  # a directory
    finally:
        os.close(descriptor)


def _hash_passwords() -> None:
    module: Any = hashlib
    scrypt = module.scrypt

    def noting(password: bytes, **options: Any) -> bytes:
        secrets.add_text(bytes(password).decode("utf-8", "replace"), f"a password in {ears.test}")
        found: bytes = scrypt(password, **options)
        secrets.add_bytes(found, f"the hash of a password in {ears.test}")
        return found

    module.scrypt = noting


# --- pytest -----------------------------------------------------------------------------------------------------------

_found: dict[tuple[str, str], str] = {}  # (who, whose) -> line


def pytest_configure(config: pytest.Config) -> None:
    """Begin to listen."""
    _listen_to_structlog()
    _hash_passwords()
    sys.addaudithook(_watch_files)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Who says it from now on."""
    ears.test = nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What was printed to stderr."""
    ears.hear(report.capstderr, report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Look for every secret in everything that was said; the session fails when one is there."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and getattr(factory, "_basetemp", None) is not None:
        for path in Path(factory.getbasetemp()).rglob("*"):
            if path.is_file() and not path.is_symlink():
                if path.suffix == ".log":
                    ears.hear(path.read_text(errors="replace"), str(path))
                else:
                    read_for_secrets(str(path))
    needles = Needles(secrets)
    for line, who in ears.lines():
        if found := needles.find(line):
            _found.setdefault((who, found[0]), found[1][:500])
    if _found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):  # one of several processes: only the first one has a summary
        session.config.workeroutput["leaks"] = [(who, whose, line) for (who, whose), line in _found.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What another process of this run (`pytest -n`) has found; its secrets are not known here."""
    for who, whose, line in getattr(node, "workeroutput", {}).get("leaks", ()):
        _found.setdefault((who, whose), line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each leak, without the secret."""
    if _found:
        terminalreporter.section("secrets in logs", red=True, bold=True)
        for (who, whose), line in _found.items():
            terminalreporter.write_line(f"{who}: the log has a secret of {whose}\n    {line}")
