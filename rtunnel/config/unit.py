"""Reads what a systemd unit gives a role: variables, credentials and the user.

`rtunnel config check --unit` uses them, because a check in root's shell has other variables than
the unit, and may read files that the unit's user may not.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rtunnel.config.sections import FILE, KEYS, Config
from rtunnel.config.values import Problem

#: Where systemd keeps StateDirectory= of the system's units (%S in a unit).
STATE_ROOT: Final = "/var/lib"
_DYNAMIC: Final = ("yes", "true", "1", "on")


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit file, as far as a role's configuration hangs on it."""

    # Credentials stand in it by the paths that systemd copies them from.
    environment: dict[str, str]
    credentials: frozenset[str]  # those paths
    other_user: bool  # it does not run as root


def read_unit(path: Path) -> Unit:
    """Read a unit file, its drop-ins (`NAME.service.d/*.conf` beside it) and its environment files.

    Raises OSError, or ValueError for a line that cannot be read.
    """
    settings: dict[str, list[str]] = {}
    for file in (path, *sorted(path.with_name(f"{path.name}.d").glob("*.conf"))):
        for line in file.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            name, equals, value = line.strip().partition("=")
            if not equals or name.startswith(("#", ";")):
                continue
            if value.strip():
                settings.setdefault(name.strip(), []).append(value.strip())
            else:  # systemd: an empty value takes back all before it
                settings.pop(name.strip(), None)
    credentials = dict(entry.split(":", 1) for entry in settings.get("LoadCredential", []) if ":" in entry)
    environment: dict[str, str] = {}
    for text in [*settings.get("Environment", []), *_environment_files(settings.get("EnvironmentFile", []))]:
        for entry in shlex.split(text):
            name, _, value = entry.partition("=")
            if value.startswith("%d/"):
                value = credentials.get(value.removeprefix("%d/"), value)
            environment[name] = value.replace("%S", STATE_ROOT)
    dynamic = settings.get("DynamicUser", [""])[-1].lower() in _DYNAMIC
    user = settings.get("User", ["root"])[-1]
    return Unit(environment, frozenset(credentials.values()), dynamic or user not in ("root", "0"))


def _environment_files(paths: list[str]) -> Iterator[str]:
    for path in paths:
        optional = path.startswith("-")
        try:
            lines = Path(path.removeprefix("-")).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            if not optional:
                raise
        else:
            yield from (line for line in lines if line.strip() and not line.lstrip().startswith(("#", ";")))


def unreadable(config: Config, unit: Unit, sections: tuple[str, ...]) -> list[Problem]:
    """Return the files of these sections that root can read and the unit's user cannot."""
    if not unit.other_user:
        return []
    found = []
    for key, leaf in KEYS.items():
        path = str(config.get(key)) if leaf.key.unit == FILE and key.partition(".")[0] in sections else ""
        if not path or path in unit.credentials or leaf.key.made or not Path(path).exists():
            continue
        if closed := _closed_to_others(Path(path)):
            name = Path(path).name
            fix = (
                f"hand it over: LoadCredential={name}:{path} and Environment={leaf.env}=%d/{name} in a drop-in, "
                f"or chmod o+rx {closed}"
            )
            found.append(config.problem(key, f"{path}: the unit's user cannot read it ({closed})", fix))
    return found


def _closed_to_others(path: Path) -> Path | None:
    """Return the part of the path that other users may not read or enter, or None."""
    for folder in reversed(path.resolve().parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None if path.stat().st_mode & stat.S_IROTH else path
