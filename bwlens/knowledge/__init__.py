"""Where knowledge sits: the feed-forward layer as a store, and a Backpack to test it on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bwlens.knowledge.backpack.architecture import Backpack as Backpack
    from bwlens.knowledge.backpack.architecture import BackpackConfig as BackpackConfig

# Where each name above is.
_HOMES = {
    "backpack.architecture": ("Backpack", "BackpackConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bwlens.knowledge' has no attribute {name!r}")
    return getattr(import_module(f"bwlens.knowledge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
