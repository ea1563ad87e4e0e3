"""The site's sources, without Sphinx: every public name has its place, and every link its end."""

import ast
import re
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest

import bwlens
import bwlens.evaluation
from bwlens.cli import app

ROOT = Path(bwlens.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    if not {"_build", "tutorials"} & set(path.relative_to(ROOT).parts)
)
ROOMS = ("checking", "demo", "edit", "evaluation", "experiments", "knowledge", "show")


def public(room):
    """Names of a room that are there for users: its own, not modules or what it imports."""
    here = getattr(bwlens, room) if room else bwlens
    named = getattr(here, "__all__", None) or [n for n in dir(here) if not n.startswith("_")]
    for name in named:
        value = getattr(here, name)
        home = getattr(value, "__module__", "bwlens")
        if not isinstance(value, ModuleType) and home.startswith("bwlens"):
            yield name, value


def documented():
    """Everything that a page of the reference names, and what stands behind it."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("reference/*.md"))
    for name in re.findall(r"^\.\. (?:auto|py:)\w+:: bwlens\.(\S+)$", text, re.MULTILINE):
        yield name, resolve_name(f"bwlens.{name}")


def test_the_reference_has_every_public_name_once():
    names, values = zip(*documented(), strict=True)
    assert len(set(names)) == len(names)
    for room in ("", *ROOMS):
        for name, value in public(room):
            full = f"{room}.{name}" if room else name
            # What two rooms offer stands in one place.
            assert any(value is known for known in values) or full in names, f"bwlens.{full}"


def test_every_command_has_its_help():
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert re.findall(r"^## bwlens (\w+)$", text, re.MULTILINE) == commands
    assert re.findall(r'^show_help\("(\w+)"\)$', text, re.MULTILINE) == commands


def slugs(path):
    """Anchors of a page's headings, as MyST and GitHub make them."""
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if target.parent.name == "tutorials":  # the site's copies of the notebooks
            target = ROOT / "notebooks" / target.name
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(link)
    assert not dead


def test_tables_of_contents_name_pages_and_leave_none_out():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for block in re.findall(
            r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            entries = [line for line in block.split("\n") if line and not line.startswith(":")]
            listed |= {page.parent / f"{name}.md" for name in entries if "*" not in name}
    assert listed == {page for page in PAGES if DOCS in page.parents}


def test_the_map_for_language_models_names_every_page():
    text = (DOCS / "llms.txt").read_text(encoding="utf-8")
    linked = {DOCS / link.replace(".html", ".md") for link in re.findall(r"\]\(([^)]+)\)", text)}
    pages = {page for page in PAGES if DOCS in page.parents}
    # Pages of links alone may be left out.
    assert linked <= pages
    assert pages - linked <= {
        DOCS / name for name in ("index.md", "howto/index.md", "ideas/index.md")
    }


def test_the_code_of_pages_is_python_and_of_names_that_are_there():
    """MyST-NB runs it when the site is built; here, that it parses and asks for what there is."""
    cells = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for cell in re.findall(r"```(?:\{code-cell\}|python).*?\n\n?(.*?)```", text, re.DOTALL):
            code = re.sub(r"^:tags:.*\n", "", cell)
            cells += 1
            for node in ast.walk(ast.parse(code, str(page))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bwlens":
                    assert hasattr(bwlens, node.attr), f"{page}: bwlens.{node.attr}"
    assert cells > 40
