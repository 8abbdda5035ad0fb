"""Files that change: read when nobody writes them any more, or when somebody says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from rtunnel import watch
from rtunnel.logs import get_logger
from rtunnel.watch import Watched, look_now


class Page:
    """A watched file, and what of it is in force."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("one")
        self.texts: list[str] = []
        self.file = Watched("page", [path], path.read_text, self.put)

    async def put(self, text: str) -> dict[str, object]:
        self.texts.append(text)
        return {}

    async def until(self, *texts: str) -> None:
        with trio.fail_after(10):
            while self.texts != list(texts):
                await trio.sleep(0.001)


@asynccontextmanager
async def watched(*pages: Page) -> AsyncIterator[None]:
    """Each by a task of its own, as roles do."""
    async with trio.open_nursery() as nursery:
        for page in pages:
            nursery.start_soon(watch.watch, [page.file], get_logger("test"))
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()
    assert not watch._asked


async def test_a_request_reads_what_has_changed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All watchers of the process look, each time; a file that is as it was is not read again."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
    pages = [Page(tmp_path / name) for name in ("a", "b", "c")]
    with capture_logs() as lines:
        async with watched(*pages):
            for page in pages[:2]:
                page.path.write_text("another")
            look_now()
            for page in pages[:2]:
                await page.until("another")
            await trio.testing.wait_all_tasks_blocked()
            pages[0].path.write_text("a third one")
            look_now()
            await pages[0].until("another", "a third one")
    assert pages[2].texts == []
    assert [line["event"] for line in lines] == ["page_loaded"] * 3


async def test_a_bad_file_that_was_asked_for_is_told_and_the_next_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file, because somebody asked too early: what was in force stays, and the whole one is read later."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
    page = Page(tmp_path / "page")

    def load() -> str:
        text = page.path.read_text()
        if not text.endswith("."):
            raise ValueError("no full stop")
        return text

    page.file.load = load
    with capture_logs() as lines:
        async with watched(page):
            page.path.write_text("half")
            look_now()
            with trio.fail_after(10):
                while not page.file.rejected:
                    await trio.sleep(0.001)
            page.path.write_text("half a page.")
            look_now()
            await page.until("half a page.")
    assert [line["event"] for line in lines] == ["page_rejected", "page_loaded"]
