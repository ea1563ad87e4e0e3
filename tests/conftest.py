"""Shapes are checked at run time throughout the suite; nothing here needs a network."""

import os
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For notebooks' kernels and processes that tests start: several workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook("bwlens", "beartype.beartype")

import pytest
import torch

from tests import tiny
from tests.browser import chromium as chromium
from tests.browser import show as show

SHARED = Path(
    os.environ.get("BWLENS_SHARED") or Path(__file__).resolve().parents[2] / "shared"
).absolute()
"""Models, tokenizers and data too large for the repository: beside it, or named by the variable."""


def pytest_report_header():
    """Say what will be skipped for want of data, before anything else is said."""
    missing = "" if SHARED.is_dir() else " is missing: tests that need it are skipped"
    return f"shared data: {SHARED}{missing}"


def shared(path):
    """A file or folder of the shared data; the test that asks for what is not there is skipped."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {found}, which is not there")
    return found


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models gain nothing from threads, and workers would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def boot(tokenizer):
    """A bridge around a tiny random model; `boot("llama", compatibility=True)`."""

    def make(name, dtype=torch.float32, compatibility=False, hf=None):
        return tiny.bridge(name, tokenizer, dtype, compatibility, hf)

    return make


@pytest.fixture(scope="session")
def bridge(tokenizer):
    """The same, shared: for tests that change nothing; `bridge("llama", compatibility=True)`."""
    return cache(lambda name, **kwargs: tiny.bridge(name, tokenizer, **kwargs))


@pytest.fixture(scope="session")
def stories():
    """A small trained Llama, where its files lie."""
    return tiny.Stories(shared("models/stories260K"))


@pytest.fixture
def unchecked(monkeypatch):
    """What users meet, who have no run-time check of the signatures before the code's own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
