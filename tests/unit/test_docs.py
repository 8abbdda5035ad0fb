"""docs/ as a site: every link leads somewhere, every page can be found, and generated pages are up to date."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rtunnel import config
from rtunnel.trust.policy import load_policy
from rtunnel.wire.refusal import Next, Refusal
from rtunnel_socks.dial import code_for_client
from support import refusal_pages
from support.commands import command_of, here_documents, shell_lines

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = [*PAGES, *sorted(ROOT.glob("*.md"))]
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
MAX_COLUMNS = 100
STOPS = {code for code in Refusal if code.reply.next is Next.STOP}


def name_of(path: Path) -> str:
    """The path as people write it."""
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """The targets of the page's links and pictures, but for those that lead out of the repository."""
    text = re.sub(r"`[^`\n]*`", lambda found: found[0] if "](" not in found[0] else "", prose(path))
    found = re.findall(r"\]\(([^()\s]+)\)", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a page's headings that mkdocs and code hosts spell in the same way."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        bare = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        by_host, by_site = bare.replace(" ", "-"), re.sub(r"[-\s]+", "-", bare)
        if by_host == by_site:
            found.add(by_site)
    return frozenset(found)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link's file exists, and its anchor is a heading there; a page of the site links to nothing outside."""
    dead = []
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        outside = DOCS in path.parents and DOCS not in there.parents
        if outside or not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_commands_on_pages_exist(path: Path) -> None:
    """Each rtunnel command in a block of shell is one, and its options are known."""
    for words in shell_lines(path.read_text(encoding="utf-8")):
        ours = words[words.index("--") + 1 :] if "--" in words else words
        if ours and Path(ours[0]).name == "rtunnel":
            end = next((n for n, word in enumerate(ours) if word in ("&", ">", "2>", "2>>", "|")), len(ours))
            command_of(ours[1:end])


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "tutorial.md"], ids=name_of)
def test_configurations_of_the_tours_are_good(path: Path, tmp_path: Path) -> None:
    """The files that the page writes load; what keys and tokens they name is made by the page's commands."""
    files = here_documents(path.read_text(encoding="utf-8"))
    assert "rtunnel.toml" in files
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert config.load(tmp_path / "rtunnel.toml", {}, {}).agent.addresses == ["127.5.0.7"]
    if "policy.toml" in files:
        load_policy(tmp_path / "policy.toml")


def nav(entries: Any) -> Iterator[str]:
    """The pages of the navigation, in order."""
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield from nav(entry)


