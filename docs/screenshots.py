"""Make the README's pictures: `python docs/screenshots.py` (needs Chromium and playwright)."""

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import bwlens

HERE = Path(__file__).parent


def main() -> None:
    """Draw the demo's lens in a browser, in light and in dark, with one cell's words open."""
    model = bwlens.load_model("demo")
    lens = bwlens.backward_lens(
        model, "Lionel Messi plays for", " Paris", subject="Lionel Messi", normalize="both"
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = lens.save(Path(folder) / "lens.html")
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for dark, name in ((False, "lens.png"), (True, "lens-dark.png")):
            page = browser.new_page(
                viewport={"width": 900, "height": 580},
                color_scheme="dark" if dark else "light",
                device_scale_factor=2,
            )
            page.goto(page_file.as_uri())
            page.wait_for_selector("[data-live]")
            page.locator("main").screenshot(path=HERE / name)
            # A palette is plenty for flat colours, and a quarter of the size.
            image = Image.open(HERE / name).convert("RGB")
            image.quantize(128).save(HERE / name, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
