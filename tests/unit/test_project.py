"""The project's own files: Makefile, hooks, lock file and pages for contributors agree with each other."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
#: Pages for contributors, which name files and verbs.
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "docs/releasing.md")


def verbs() -> set[str]:
    """The targets that a person calls."""
    (line,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)
    return set(line.split())


# --- make -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_verb() -> None:
    """Each verb has a comment behind ##, which `make help` shows."""
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines() if len(line.split()) > 1} == verbs()


def test_pages_name_verbs_that_exist() -> None:
    """`make X` in a page for contributors or in README is a target."""
    for page in (*PAGES, "README.md"):
        text = (ROOT / page).read_text()
        named = {verb for words in re.findall(r"`make ([a-z -]+)", text) for verb in words.split()}
        assert named <= verbs(), page


def test_hooks_are_the_checks_of_make_lint() -> None:
    """The pre-commit hooks run the commands of `make lint`, in the same order, and nothing from the network."""
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in repository["hooks"])


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page: str) -> None:
    """Every link and every path in code marks leads to a file or folder."""
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+)?|[\w-]+\.(?:md|toml|lock))`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert paths and links and not missing


# --- tests ------------------------------------------------------------------------------------------------------------


def test_hostile_peers_subclass_no_code_under_test() -> None:
    """A peer that inherits the protocol's code would inherit its faults, and hide them."""
    for path in ("attackers", "handmade"):
        tree = ast.parse((ROOT / "tests" / "support" / f"{path}.py").read_text())
        bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
        assert bases <= {"Exception"}, path


# --- package metadata -------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml has no version of its own: the build reads rtunnel/__init__.py."""
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]


def test_classifiers_name_each_python_from_the_lowest() -> None:
    """The versions in the classifiers begin with the lowest allowed one, and have no gap."""
    found = re.findall(r":: 3\.(\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    lowest = int(PROJECT["requires-python"].removeprefix(">=3."))
    assert [int(minor) for minor in found] == list(range(lowest, lowest + len(found)))


# --- the lock file ----------------------------------------------------------------------------------------------------


def declared() -> list[Requirement]:
    """The dependencies and extras of pyproject.toml, with the extra in the marker."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra, texts in PROJECT["optional-dependencies"].items():
        for text in texts:
            name, semicolon, marker = text.partition(";")
            condition = f"({marker}) and " if semicolon else ""
            found.append(Requirement(f"{name}; {condition}extra == '{extra}'"))
    return found


def locked() -> dict[str, dict[str, Any]]:
    return {package["name"]: package for package in LOCK["package"]}


def test_the_lock_file_has_the_declared_dependencies() -> None:
    """`uv.lock` was made from these names and bounds: after a change `make lock` must be run."""
    recorded = {(item["name"], item.get("specifier", "")) for item in locked()["rtunnel"]["metadata"]["requires-dist"]}
    assert recorded == {(canonicalize_name(item.name), str(item.specifier)) for item in declared()}
    assert LOCK["requires-python"] == PROJECT["requires-python"]


def test_locked_versions_are_allowed() -> None:
    """Each direct dependency is locked to a version that its bound allows."""
    versions = {name: package.get("version", "") for name, package in locked().items()}
    refused = [str(item) for item in declared() if versions[canonicalize_name(item.name)] not in item.specifier]
    assert not refused


def test_the_lock_file_names_pypi_only() -> None:
    """Everything comes from PyPI, and each file has a hash."""
    assert set(re.findall(r"https?://([^/\"]+)", (ROOT / "uv.lock").read_text())) == {
        "pypi.org",
        "files.pythonhosted.org",
    }
    for package in LOCK["package"]:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert package["source"] == {"editable": "."} or files
        assert all(file["hash"].startswith("sha256:") for file in files)
