"""What bwlens needs of a TransformerLens model, whichever class it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:

    class LensModel(Protocol):
        """A TransformerBridge or HookedTransformer: a causal language model in blocks.

        `sites.check_model` says in words, at run time, what another thing lacks.
        """

        @property
        def cfg(self) -> Any: ...

        @property
        def tokenizer(self) -> Any: ...

        @property
        def hook_dict(self) -> Any: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def modules(self) -> Iterator[nn.Module]: ...

        def get_submodule(self, target: str) -> nn.Module: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    LensModel = Any
