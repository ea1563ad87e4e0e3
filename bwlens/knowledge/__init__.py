"""Where knowledge sits: the feed-forward layer as a store, and a Backpack to test it on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bwlens.knowledge._ablate import ablate as ablate
    from bwlens.knowledge._controls import Controls as Controls
    from bwlens.knowledge._controls import controls as controls
    from bwlens.knowledge._controls import firing_rates as firing_rates
    from bwlens.knowledge._making import neurons as neurons
    from bwlens.knowledge._neurons import Neuron as Neuron
    from bwlens.knowledge._neurons import Neurons as Neurons
    from bwlens.knowledge._pages import NeuronPage as NeuronPage
    from bwlens.knowledge._pages import neuron_page as neuron_page
    from bwlens.knowledge.backpack.architecture import Backpack as Backpack
    from bwlens.knowledge.backpack.architecture import BackpackConfig as BackpackConfig
    from bwlens.knowledge.backpack.changing import SenseChange as SenseChange
    from bwlens.knowledge.backpack.changing import replace_in_senses as replace_in_senses
    from bwlens.knowledge.backpack.changing import scale_sense as scale_sense
    from bwlens.knowledge.backpack.changing import sense_edit as sense_edit
    from bwlens.knowledge.backpack.changing import swap_sense as swap_sense
    from bwlens.knowledge.backpack.senses import Contributions as Contributions
    from bwlens.knowledge.backpack.senses import contextualization as contextualization
    from bwlens.knowledge.backpack.senses import contributions as contributions
    from bwlens.knowledge.backpack.senses import sense_vectors as sense_vectors
    from bwlens.knowledge.backpack.senses import senses as senses

# Where each name above is.
_HOMES = {
    "_ablate": ("ablate",),
    "_controls": ("Controls", "controls", "firing_rates"),
    "_making": ("neurons",),
    "_neurons": ("Neuron", "Neurons"),
    "_pages": ("NeuronPage", "neuron_page"),
    "backpack.adapter": ("Backpack", "BackpackConfig"),
    "backpack.changing": (
        "SenseChange", "replace_in_senses", "scale_sense", "sense_edit", "swap_sense",
    ),
    "backpack.senses": (
        "Contributions", "contextualization", "contributions", "sense_vectors", "senses",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bwlens.knowledge' has no attribute {name!r}")
    return getattr(import_module(f"bwlens.knowledge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
