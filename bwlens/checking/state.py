"""The check that a model is left as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bwlens.checking.report import Finding
from bwlens.model.passes import all_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")


@dataclass(frozen=True)
class State:
    """What a reading must not change, each part under its name."""

    parts: dict[str, Any]

    @classmethod
    def of(cls, model: Any) -> State:
        """The state of a model now; no weights are copied, torch counts the writes to them."""
        modules = all_modules(model)
        weights = list(dict.fromkeys(p for m in modules for p in m.parameters(recurse=False)))
        random = [torch.get_rng_state()]
        random += torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            {
                "weights": [(id(p), p.data_ptr(), p._version) for p in weights],
                ".grad": [
                    (id(p.grad), p.grad._version) if p.grad is not None else 0 for p in weights
                ],
                "requires_grad": [p.requires_grad for p in weights],
                "modes": [m.training for m in modules],
                "hooks": [[list(vars(m).get(name, ())) for name in _HOOKS] for m in modules],
                "random numbers": [state.tolist() for state in random],
            }
        )

    def compared(self, after: State) -> Finding:
        """What is not as it was."""
        changed = [name for name, part in self.parts.items() if after.parts[name] != part]
        if not changed:
            figures = ", ".join(self.parts)
            return Finding("left as it was", "ok", figures, "the checks changed nothing")
        why = "reload the model, and report this: reading a model must not change it"
        return Finding("left as it was", "fails", f"changed: {', '.join(changed)}", why)
