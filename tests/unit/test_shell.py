"""What helps at a shell: completion of commands and options, and man pages from the texts of `--help`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rtunnel.cli import cli
from support import man_pages
from support.man_pages import commands, name_of, page, quoted


def script(shell: str) -> str:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    """It asks the command itself, through a variable."""
    assert f"_RTUNNEL_COMPLETE={shell}_complete" in script(shell)


def test_another_shell_is_wrong_usage() -> None:
    """With those that there are."""
    done = CliRunner().invoke(cli, ["completion", "tcsh"])
    assert done.exit_code == 2 and "'bash', 'zsh', 'fish'" in done.output


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [("rtunnel doctor --cl", "--cluster"), ("rtunnel doctor --role ag", "agent")],
)
def test_bash_completes(words: str, expected: str, tmp_path: Path) -> None:
    """The script, in a real bash, with a command of that name on PATH."""
    command = tmp_path / "rtunnel"
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom rtunnel.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    (tmp_path / "script").write_text(script("bash"))
    lines = [
        f"source {tmp_path}/script 2>/dev/null",
        f"COMP_WORDS=({words})",
        f"COMP_CWORD={len(words.split()) - 1}",
        "_rtunnel_completion rtunnel",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=50,
        check=False,
    )
    assert done.stdout.split() == [expected], done.stderr


PAGES = {name_of(context): page(context) for context in commands()}


def test_every_command_has_a_page() -> None:
    """Also the roles, which are found on demand; each is named by the page of its group."""
    assert {"rtunnel", "rtunnel-broker", "rtunnel-doctor", "rtunnel-pki-token-create"} <= set(PAGES)
    for name in PAGES:
        group = name.rpartition("-")[0]
        if group in PAGES:
            assert rf"\fB{quoted(name)}\fR(1)" in PAGES[group]


def test_a_page_has_all_of_the_help() -> None:
    """Usage, text, options, and the examples as they stand."""
    text = PAGES["rtunnel-doctor"]
    for words in (
        r"rtunnel\-doctor \- Find out what is wrong with this machine, or with the cluster",
        ".SH OPTIONS",
        r"\fB\-\-bundle FILE\fR",
        ".SH EXAMPLES\n.PP\n.nf\n",
        "Exit codes: 0 no FAIL, 1 at least one FAIL",
    ):
        assert words in text, words
    assert text.count("\n.nf\n") == text.count("\n.fi\n") > 0
    assert man_pages.KEPT not in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_groff_finds_nothing_to_warn_of(tmp_path: Path) -> None:
    """In any page."""
    paths = map(str, man_pages.write(tmp_path))
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", *paths], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "printed"),
    [("a-b", r"a\-b"), (".toml", r"\&.toml"), ("'x'", r"\&\(aqx\(aq"), ("a\\b", r"a\eb"), ('"', r"\(dq")],
)
def test_roff_does_not_read_the_text(text: str, printed: str) -> None:
    """No macro, no escape."""
    assert quoted(text) == printed


def test_hidden_commands_have_no_page() -> None:
    """As in `--help`."""

    @click.group(name="x")
    def group() -> None:
        """Do it."""

    group.add_command(click.Command("shown"))
    group.add_command(click.Command("secret", hidden=True))
    assert [name_of(context) for context in commands(group)] == ["rtunnel", "rtunnel-shown"]
