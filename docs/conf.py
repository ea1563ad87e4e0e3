"""The documentation site: `sphinx-build -W docs docs/_build/html` (extra `docs`).

Everything is built from what lies here; no network is needed. Links to the pages of
TransformerLens, torch, pandas and Python are made where their inventories can be reached.
`DOCS_RUN=off`, without `-W`, leaves the pages' code unrun, for a quick look at the text.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# (Sphinx comes with the extra `docs` alone.)

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

# Kernels of the executed pages: this checkout, no network, one thread, no progress bars in pages.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["PYTHONWARNINGS"] = "ignore::DeprecationWarning,ignore:IProgress not found"

project = "bwlens"
author = copyright = "The bwlens authors"
release = importlib.metadata.version("bwlens")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "scripts", "jupyter_execute"]

# Pages.
html_theme = "furo"
html_math_renderer = "mathml"
html_title = "bwlens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["llms.txt"]
html_copy_source = False
html_show_sphinx = False
smartquotes = False  # " Paris" is written with these very marks
templates_path: list[str] = []
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# The stored notebooks name their kernel's language as Jupyter does.
suppress_warnings = ["mystnb.unknown_mime_type"]

# Code in pages runs; the notebooks in tutorials/ are shown as they are stored.
nb_execution_mode = os.environ.get("DOCS_RUN", "cache")
nb_execution_excludepatterns = ["tutorials/*"]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # and so a page that is warned fails the build

# Reference.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
add_module_names = False
default_role = "py:obj"  # `name` in a docstring
toc_object_entries_show_parents = "hide"

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "transformer_lens": "https://transformerlensorg.github.io/TransformerLens/",
}


def reachable(url: str) -> bool:
    """Whether an inventory answers; without a network the site is built without it."""
    if os.environ.get("DOCS_INTERSPHINX") == "off":
        return False
    try:
        with urlopen(Request(url + "objects.inv", method="HEAD"), timeout=5):
            return True
    except (OSError, URLError):
        return False


intersphinx_mapping = {n: (url, None) for n, url in INVENTORIES.items() if reachable(url)}


def copy_notebooks(_app: Any) -> None:
    """Put the notebooks where Sphinx finds them, their links to pages of the site mended."""
    folder = DOCS / "tutorials"
    folder.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = re.sub(r"\]\(\.\./docs/", "](../", path.read_text(encoding="utf-8"))
        target = folder / path.name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def visit_math(self: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw without a script from elsewhere."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def as_rst(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with Google's sections: |x|, [*n, d] and `Site`s mean no markup."""
    for at, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"(?<!\\)([|]|(?<=\[)\*)", r"\\\1", part) for part in parts[::2]]
        lines[at] = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "".join(parts))


def by_last_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Link a name of ours by its last part: where it is defined is not where it is documented."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rsplit(".", 1)[-1]
    known = env.get_domain("py").objects
    named = [full for full in known if full.rsplit(".", 1)[-1] == name and full[7:8].isalpha()]
    best = min(named, key=lambda full: (full.count("."), full), default=None)
    ours = node["reftarget"].startswith("bwlens.") or "." not in node["reftarget"]
    if best is None or not ours or known[best].objtype in ("method", "attribute", "property"):
        return None
    to = known[best]
    return make_refnode(app.builder, node["refdoc"], to.docname, to.node_id, content, best)


def setup(app: Any) -> None:
    """What is ours: formulas, the notebooks' place, docstrings and links to their names."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None)
    )
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("missing-reference", by_last_name)
