"""Make the README's pictures: `python docs/scripts/screenshots.py` (needs Chromium)."""

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import bwlens

DOCS = Path(__file__).parents[1]


def main() -> None:
    """Draw the demo's lens and SmolLM2's in a browser, in light and in dark."""
    demo = bwlens.backward_lens(
        bwlens.load_model("demo"),
        "Lionel Messi plays for",
        " Paris",
        subject="Lionel Messi",
        normalize="both",
    )
    smollm2 = bwlens.backward_lens(
        bwlens.load_model("smollm2"),
        "The capital of France is",
        " Rome",
        subject="France",
        reading=["plain", "dual"],
        trust=True,
    )
    draw({"lens": (demo, 900, 580), "smollm2": (smollm2, 1366, 768)})


def draw(lenses: dict[str, tuple[bwlens.BackwardLens, int, int]]) -> None:
    """Each lens' page in a window of this width and height, light and dark."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (lens, width, height) in lenses.items():
            page_file = lens.save(Path(folder) / f"{name}.html")
            for dark in (False, True):
                picture = DOCS / f"{name}{'-dark' if dark else ''}.png"
                page = browser.new_page(
                    viewport={"width": width, "height": height},
                    color_scheme="dark" if dark else "light",
                    device_scale_factor=2,
                )
                page.goto(page_file.as_uri())
                page.wait_for_selector("[data-live]")
                page.locator("main").screenshot(path=picture)
                # A palette is plenty for flat colours, and a third of the size; this one keeps
                # the steps of the scale, which are few pixels.
                image = Image.open(picture).convert("RGB")
                palette = image.quantize(256, Image.Quantize.MAXCOVERAGE)
                palette.save(picture, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
