"""The table in the real JupyterLab and Notebook; skipped where they are not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request

import pytest

from bwlens.show.table import table
from tests.fake_lens import fake_lens

PORT = 18765


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Jupyter server on a folder with one trusted notebook of three cells, the table's last."""
    lab = shutil.which("jupyter-lab")
    if lab is None:
        pytest.skip("no jupyter-lab on the path")
    folder = tmp_path_factory.mktemp("notebooks")
    output = {"output_type": "display_data", "metadata": {}}
    output["data"] = {"text/html": table(fake_lens(both=True, silent=False)), "text/plain": "lens"}
    cells = [
        {"cell_type": "code", "source": f"{at}", "id": f"c{at}", "metadata": {}, "outputs": outputs}
        for at, outputs in enumerate(([], [], [output]))
    ]
    for cell in cells:
        cell["execution_count"] = None
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "lens.ipynb").write_text(json.dumps(book), encoding="utf-8")
    command = shutil.which("jupyter-trust") or lab.replace("jupyter-lab", "jupyter-trust")
    subprocess.run([command, "lens.ipynb"], cwd=folder, check=True, capture_output=True)
    options = ["--no-browser", "--allow-root", f"--port={PORT}", "--IdentityProvider.token="]
    running = subprocess.Popen(
        [lab, *options, "--ServerApp.password=", "--expose-app-in-browser"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(60):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://localhost:{PORT}/api").close()
                break
            except OSError:
                continue
        yield f"http://localhost:{PORT}"
    finally:
        running.terminate()
        running.wait(20)


@pytest.mark.parametrize("path", ["lab/tree", "notebooks"])
def test_keys_move_in_the_table_and_leave_the_notebook_alone(chromium, server, path):
    view = chromium.new_page(viewport={"width": 1400, "height": 1000})
    view.goto(f"{server}/{path}/lens.ipynb")
    view.set_default_timeout(60_000)
    view.locator(".bwlens[data-live]").wait_for()
    view.wait_for_timeout(3000)
    if view.locator("dialog .jp-Dialog-button").count():  # asks for a kernel
        view.locator("dialog .jp-Dialog-button").first.click()
    cells = view.locator(".jp-Notebook .jp-Cell")
    count = cells.count()
    assert count == 3
    at = view.locator(".bw-grid tbody tr").nth(1).locator("td").nth(1)
    at.scroll_into_view_if_needed()
    at.click()
    where = "document.querySelector('.bw-cell').innerText"
    for key, said in (("ArrowRight", "position 2"), ("ArrowDown", "layer 1"), ("Home", "tion 0")):
        view.keyboard.press(key)
        assert said in view.evaluate(where), key
    for key in ("a", "b", "d", "d", "x", "j", "Enter"):
        view.keyboard.press(key)
    view.wait_for_timeout(300)
    assert cells.count() == count
    assert view.evaluate("document.activeElement.tagName") == "TD"
    radio = view.get_by_role("radio", name="linear")
    radio.click(force=True)
    view.keyboard.press("ArrowRight")
    assert view.get_by_role("radio", name="log").is_checked()
    view.keyboard.press("d")
    view.keyboard.press("d")
    view.wait_for_timeout(300)
    assert cells.count() == count
    view.close()
