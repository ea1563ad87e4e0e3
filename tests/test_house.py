"""The house: imports go one way, no public name hides a module, and importing waits for nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

import bwlens

ROOT = Path(bwlens.__file__).parent

FLOORS = {
    "runs": 0, "demo": 0, "model": 1, "data": 2, "gradient": 2, "reading": 3, "attention": 3.5,
    "lens": 4, "show": 5, "changes": 4.5, "checking": 5, "edit": 6, "knowledge": 6, "evaluation": 7,
    "experiments": 8, "cli": 9,
}  # fmt: skip
"""A room may import from itself and from rooms on lower floors; the command line the public API."""

CALLED_LATE = {("lens", "show"), ("changes", "show")}
"""What a user holds draws itself: its methods import the display wing when they are called, never
before."""


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def imports(path):
    """The modules of bwlens that a file imports, and when: "start", "call", or for a "type"."""
    return tuple(_imports(path))


def _imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whens = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            whens |= dict.fromkeys(ast.walk(node), "call")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            whens |= dict.fromkeys(ast.walk(node), "type")
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bwlens":
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) or module == "bwlens" else module for name in inner]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "bwlens"]
        for name in names:
            yield name, whens.get(node, "start")


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)
ROOMS = sorted({path.relative_to(ROOT).parts[0] for path in FILES})


def test_every_room_has_a_floor():
    assert set(ROOMS) <= set(FLOORS)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_imports_upwards(room):
    upwards = [
        f"{module_of(path)} imports {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == room
        for name, when in imports(path)
        if (other := [*name.split("."), ""][1]) != room
        and FLOORS.get(other, -1 if room == "cli" else 99) >= FLOORS[room]
        and not (when == "call" and (room, other) in CALLED_LATE)
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle():
    files = {module_of(path): path for path in FILES}
    needs = {
        module: {n for n, when in imports(path) if when == "start" and n in files} - {module}
        for module, path in files.items()
    }
    while free := [module for module, others in needs.items() if not others & set(needs)]:
        for module in free:
            del needs[module]
    assert not needs


def test_no_public_name_hides_a_module():
    rooms = ("edit", "experiments", "knowledge", "show")
    packages = [bwlens, *(getattr(bwlens, room) for room in rooms)]
    hiding = [
        f"{package.__name__}.{name}"
        for package in packages
        for name in dir(package)
        if not name.startswith("_")
        and not isinstance(getattr(package, name), ModuleType)
        and any(
            (Path(package.__path__[0]) / file).exists()
            for file in (f"{name}.py", f"{name}/__init__.py")
        )
    ]
    assert not hiding


def test_the_names_for_the_type_checker_are_those_that_load():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in dir(bwlens) if not name.startswith("__")} == set(typed)
    for name, module in typed.items():
        assert getattr(bwlens, name) is getattr(sys.modules[module], name), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lense'"):
        bwlens.lense  # noqa: B018


def test_what_is_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["gguf"]]
    declared = {spelled(re.split(r"[^\w.-]", line)[0]) for line in lines}
    packages = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.rglob("*.py")
        for name in others(path)
        if not declared & {spelled(package) for package in packages.get(name, [name])}
    }
    assert not undeclared


def spelled(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def others(path):
    """The packages that a file imports: neither ours nor Python's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "bwlens"]
        tops = {name.split(".")[0] for name in names}
        yield from tops - sys.stdlib_module_names - {"bwlens"}


@pytest.mark.parametrize("start", ["import bwlens", "import bwlens.cli"])
def test_importing_loads_no_torch(start):
    code = f"import sys; {start}; print({{'torch', 'pandas', 'numpy'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "set()", done.stderr


FORWARDS = {"forward", "run_with_cache", "run_with_hooks"}
HOOKS = {"add_hook", "hooks", "register_forward_hook", "register_forward_pre_hook"}


def engine_work(source):
    """Calls in a file that run a model, hang a hook into one or look for its device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        if (
            name in ("model", "_model")
            or {keyword.arg for keyword in node.keywords} & {"return_type", "padding_side"}
            or (of and name in FORWARDS | HOOKS)
            or (name == "next" and "model" in (given := ast.unparse(node)) and "param" in given)
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", sorted({*ROOMS} - {"model"}))
def test_only_the_model_s_room_runs_a_model(room):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == room]
    work = {path.name: list(engine_work(path.read_text(encoding="utf-8"))) for path in files}
    assert not {name: lines for name, lines in work.items() if lines}


@pytest.mark.parametrize(
    "fault",
    [
        "logits = model(tokens)",
        "logits = self._model(tokens)[:, -1]",
        "logits = bridge(tokens, return_type='logits')",
        "reading.model.run_with_cache(tokens)",
        "point.module.register_forward_hook(add)",
        "device = next(model.embed.parameters()).device",
    ],
)
def test_a_forward_pass_elsewhere_would_be_seen(fault):
    assert list(engine_work(fault))
