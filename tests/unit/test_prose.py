"""The prose in the code follows a few rules that a program can check."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "rtunnel",
    "agent/rtunnel_agent",
    "authority/rtunnel_authority",
    "broker/rtunnel_broker",
    "socks/rtunnel_socks",
)
WIDTH = 100
MIN_WORDS = 4
#: A docstring that begins with one of these is a fragment, or repeats another docstring.
FRAGMENTS = ("See", "Of", "By", "So", "For", "What", "Who", "Those")
#: Comments that tools read and that cannot be wrapped.
DIRECTIVE = re.compile(r"#.*?\b(noqa|type: ignore|pragma|mypy:)")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def public_docstrings(node: ast.AST, name: str = "module") -> Iterator[tuple[int, str, str]]:
    """Yield line, name and text of each docstring that does not belong to a private name."""
    if isinstance(node, _Documented) and (text := ast.get_docstring(node)) is not None:
        yield node.body[0].lineno, name, text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not child.name.startswith("_") or child.name.startswith("__"):
            yield from public_docstrings(child, child.name)


def faults_of_docstrings(source: str) -> list[str]:
    """Return a line for each public docstring that is too short, or begins with a fragment."""
    faults = []
    for line, name, text in public_docstrings(ast.parse(source)):
        words = text.split()
        if len(words) < MIN_WORDS:
            faults.append(f"{line}: {name}: fewer than {MIN_WORDS} words: {text}")
        elif words[0].rstrip(",:") in FRAGMENTS:
            faults.append(f"{line}: {name}: begins with {words[0]}")
    return faults


def long_lines(source: str) -> list[str]:
    """Return a line for each line of a docstring, or with a comment, over `WIDTH` columns."""
    lines = source.splitlines()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not DIRECTIVE.match(token.string):
            prose.add(token.start[0])
    return [f"{n}: {len(lines[n - 1])} columns" for n in sorted(prose) if len(lines[n - 1]) > WIDTH]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_of_a_file(path: Path) -> None:
    """Public docstrings are sentences, and no line of prose is too long."""
    source = path.read_text()
    assert not faults_of_docstrings(source) + long_lines(source)


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ('def f():\n    """Return it."""\n', 1),
        ('class A:\n    """See the protocol that it implements."""\n', 1),
        ('class A:\n    """Holds the sessions of one node."""\n', 0),
        ('def _f():\n    """Its life."""\n', 0),
        (f"x = 1  # {'word ' * 20}\n", 1),
        (f"x = '{'word ' * 20}'  # noqa: S311 {'word ' * 5}\n", 0),
        (f'"""{"word " * 20}"""\n', 1),
    ],
)
def test_the_checks_find_faults(source: str, faults: int) -> None:
    """Each check accepts good prose and finds bad prose."""
    assert len(faults_of_docstrings(source) + long_lines(source)) == faults
