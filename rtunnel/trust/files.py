"""Writes keys, certificates and trust lists atomically: a file is complete, or is not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

from rtunnel.errors import TrustError

PUBLIC: Final = 0o644
SECRET: Final = 0o600


@dataclass(frozen=True, slots=True)
class Made:
    """One file that was written, and what it is."""

    path: Path
    what: str


def write_new(directory: Path, files: Sequence[tuple[str, int, bytes, str]]) -> list[Made]:
    """Write all files (name, mode, content, what it is), or none, and return what was written.

    Never overwrites a file. Raises TrustError when one exists or cannot be written.
    """
    undo: list[Callable[[], object]] = []
    try:
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True)
            undo.append(directory.rmdir)
        for name, mode, data, _ in files:
            path = directory / name
            _create(path, mode, data, undo)
    except OSError as error:
        for step in reversed(undo):
            with suppress(OSError):
                step()
        if isinstance(error, FileExistsError):
            raise TrustError(
                f"{error.filename}: exists, and is not overwritten: use another directory or name"
            ) from None
        raise TrustError(f"{error.filename or directory}: can't be written: {error.strerror}") from None
    return [Made(directory / name, what) for name, _, _, what in files]


def replace(path: Path, mode: int, data: bytes) -> None:
    """Replace the content of a file. Raises TrustError.

    A reader sees the old content or the new one, also after a power cut. When root calls this, the
    file gets the owner of its folder, because that owner's process has to read it.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    undo: list[Callable[[], object]] = []
    try:
        _create(fresh, mode, data, undo)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.chown(fresh, owner.st_uid, owner.st_gid)
        fresh.replace(path)
    except OSError as error:
        for step in undo:
            with suppress(OSError):
                step()
        raise TrustError(f"{path}: can't be written: {error.strerror or error}") from None


def keep_trust_list(path: Path, mode: int, signed: bytes, log: FilteringBoundLogger, *, before: str = "") -> str:
    """Write the newest trust list for the next start; return why not, or "".

    `before`: what the last call returned; the same fault is logged once.
    """
    try:
        replace(path, mode, signed)
    except TrustError as error:
        if str(error) != before:
            hint = "the next start begins with an older list"
            log.warning("trust_list_not_kept", reason=str(error), hint=hint)
        return str(error)
    return ""


def _create(path: Path, mode: int, data: bytes, undo: list[Callable[[], object]]) -> None:
    # The mode is given at creation, whatever the umask, so that a secret is never readable by
    # others.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    undo.append(path.unlink)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
