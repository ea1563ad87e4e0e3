"""The run-time checks of signatures see what they should; what they leave out has no shape."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import bwlens
from tests import checked

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor
if TYPE_CHECKING:
    from nowhere import Thing

Rows = Float[Tensor, "n d"]

def added(a: Rows, b: Rows) -> Rows | None:
    return a + b

def tall(a: Float[Tensor, "n d"], n: int) -> Float[Tensor, "{n} d"]:
    return a

def first(rows: list[Float[Tensor, "n d"]], b: Float[Tensor, "n d"]) -> Tensor:
    return rows[0]

def wider(a: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return a[:, :1]

def doubled(text: str, of: Thing | None = None) -> str:
    return 2 * text if text else None

@dataclass
class Pair:
    x: Float[Tensor, "n d_in"]
    delta: Float[Tensor, "n d_out"]

    def text(self, end: str) -> str:
        return end

@dataclass
class Named:
    name: str
    of: Thing | None = None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "signatures.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with checked.install("signatures"):
        return import_module("signatures")


CALLS = {
    "shapes that do not agree": lambda m: m.added(torch.ones(2, 3), torch.ones(2, 4)),
    "a shape of a number": lambda m: m.tall(torch.ones(2, 3), 3),
    "a shape in a list": lambda m: m.first([torch.ones(2, 3)], torch.ones(2, 4)),
    "a shape given back": lambda m: m.wider(torch.ones(2, 3)),
    "fields that do not agree": lambda m: m.Pair(torch.ones(2, 3), torch.ones(3, 4)),
    "a type": lambda m: m.doubled(5),
    "a type given back": lambda m: m.doubled(""),
    "a field's type": lambda m: m.Named(5),
    "a method's type": lambda m: m.Pair(torch.ones(2, 3), torch.ones(2, 4)).text(5),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_does_not_fit_is_seen(call, module):
    with pytest.raises(Exception, match=r"[Tt]ype-check error|violates type hint"):
        call(module)


def test_what_fits_is_let_through(module):
    assert module.added(torch.ones(2, 3), torch.ones(2, 3)).shape == (2, 3)
    assert module.tall(torch.ones(2, 3), 2).shape == (2, 3)
    assert module.first([torch.ones(2, 3)], torch.ones(2, 3)).shape == (2, 3)
    assert module.added(torch.ones(4, 5), torch.ones(4, 5)).shape == (4, 5)  # bound anew
    assert module.doubled("a", of=object()) == "aa"
    assert module.Named("a", of=object()).name == "a"


def test_users_meet_no_checks(module, unchecked):
    assert module.wider(torch.ones(2, 3)).shape == (2, 1)
    assert module.doubled("") is None


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_no_inner_function_has_a_shape():
    """It would not be checked."""
    for path in Path(bwlens.__file__).parent.rglob("*.py"):
        for outer in functions(ast.parse(path.read_text(encoding="utf-8"))):
            for inner in set(functions(outer)) - {outer}:
                signature = ast.unparse(inner.args) + ast.unparse(inner.returns or ast.Constant(0))
                assert not re.search(r"\[\w+, '", signature), (path, inner.name)