def test_the_navigation_has_every_page() -> None:
    """Once; but for those that mkdocs.yml leaves to an index page, which links to each."""
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    listed = list(nav(SITE["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) <= pages
    patterns = SITE["not_in_nav"].split()
    left = {page for page in pages - set(listed) if not any(fnmatch(page, pattern) for pattern in patterns)}
    assert not left
    for folder in ("decisions", "refusals"):
        index = DOCS / folder / "index.md"
        others = {path.name for path in index.parent.glob("*.md")} - {"index.md"}
        assert others <= {target.partition("#")[0] for target in links(index)}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_prose_is_narrow(path: Path) -> None:
    """A line of prose has at most 100 columns; code, tables and links are as long as they are."""
    lines = prose(path).splitlines()
    wide = [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith(("|", "![", "    ", "<!--"))]
    assert not wide


def riddles(text: str) -> list[str]:
    """Return the sentences of a page's paragraphs that begin with a relative pronoun or a fragment."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    plain = [" ".join(part.split()) for part in paragraphs if not part.lstrip().startswith(("#", "|", "<!--"))]
    found = [sentence for part in plain for sentence in re.split(r"(?<=[.:]) (?=[A-Z*`])", part)]
    return [
        sentence for sentence in found if re.match(r"(?:[-*] |\d+\. )?\**(Of|Who|Whose|What|Those)\b[^?]*$", sentence)
    ]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_sentences_name_their_subject(path: Path) -> None:
    """No sentence begins with Of, Who, Whose, What or Those, unless it is a question."""
    assert not riddles(prose(path))


def test_riddles_are_found() -> None:
    """They are found in paragraphs and in lists, and not in headings and tables."""
    text = "# What it is\n\nIt is. Who gets nothing\nwaits.\n\n- **What ends.** It ends.\n\n| What |\n\nOf it? No.\n"
    assert [sentence.split()[0] for sentence in riddles(text)] == ["Who", "-"]


@pytest.mark.parametrize("path", sorted((DOCS / "decisions").glob("0*.md")), ids=name_of)
def test_a_decision_says_why_on_one_screen(path: Path) -> None:
    """Its number, date, context, decision and evidence, in at most 50 lines."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.name[:4]} ")
    assert re.search(r"^Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Evidence"]
    assert len(text.splitlines()) <= 50


@pytest.mark.parametrize(
    "package",
    [*sorted((ROOT / "rtunnel").rglob("__init__.py")), *sorted(ROOT.glob("*/rtunnel_*/__init__.py"))],
    ids=lambda path: path.parent.name,
)
def test_a_package_says_what_its_modules_are_for(package: Path) -> None:
    """Its first lines name each module."""
    text = package.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0]
    for module in package.parent.glob("*.py"):
        if not module.stem.startswith("__"):
            assert f"`{module.stem}`" in text, module.name


def test_architecture_shows_the_layers_that_lint_checks() -> None:
    """Each layer of import-linter's contract is a line of the picture, in the same order."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["rtunnel"])
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("## Layers")[2].split("```")[1]
    shown = [line[14:].strip() for line in picture.splitlines()]
    assert [line for line in shown if line in layers] == [layer for layer in layers if layer != "__main__"]


# The pages of refusal codes.


def test_the_pages_of_refusal_codes_are_up_to_date() -> None:
    """They are what `make pages` writes, for every code and no other."""
    written = {path.name: path.read_text(encoding="utf-8") for path in refusal_pages.PAGES.glob("*.md")}
    assert written == refusal_pages.pages()


def test_every_refusal_code_has_advice() -> None:
    """In the order of the enum, with a cause, a speaker and something to do."""
    advices = refusal_pages.load_advice()
    assert list(advices) == [code.value for code in Refusal]
    for word, advice in advices.items():
        assert advice.means and advice.said_by and advice.do, word
        assert advice.client in refusal_pages.CLIENT_WORDS, word


def test_who_gets_a_code_is_what_the_gateway_does() -> None:
    """A client gets a code that all paths gave exactly if the code's page says so."""
    for code in set(Refusal) - STOPS:
        page = (refusal_pages.PAGES / f"{code.value}.md").read_text(encoding="utf-8")
        says = "when the gateway itself or every path says it" in " ".join(page.split())
        assert says == (code_for_client([code]) is code != Refusal.AGENT_UNAVAILABLE), code


def test_the_wire_page_names_the_codes_that_are_passed_on() -> None:
    """After "that code is", in the paragraph about what the client hears."""
    text = " ".join((DOCS / "wire.md").read_text(encoding="utf-8").split())
    named = text.partition("every path failed with the same code, and that code is ")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", named)) == {
        code.value for code in Refusal if code not in STOPS and code.reply.passed_on
    }


def test_events_and_series_on_the_pages_exist() -> None:
    """The sources have each log event, by its role, and each metric."""
    sources = {
        role: "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
        for role, folder in [("gateway", "socks"), ("broker", "broker"), ("agent", "agent"), ("authority", "authority")]
    }
    series = (ROOT / "rtunnel/metrics.py").read_text()
    for word, advice in refusal_pages.load_advice().items():
        for entry in advice.log:
            role, _, event = entry.partition(": ")
            assert f'"{event}"' in sources[role], (word, entry)
        for name in advice.series:
            assert f'"{name.removesuffix("_total")}' in series, (word, name)
