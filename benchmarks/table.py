"""The interactive table of a large model's lens beside what it may cost.

By itself: `python -m benchmarks.table`. 30 layers, 120 tokens, three matrices, ten words both ways
in each cell, all of them drawn at random from a vocabulary: a real lens repeats its words. A lens
of 48 layers and 2,000 tokens has to open as well.
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
from tests.browser import BROWSERS, FLAGS
from tests.fake_lens import fake_lens, words_alike

MATRICES = ("W_in", "W_gate", "W_out")
MAY_WEIGH = 1_500_000  # bytes
MAY_BUILD = 0.3  # seconds
MAY_OPEN = 0.5
MAY_SWITCH = 0.1
MAY_HOVER = 0.008


def table(setting: Setting) -> list[Row | Note]:
    """Size, time to build, to open the page, to switch what cells show, and to pass over a cell."""
    shape = (4, 8) if setting.quick else (30, 120)
    lens = fake_lens(words_alike(6000), *shape, matrices=MATRICES, silent=False)
    assets()  # once a session
    weight = len(as_html(lens).encode())
    built = median(_built(lens) for _ in range(setting.repeats))
    found: list[Row | Note] = [
        Row("table, size", size(weight), size(MAY_WEIGH), weight / MAY_WEIGH, 1.0),
        _row("table, build", built, MAY_BUILD),
    ]
    times = _used(page(lens), setting.repeats)
    if not times:
        return [*found, Note("table: no chromium or no playwright, so no time in a browser.")]
    for name, limit in (("open", MAY_OPEN), ("switch", MAY_SWITCH), ("hover", MAY_HOVER)):
        found.append(_row(f"table, {name}", times[name], limit))
    if not setting.quick:
        long = fake_lens(words_alike(300), 48, 2000, matrices=("W_out",), silent=False)
        found += [
            _row(f"table of 2,000 tokens, {name}", _used(page(long), 1)[name], limit)
            for name, limit in (
                ("open", 4 * MAY_OPEN),
                ("switch", MAY_SWITCH),
                ("hover", MAY_HOVER),
            )
        ]
    return found


def _row(name: str, took: float, limit: float) -> Row:
    return Row(name, seconds(took), seconds(limit), took / limit, 1.0)


def _built(lens: Any) -> float:
    start = time.perf_counter()
    as_html(lens)
    return time.perf_counter() - start


# Each until the frame after it is painted.
_PAINTED = """const painted = () => new Promise(done => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = done;
    channel.port2.postMessage(0); }));"""
_SWITCH = f"""async value => {{ {_PAINTED}
    document.querySelector(`input[value="${{value}}"]`).click();
    await painted(); }}"""
_HOVERS = f"""async passing => {{ {_PAINTED}
    const cells = [...document.querySelectorAll(".bw-grid td[aria-colindex]")].slice(0, 60);
    for (const cell of cells) {{
        const event = new PointerEvent("pointerover", {{ bubbles: true, pointerType: "mouse" }});
        if (passing) cell.dispatchEvent(event);
        await painted(); }}
    return cells.length; }}"""
_SWITCHES = ("suppressed", "norm", "words", "promoted", "W_in", "W_gate", "W_out")


def _used(html: str, repeats: int) -> dict[str, float]:
    """Median seconds of the page's thread to open, switch and hover; empty without a browser.

    Script, style, layout and paint; not the time in which other processes have the processor.
    """
    opened, switches, hovers = [], [], []
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        if browser is None:
            return {}
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        for _ in range(repeats + 1):
            view = browser.new_page(viewport={"width": 1200, "height": 900})
            devtools = view.context.new_cdp_session(view)
            devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

            def spent(devtools: Any = devtools) -> float:
                metrics = devtools.send("Performance.getMetrics")["metrics"]
                return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

            start = spent()
            view.goto(path.as_uri())
            view.wait_for_selector("[data-live]")
            view.evaluate(f"async () => {{ {_PAINTED} await painted(); }}")
            opened.append(spent() - start)
            for value in _SWITCHES:
                if view.query_selector(f'input[value="{value}"]'):
                    start = spent()
                    view.evaluate(_SWITCH, value)
                    switches.append(spent() - start)
            taken = []
            for passing in (False, True):  # less what frames take in which nothing happens
                start = spent()
                count = view.evaluate(_HOVERS, passing)
                taken.append((spent() - start) / count)
            hovers.append(taken[1] - taken[0])
            view.close()
    return {"open": median(opened[1:]), "switch": median(switches), "hover": median(hovers)}


@contextmanager
def _browser() -> Iterator[Any]:
    # Those with a window first: what readers have.
    path = next(filter(None, map(shutil.which, reversed(BROWSERS))), None)
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
