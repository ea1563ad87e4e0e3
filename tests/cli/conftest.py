"""Commands that are run in this process share the demo model; each leaves it as it was."""

import pytest

from bwlens.model import loading


@pytest.fixture(autouse=True)
def _loaded_once(demo, monkeypatch):
    load = loading.load_model

    def shared(name, **options):
        plain = name == "demo" and str(options.get("dtype")) == "torch.float32"
        return demo if plain and not {"device_map"} & set(options) else load(name, **options)

    monkeypatch.setattr(loading, "load_model", shared)
