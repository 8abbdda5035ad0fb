"""Another revision of rtunnel, to be measured beside this one in the same run, with the same libraries."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from bench.procs import BenchError

ROOT: Final = Path(__file__).resolve().parents[2]
#: Folders of a checkout that packages lie in (pyproject.toml, `dev-mode-dirs`).
_FOLDERS: Final = (".", "agent", "authority", "broker", "socks")
Sections = dict[str, dict[str, object]]

#: What that revision is asked: where it was found, and which configuration keys it has.
_ASK: Final = """
import json
import rtunnel, rtunnel_agent, rtunnel_broker, rtunnel_socks
from rtunnel.config import Config
modules = (rtunnel, rtunnel_agent, rtunnel_broker, rtunnel_socks)
config = Config()
sections = {name: getattr(config, name) for name in config.__struct_fields__}
keys = {name: section.__struct_fields__ for name, section in sections.items() if hasattr(section, "__struct_fields__")}
print(json.dumps({"files": [module.__file__ for module in modules], "keys": keys}))
"""


@dataclass(frozen=True)
class Code:
    """Whose rtunnel a process runs. `revision` is empty for the one that is installed here."""

    revision: str = ""
    folder: str = ""
    #: The configuration keys that it has, by section; empty for ours.
    known: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """What the names of its processes, nodes and agents end with."""
        return f"-{self.revision}" if self.revision else ""

    def named(self, system: str) -> str:
        """The name of a system that runs this code: `rtunnel-tls@8ecffe3`."""
        return f"{system}@{self.revision}" if self.revision else system

    @property
    def environ(self) -> Mapping[str, str]:
        """Variables that make Python find this code before what is installed."""
        if not self.folder:
            return {}
        return {"PYTHONPATH": os.pathsep.join(str(Path(self.folder) / name) for name in _FOLDERS)}

    def fitting(self, sections: Sections) -> Sections:
        """The sections without keys that this code does not know yet."""
        if not self.known:
            return sections
        return {
            name: {key: value for key, value in keys.items() if key in self.known[name]}
            for name, keys in sections.items()
        }


OURS: Final = Code()


def base_name(system: str) -> str:
    """The name of a system without its revision."""
    return system.partition("@")[0]


def short_name(revision: str) -> str:
    """The abbreviated commit of a revision. Raises BenchError when git does not know it."""
    done = _git("rev-parse", "--short", "--verify", f"{revision}^{{commit}}")
    return done.decode().strip()


def unpack(revision: str, folder: Path) -> Code:
    """Write the files of a revision into a folder. Raises BenchError.

    Not a worktree: nothing is left in the repository, however the bench ends.
    """
    commit = short_name(revision)
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")
    code = Code(commit, str(folder))
    return replace(code, known=_keys(code))


def _keys(code: Code) -> dict[str, frozenset[str]]:
    """The configuration keys of this code. Raises BenchError unless Python finds the code itself in its folder."""
    env = {**os.environ, **code.environ}
    command = [sys.executable, "-c", _ASK]
    done = subprocess.run(command, env=env, cwd=code.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"revision {code.revision} cannot be imported: {done.stderr}")
    told = json.loads(done.stdout)
    if strays := [path for path in told["files"] if not path.startswith(code.folder)]:
        raise BenchError(f"revision {code.revision}: Python finds {strays} instead of its files")
    return {name: frozenset(keys) for name, keys in told["keys"].items()}


def _git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)
    if done.returncode:
        raise BenchError(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout
