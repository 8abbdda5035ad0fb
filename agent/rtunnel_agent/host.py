"""The host id: it lets a restarted agent take its sessions back at once.

When two processes have one agent_id, a broker keeps the one whose link answers. After kill -9 the
new process must not wait until the old links are given up. Its Hello therefore carries a *host id*.
Two processes have the same one when the first has certainly ended before the second begins; a clone
has another one. It is a digest of

- the kernel's boot id: another machine, and the same machine after a reboot, have another one.
  (After a reboot no link of before can answer, and brokers find that out.)
- /etc/machine-id and the addresses of physical network cards: a machine that was cloned while it
  ran has the boot id of its template, but mostly not these;
- with an identity directory: a secret in it, and which file on which file system its lock is. The
  agent holds that lock, so no other process of this boot has the directory; a copy of it is another
  file;
- without one: the network namespace. Two processes there share their addresses, so a client that is
  led to the wrong one of them still reaches the right host.

Each process makes it once. A machine that is cloned *with its memory* therefore has two processes
with one host id until one of them is started again (docs/identity.md).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rtunnel.errors import TrustError
from rtunnel.trust.files import SECRET, replace

SECRET_FILE: Final = "host.secret"  # noqa: S105 - a file's name
SECRET_BYTES: Final = 32
#: Bytes of the digest that are used: two hosts with one agent_id have the same id by chance in one
#: of 2^64 cases.
HOST_ID_BYTES: Final = 8

_LABEL: Final = b"rtunnel host 1"


def host_id(identity: str, root: Path = Path("/")) -> bytes:
    """Return this process's host id; empty when the kernel has no boot id.

    `identity` is the identity directory, whose lock the caller holds, or "". `root` is where /proc,
    /sys and /etc are. Raises TrustError when the directory's secret can't be read or made.
    """
    boot = _read(root / "proc/sys/kernel/random/boot_id")
    if not boot:
        return b""
    place = _directory_parts(Path(identity)) if identity else [_inode(root / "proc/self/ns/net")]
    parts = [boot, _read(root / "etc/machine-id"), b" ".join(sorted(_cards(root / "sys/class/net"))), *place]
    digest = hashlib.sha256(_LABEL)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()[:HOST_ID_BYTES]


def _directory_parts(directory: Path) -> list[bytes]:
    path = directory / SECRET_FILE
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        secret = secrets.token_bytes(SECRET_BYTES)
        replace(path, SECRET, secret)
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror} (delete it: the agent makes another one)") from None
    return [secret, _inode(directory / "lock")]


def _inode(path: Path) -> bytes:
    """Return the file system and the inode of a file; empty when there is none."""
    try:
        found = path.stat()
    except OSError:
        return b""
    return f"{found.st_dev}:{found.st_ino}".encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:
        return b""


def _cards(classes: Path) -> Iterator[bytes]:
    """Yield the addresses of physical and virtio cards. Bridges change theirs too often."""
    try:
        cards = list(classes.iterdir())
    except OSError:
        return
    for card in cards:
        if (card / "device").exists():
            yield _read(card / "address")
