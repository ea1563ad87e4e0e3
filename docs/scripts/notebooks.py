"""Executes the notebooks and keeps their outputs as GitHub shows them.

`python docs/scripts/notebooks.py [01 03 ...]`. GitHub runs no script: of a lens and a comparison a
picture is kept, not the live table, which the notebook shows whoever runs it. What is larger than
`MOST` bytes is left out.
"""

from __future__ import annotations

import re
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MOST = 150_000

# Run in the kernel before the first cell.
PICTURES = """
def _pictures():
    from io import BytesIO

    def png(thing):
        drawn = BytesIO()
        thing.figure().savefig(drawn, dpi=110, bbox_inches="tight", facecolor="white")
        return drawn.getvalue()

    formatters = get_ipython().display_formatter.formatters
    for module, name in (
        ("bwlens.lens.backward", "BackwardLens"), ("bwlens.show.comparison", "Comparison"),
    ):
        formatters["image/png"].for_type_by_name(module, name, png)
        formatters["text/html"].for_type_by_name(module, name, lambda thing: None)
    formatters["text/html"].for_type_by_name(
        "bwlens.show.circuits", "OfflineHTML", lambda thing: None
    )
_pictures()
"""


def executed(path: Path) -> Any:
    """A notebook with its outputs made anew."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}
    )
    with client.setup_kernel():
        assert client.kc is not None
        client.kc.execute(PICTURES, silent=True)
        for at, cell in enumerate(notebook.cells):
            client.execute_cell(cell, at)
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [*filter(None, map(slim, joined(cell.outputs)))]
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs with a stream in one piece, however it arrived."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.get("name") and output.get("name") == kept[-1].get("name"):
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def slim(output: Any) -> Any:
    """An output without what is too large, progress bars and addresses in memory."""
    if output.get("name") == "stderr":
        return None
    data = output.get("data", {})
    if "image/png" in data:  # a palette is plenty for flat colours
        image, small = Image.open(BytesIO(b64decode(data["image/png"]))), BytesIO()
        image.convert("RGB").quantize(64).save(small, "PNG", optimize=True)
        data["image/png"] = b64encode(small.getvalue()).decode()
    for kind in [kind for kind, value in data.items() if len(value) > MOST]:
        del data[kind]
    if "text/plain" in data:
        data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
        data["text/plain"] = re.sub(r"/tmp/tmp\w+/", "", data["text/plain"])
    return output


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not chosen or path.name[:2] in chosen:
            nbformat.write(executed(path), path)
            print(path.name, path.stat().st_size, "bytes", flush=True)
