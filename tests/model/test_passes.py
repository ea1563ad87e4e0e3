"""What a pass takes at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bwlens.model import passes


@pytest.mark.parametrize(
    ("d_model", "free", "prompts"),
    [
        (576, 80 << 30, 285),  # a small model on a free card
        (576, 1 << 30, 64),  # hardly any memory left: as on a CPU, and torch says what is wrong
        (64, 80 << 30, 1024),  # more gains nothing
    ],
)
def test_gpu_takes_as_many_prompts_as_its_memory_holds(
    monkeypatch: pytest.MonkeyPatch, d_model: int, free: int, prompts: int
) -> None:
    def memory(device: Any) -> tuple[int, int]:
        return free, 2 * free

    model: Any = SimpleNamespace(blocks=range(30), cfg=SimpleNamespace(d_model=d_model))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(passes, "device_of", lambda model: torch.device("cuda"))
    assert passes.prompts_at_once(model) == prompts
    monkeypatch.setattr(passes, "device_of", lambda model: torch.device("cpu"))
    assert passes.prompts_at_once(model) == 64
