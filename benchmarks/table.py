"""The interactive table of a large model's lens beside what it may cost.

By itself: `python -m benchmarks.table`. 48 layers, 40 tokens, ten words both ways in each cell, all
of them drawn at random from a large vocabulary: a real lens repeats its words and is smaller.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Note, Row, seconds, size
from benchmarks.setting import Setting
from bwlens.show.table import assets, page
from bwlens.show.table import table as as_html
from tests.browser import FLAGS
from tests.fake_lens import fake_lens, words_alike

MAY_WEIGH = 500_000  # bytes
MAY_TAKE = 0.1  # seconds, in Python and again in a browser


def table(setting: Setting) -> list[Row | Note]:
    """Size, time to build, and time until a browser has parsed, mounted and laid out the page."""
    shape = (4, 8) if setting.quick else (48, 40)
    lens = fake_lens(words_alike(), *shape, matrices=("W_out",))
    assets()  # once a session
    html = as_html(lens)
    weight = len(html.encode())
    built = median(_built(lens) for _ in range(setting.repeats))
    found: list[Row | Note] = [
        Row("table, size", size(weight), size(MAY_WEIGH), weight / MAY_WEIGH, 1.0),
        Row("table, build", seconds(built), seconds(MAY_TAKE), built / MAY_TAKE, 1.0),
    ]
    times = _ready(page(lens), setting.repeats)
    if not times:
        return [*found, Note("table: no chromium or no playwright, so no time in a browser.")]
    ready = median(times)
    return [*found, Row("table, ready", seconds(ready), seconds(MAY_TAKE), ready / MAY_TAKE, 1.0)]


def _built(lens: Any) -> float:
    start = time.perf_counter()
    as_html(lens)
    return time.perf_counter() - start


def _ready(html: str, repeats: int) -> list[float]:
    """Seconds from the page's first byte until its table can be used; empty without a browser."""
    # Reading a size makes the browser lay the page out there and then.
    html += """<script>new MutationObserver((_, observer) => {
        if (!document.querySelector("[data-live]")) return;
        observer.disconnect();
        document.body.offsetHeight;
        window.ready = performance.now();
    }).observe(document.body, { attributes: true, subtree: true })</script>"""
    since = "ready - performance.getEntriesByType('navigation')[0].responseStart"
    times = []
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        if browser is None:
            return []
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        for _ in range(repeats + 1):
            view = browser.new_page(viewport={"width": 1200, "height": 900})
            view.goto(path.as_uri())
            view.wait_for_function("window.ready")
            times.append(view.evaluate(since) / 1000)
            view.close()
    return times[1:]


@contextmanager
def _browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None or find_spec("playwright") is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


if __name__ == "__main__":
    for row in table(Setting()):
        print(row.text if isinstance(row, Note) else f"{row.what}: {row.ours} of {row.reference}")
