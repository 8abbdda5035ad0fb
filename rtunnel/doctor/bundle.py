"""Packs what the doctor knows into one tar.gz file, without a secret.

Keys, tokens and passwords are never read: their files are named, with mode and owner. The password
in `[registry] url` is cut out. Lines of logs, which other programs may have written, pass `redact`.
"""

from __future__ import annotations

import io
import os
import platform
import re
import ssl
import stat
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

import rtunnel
from rtunnel.config import KEYS, Config
from rtunnel.config.sections import FILE
from rtunnel.doctor.findings import Finding

#: The last lines of each log that are packed, and the bytes in which they are looked for.
MAX_LINES: Final = 2000
MAX_LOG_BYTES: Final = 1 << 20
#: Logs of one bundle.
MAX_LOGS: Final = 8
#: Packages whose versions matter, as pyproject.toml names them.
_PACKAGES: Final = ("click", "cryptography", "h11", "msgspec", "prometheus-client", "redis", "structlog", "trio")

_CUT: Final = "[cut]"
_SECRETS: Final = (
    # A registry's URL, whose password may hold any character when it was not quoted.
    re.compile(r"(?<=redis://|ediss://|tinel://)[^\s\"']*:[^\s\"']*(?=@)"),
    re.compile(r"(?<=://)[^\s/@\"']*:[^\s/\"']*(?=@)"),
    re.compile(r"(?i)(?<=password=)[^\s&\"']+"),
    # A line of a key file.
    re.compile(r"rtunnel-[a-z-]+-\d+[ .][^\s\"']+(?: [A-Za-z0-9+/_=-]{20,})?"),
    re.compile(r"\$scrypt\$\S+"),
    re.compile(r"(?i)(?<=bearer )[^\s\"']+"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/]{4,}=*"),
)
_PEM: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


class BundleError(Exception):
    """A bundle can't be written; the text names the file and the reason."""


def write(
    path: Path, config: Config, findings: Sequence[Finding], facts: Mapping[str, Any], logs: Sequence[Path]
) -> None:
    """Write the bundle, readable by its owner only; `logs`: files whose last lines are packed.

    Raises BundleError.
    """
    if len(logs) > MAX_LOGS:
        raise BundleError(f"{len(logs)} logs are given: give at most {MAX_LOGS}")
    contents = {
        "report.txt": "".join(f"{finding.line}\n" for finding in findings).encode(),
        "report.json": _json({"findings": findings, **facts}),
        "config.json": _json(configuration(config)),
        "versions.json": _json(versions()),
        **{f"statusz-{role}.json": _json(status) for role, status in _statuses(facts)},
        **{f"logs/{number}-{log.name}": tail(log, config).encode() for number, log in enumerate(logs, 1)},
    }
    try:
        with _private(path) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, data in contents.items():
                entry = tarfile.TarInfo(f"rtunnel-doctor/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
    except OSError as error:
        raise BundleError(f"{path} can't be written: {error.strerror or error}") from None


def _private(path: Path) -> io.FileIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # also when the file was there
    return io.FileIO(descriptor, "w")


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2) + b"\n"


def _statuses(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for role in facts.get("roles", ()):
        own = role.get("own")
        if own is not None and own.status is not None:
            yield str(role["role"]), own.status


def configuration(config: Config) -> list[dict[str, Any]]:
    """Return each key that was given, with its value and source; of a file also mode and owner."""
    return [
        {
            "key": key,
            "source": config.source(key),
            "value": without_password(str(config.get(key))) if key == "registry.url" else config.get(key),
            **(_file_facts(str(config.get(key)), leaf.key.secret) if leaf.key.unit == FILE else {}),
        }
        for key, leaf in KEYS.items()
        if key in config.sources
    ]


def without_password(url: str) -> str:
    """Return a URL without user, password and options."""
    parts = urlsplit(url)
    login, _, place = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{_CUT + '@' if login else ''}{place}{parts.path}"


def _file_facts(name: str, secret: bool) -> dict[str, Any]:
    try:
        found = Path(name).stat()
    except (OSError, ValueError) as error:
        return {"secret": secret, "file": getattr(error, "strerror", None) or str(error)}
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    return {"secret": secret, "file": {"mode": mode, "owner": found.st_uid, "size": found.st_size}}


def versions() -> dict[str, Any]:
    """Return the versions of rtunnel, its libraries, Python, OpenSSL and the kernel."""
    return {
        "rtunnel": rtunnel.__version__,
        "python": sys.version,
        "openssl": ssl.OPENSSL_VERSION,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def tail(log: Path, config: Config) -> str:
    """Return the last lines of a log without secrets. Raises BundleError.

    A file that the configuration names as a secret is not read.
    """
    for key, leaf in KEYS.items():
        if leaf.key.secret and (name := str(config.get(key))) and _same(log, Path(name)):
            raise BundleError(f"{log} is the secret file of {key}, and no log: give a log")
    try:
        if not stat.S_ISREG(log.stat().st_mode):
            raise BundleError(f"{log} is not a regular file: give a log, or the output of journalctl in a file")
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_LOG_BYTES))
            data = file.read(MAX_LOG_BYTES)
    except OSError as error:
        raise BundleError(f"{log} can't be read: {error.strerror or error}") from None
    text = redact(data.decode("utf-8", "replace"))
    return "".join(text.splitlines(keepends=True)[-MAX_LINES:])


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def redact(text: str) -> str:
    """Return a text without what looks like a secret: private keys, tokens, keys, passwords."""
    text = _PEM.sub(_CUT, text)
    for pattern in _SECRETS:
        text = pattern.sub(_CUT, text)
    return text
