"""Where knowledge sits: the rows of a feed-forward layer as a store that weights mix."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bwlens.knowledge._ablate import ablate as ablate
    from bwlens.knowledge._controls import Controls as Controls
    from bwlens.knowledge._controls import controls as controls
    from bwlens.knowledge._neurons import Neuron as Neuron
    from bwlens.knowledge._neurons import Neurons as Neurons
    from bwlens.knowledge._neurons import neurons as neurons
    from bwlens.knowledge._pages import NeuronPage as NeuronPage
    from bwlens.knowledge._pages import neuron_page as neuron_page

# Where each name above is, loaded when it is first used.
_HOMES = {
    "_ablate": ("ablate",),
    "_controls": ("Controls", "controls"),
    "_neurons": ("Neuron", "Neurons", "neurons"),
    "_pages": ("NeuronPage", "neuron_page"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bwlens.knowledge' has no attribute {name!r}")
    return getattr(import_module(f"bwlens.knowledge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
