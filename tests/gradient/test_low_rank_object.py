"""`LowRankGradient` as an object: what it refuses, says, keeps and saves."""

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bwlens.gradient.low_rank
import bwlens.gradient.matrix
import bwlens.runs.tensors
from bwlens.gradient.low_rank import LowRankGradient
from tests.gradient.matrices import BATCH, CASES, plain, same_bits

# What cannot be.


@pytest.mark.usefixtures("unchecked")
def test_unfit_tensors_are_refused() -> None:
    x, delta = torch.ones(3, 4), torch.ones(3, 5)
    refused: list[tuple[str, Callable[[], Any]]] = [
        (r"x is float32 \[1, 3, 4\].*x.flatten\(0, -2\)", lambda: LowRankGradient(x[None], delta)),
        (r"delta is int64 \[3, 5\]; expected floating", lambda: LowRankGradient(x, delta.long())),
        ("x has 3 rows and delta 2", lambda: LowRankGradient(x, delta[:2])),
        (
            r"float32 .* and delta float64 .*delta.to\(x\)",
            lambda: LowRankGradient(x, delta.double()),
        ),
        ("on cpu and delta .* on meta", lambda: LowRankGradient(x, delta.to("meta"))),
        ("prompt is float32", lambda: LowRankGradient(x, delta, prompt=x[:, 0])),
        (r"pos is int64 \[2\]; expected 3", lambda: LowRankGradient(x, delta, pos=torch.arange(2))),
    ]
    for message, make in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_gradients_of_two_weights_are_refused() -> None:
    for operate in (plain.inner, plain.cosine, plain.__add__, plain.__sub__):
        with pytest.raises(ValueError, match=r"\[8, 5\] on cpu .* \[5, 8\] on cpu; expected"):
            operate(plain.T)
        with pytest.raises(ValueError, match=r"on cpu .* on meta"):
            operate(plain.to("meta"))
    with pytest.raises(ValueError, match="no gradients to add"):
        LowRankGradient.sum([])
    with pytest.raises(ValueError, match=r"gradient \[8, 5\] @ v \[8\]: expected v \[5\]"):
        _ = plain @ torch.ones(8)
    with pytest.raises(ValueError, match=r"v \[5\] @ gradient \[8, 5\]: expected v \[..., 8\]"):
        _ = torch.ones(5) @ plain


def test_places_outside_w_are_refused() -> None:
    for key, message in (
        (8, "row 8 is outside W, which has 8 rows"),
        (-9, "row -9 is outside W"),
        ((0, 5), "column 5 is outside W, which has 5 columns"),
        ((0, 0, 0), "3 indices"),
        ("W", "row index 'W'; expected a number"),
        ((0, None), "column index None"),
    ):
        with pytest.raises(IndexError, match=message):
            plain[key]  # type: ignore[index]


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no row has prompt 3; expected one of \[2, 7\]"):
        BATCH.for_prompt(3)
    with pytest.raises(ValueError, match=r"no row has pos -1; expected one of \[0, 1, 2\]"):
        BATCH.at(-1)
    long = LowRankGradient(torch.ones(20, 1), torch.ones(20, 1), pos=torch.arange(20))
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3, '...', 18, 19\]"):
        long.at(20)
    for ask in (lambda: plain.prompts, plain.split, lambda: plain.for_prompt(0)):
        with pytest.raises(ValueError, match="does not say which prompt"):
            ask()
    with pytest.raises(ValueError, match="does not say which pos"):
        plain.at(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    delta = plain.delta.clone()
    delta[1, 2] = bad
    gradient = LowRankGradient(plain.x, delta)
    assert not gradient.norm().isfinite()
    methods = gradient.singular_values, gradient.svd, gradient.rank, gradient.effective_rank
    for method in (*methods, gradient.compress):
        with pytest.raises(ValueError, match="1 of 3 rows hold nan or inf, the first is row 1"):
            method()


# The object.


def test_tensors_are_detached_and_not_copied() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    gradient = LowRankGradient(x, 2 * x)
    assert not gradient.x.requires_grad
    assert not gradient.delta.requires_grad
    assert gradient.x.data_ptr() == x.data_ptr()
    with pytest.raises(AttributeError):
        gradient.x = x  # type: ignore[misc]


def test_repr_says_the_shape_and_computes_nothing() -> None:
    gradient = LowRankGradient(
        torch.ones(32, 768, device="meta"), torch.ones(32, 3072, device="meta")
    )
    assert repr(gradient) == "LowRankGradient(W [768, 3072], n=32, float32, meta)"


def test_to() -> None:
    moved = BATCH.to("meta", torch.bfloat16)
    assert (moved.dtype, moved.device.type) == (torch.bfloat16, "meta")
    assert moved.prompt is not None
    assert moved.prompt.device.type == "meta"
    assert (BATCH.to().dtype, BATCH.to().device) == (BATCH.dtype, BATCH.device)


@pytest.mark.parametrize(
    "gradient", [*CASES.values(), BATCH, BATCH.T[1:, ::2]], ids=[*CASES, "batch", "views"]
)
def test_saved_and_loaded(gradient: LowRankGradient, tmp_path: Path) -> None:
    path = tmp_path / "gradient.safetensors"
    plain.save(path)
    gradient.save(path)
    assert same_bits(LowRankGradient.load(path), gradient)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gradient.safetensors"
    BATCH.save(path)

    def torn(tensors: Any, part: Path, metadata: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(bwlens.runs.tensors, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        plain.save(path)
    assert same_bits(LowRankGradient.load(path), BATCH)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"foreign is not a safetensors file \("):
        LowRankGradient.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"with metadata \{\}; expected"):
        LowRankGradient.load(path)
    save_file({"x": torch.ones(1, 1)}, path, {"format": "bwlens.LowRankGradient", "version": "2"})
    with pytest.raises(ValueError, match="'version': '2'"):
        LowRankGradient.load(path)
    with pytest.raises(FileNotFoundError):
        LowRankGradient.load(tmp_path / "none")


def test_examples_in_the_docstrings() -> None:
    modules = (bwlens.gradient.matrix, bwlens.gradient.low_rank)
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in results) > 15
    assert not any(result.failed for result in results)
