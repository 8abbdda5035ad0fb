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
#: A sentence that begins with one of these is a fragment, or a riddle.
FRAGMENTS = frozenset(("Of", "By", "For", "What", "Who", "Whose", "Those"))
#: A docstring that begins with one of these is a fragment too, or repeats another docstring.
FIRST_WORDS = FRAGMENTS | {"See", "So"}
#: Comments that tools read and that cannot be wrapped.
DIRECTIVE = re.compile(r"#.*?\b(noqa|type: ignore|pragma|mypy:)")

#: Methods whose first argument (or the second, behind a gateway) is the name of a log event.
LOGGING = frozenset(
    "critical debug error exception info log report stranger trace warn warning _fault _report _warn".split()  # noqa: SIM905
)
#: Irregular participles in names of log events; regular ones end in -ed.
PARTICIPLES = frozenset(("lost", "found", "taken", "died", "held", "kept", "shut", "given", "sent"))
#: Log events that say a state: the word is also a refusal code, a metric or a term of the field.
STATES = frozenset(("authority_unavailable", "config_warning", "on_one_host", "registry_unavailable"))

#: Errors whose first argument (the third of a Problem, the second of `problem`) is for people.
ERRORS = {
    **dict.fromkeys(("BadValue", "DemoFailed", "Failure", "PortsExhausted", "PortTaken", "RegistryUnavailable"), 0),
    **dict.fromkeys(("RoleMissing", "StoreFault", "TrustError", "ValueError"), 0),
    "Problem": 2,
    "problem": 1,
}
#: An error text says what failed, with one of these verbs.
VERBS = re.compile(
    r"\b(is|are|was|were|has|have|had|does|do|must|needs?|names|may|can|can't|cannot|matches|ends|overlaps"
    r"|keeps|makes|expired|expires|answered|closed|got|did|exists|holds)\b"
)

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
        elif words[0].rstrip(",:") in FIRST_WORDS:
            faults.append(f"{line}: {name}: begins with {words[0]}")
    return faults


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each block of comments that stand on lines of their own."""
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        if match := re.match(r"\s*#:? (?!-)(\S.*)", line):
            block.append(match[1])
        elif block:
            yield number - len(block), " ".join(block)
            block = []


def faults_of_sentences(source: str) -> list[str]:
    """Return a line for each sentence of a docstring or of a comment that is a fragment."""
    texts = list(comments(source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and (text := ast.get_docstring(node)) is not None:
            texts += [(node.body[0].lineno, " ".join(part.split())) for part in text.split("\n\n")]
    return [
        f"{line}: fragment: {sentence}"
        for line, text in texts
        for sentence in re.split(r"(?<=[.:]) (?=[A-Z])", text)
        if sentence.split()[:1] and sentence.split()[0].rstrip(",:") in FRAGMENTS
    ]


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


def log_events(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each log event that a file names in a call of a logging method."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        arguments = node.args[: 2 if name == "log" else 1] if name in LOGGING else []
        for argument in arguments:
            words = (argument.body, argument.orelse) if isinstance(argument, ast.IfExp) else (argument,)
            for word in words:
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield node.lineno, word.value


def faults_of_events(source: str) -> list[str]:
    """Return a line for each log event that is not a noun and then a participle (`session_opened`)."""
    faults = []
    for line, event in log_events(source):
        rest = event.split("_")[1:]
        if event not in STATES and not any(word.endswith("ed") or word in PARTICIPLES for word in rest):
            faults.append(f"{line}: event {event}")
    return faults


def wording(node: ast.expr) -> str | None:
    """Return the text of a literal, with {} for each value in it; None for another expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def faults_of_errors(source: str) -> list[str]:
    """Return a line for each literal error text without a verb; one that ends in {} is a prefix."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        place = ERRORS.get(name, len(node.args))
        text = wording(node.args[place]) if place < len(node.args) else None
        if text and len(re.findall(r"[a-z]{2,}", text)) > 1 and not text.endswith("{}") and not VERBS.search(text):
            faults.append(f"{node.lineno}: {name} without a verb: {text}")
    return faults


CHECKS = (faults_of_docstrings, faults_of_errors, faults_of_events, faults_of_sentences, long_lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_of_a_file(path: Path) -> None:
    """Docstrings and comments are sentences, log events say what happened, no line is too long."""
    source = path.read_text()
    assert not [fault for check in CHECKS for fault in check(source)]


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
        ('def _f():\n    """Return it. For one thread."""\n', 1),
        ("# What the client sends.\nx = 1\n", 1),
        ("# It is passed on. Of two, the\n# first one counts.\nx = 1\n", 1),
        ("# --- what is there ---\n# It waits for the rest.\nx = 1\n", 0),
        ('raise BadValue("unknown key", "use x")\n', 1),
        ('raise TrustError(f"{path}: far too long")\n', 1),
        ('yield config.problem(key, f"is {size} long")\nraise Failure(f"registry: {error}", 1)\n', 0),
        ('log.info("starting", pid=1)\n', 1),
        ('log.warning("session_up" if up else "session_ended")\n', 1),
        ('asked.log(gateway, "refused", code=1)\n', 1),
        ('log.error("trust_list_not_kept")\nlog.info("on_one_host")\n', 0),
    ],
)
def test_the_checks_find_faults(source: str, faults: int) -> None:
    """Each check accepts good prose and finds bad prose."""
    assert sum(len(check(source)) for check in CHECKS) == faults
