"""A real browser for pages, offline: every test also asserts that no network was asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first that is there is driven; without a window's parts it takes two thirds of the time."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running chromium; the tests that need one are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no chromium on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def settled(page: Any) -> None:
    """Wait until every table that a script has taken over is unpacked, written and drawn."""
    page.wait_for_selector("[data-taken]:not([data-live]), table[aria-busy=true]", state="detached")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="session")
def idle_pages() -> list[Any]:
    """Empty pages that wait for the next test: a new one is half of what most tests would take."""
    return []


@pytest.fixture
def show(chromium: Any, idle_pages: list[Any]) -> Iterator[Callable[..., Any]]:
    """`show(html, scheme="light", width=1200)`: a page; it must stay silent and ask for nothing."""
    used, said, asked = [], [], []
    listeners = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
        "request": lambda request: asked.append(request.url),
    }

    def open_page(html: str, scheme: str = "light", width: int = 1200, height: int = 800) -> Any:
        page = idle_pages.pop() if idle_pages else chromium.new_context().new_page()
        used.append(page)
        page.set_default_timeout(10_000)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(media="null", color_scheme=scheme, forced_colors="null")
        for event, listener in listeners.items():
            page.on(event, listener)
        page.set_content(html)
        settled(page)
        return page

    yield open_page
    for page in used:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        page.mouse.move(-1, -1)
        page.goto("about:blank")
        idle_pages.append(page)
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "about:", "file:"))] == []
