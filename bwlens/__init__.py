"""Read what a language model learns: the Backward Lens for TransformerLens.

Names are loaded when they are first used, so that `import bwlens` and `bwlens --help` do not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from bwlens import checking as checking
    from bwlens import demo as demo
    from bwlens import edit as edit
    from bwlens import experiments as experiments
    from bwlens import knowledge as knowledge
    from bwlens import show as show
    from bwlens.attention.maps import ReversedAttention as ReversedAttention
    from bwlens.attention.maps import reversed_attention as reversed_attention
    from bwlens.attention.patching import attention_patching as attention_patching
    from bwlens.attention.scores import HeadScores as HeadScores
    from bwlens.attention.scores import head_scores as head_scores
    from bwlens.attention.words import head_words as head_words
    from bwlens.changes.change import WeightChange as WeightChange
    from bwlens.changes.dataset import DatasetLens as DatasetLens
    from bwlens.changes.dataset import read_dataset as read_dataset
    from bwlens.changes.explaining import explain as explain
    from bwlens.changes.lens import ChangeLens as ChangeLens
    from bwlens.changes.making import read_change as read_change
    from bwlens.changes.steps import OptimizerStep as OptimizerStep
    from bwlens.changes.steps import optimizer_step as optimizer_step
    from bwlens.checking import CheckReport as CheckReport
    from bwlens.checking import check as check
    from bwlens.data.making import make_records as make_records
    from bwlens.data.records import Record as Record
    from bwlens.data.records import Records as Records
    from bwlens.data.records import read_records as read_records
    from bwlens.evaluation.evaluation import Evaluation as Evaluation
    from bwlens.evaluation.harness import evaluate as evaluate
    from bwlens.gradient.capturing import Gradients as Gradients
    from bwlens.gradient.capturing import capture as capture
    from bwlens.gradient.capturing import vjps as vjps
    from bwlens.gradient.low_rank import LowRankGradient as LowRankGradient
    from bwlens.gradient.low_rank import LowRankMatrix as LowRankMatrix
    from bwlens.gradient.objectives import KL as KL
    from bwlens.gradient.objectives import NLL as NLL
    from bwlens.gradient.objectives import SFT as SFT
    from bwlens.gradient.objectives import LogitDifference as LogitDifference
    from bwlens.gradient.objectives import Objective as Objective
    from bwlens.gradient.preferences import DPO as DPO
    from bwlens.gradient.preferences import IPO as IPO
    from bwlens.gradient.preferences import KTO as KTO
    from bwlens.gradient.preferences import SimPO as SimPO
    from bwlens.gradient.preferences import capture_preference as capture_preference
    from bwlens.lens.backward import BackwardLens as BackwardLens
    from bwlens.lens.making import backward_lens as backward_lens
    from bwlens.lens.preference import PreferenceLens as PreferenceLens
    from bwlens.lens.preference import preference_lens as preference_lens
    from bwlens.model.chat import chat as chat
    from bwlens.model.loading import load_model as load_model
    from bwlens.model.prompts import Batch as Batch
    from bwlens.model.prompts import Edit as Edit
    from bwlens.model.prompts import make_batch as make_batch
    from bwlens.model.sites import MATRICES as MATRICES
    from bwlens.model.sites import Site as Site
    from bwlens.reading.readouts import Readout as Readout
    from bwlens.reading.readouts import readout as readout

# Where each name above is; a test holds the two lists against each other.
_ROOMS = ("checking", "demo", "edit", "experiments", "knowledge", "show")
_HOMES = {
    "attention.maps": ("ReversedAttention", "reversed_attention"),
    "attention.patching": ("attention_patching",),
    "attention.scores": ("HeadScores", "head_scores"),
    "attention.words": ("head_words",),
    "changes.change": ("WeightChange",),
    "changes.dataset": ("DatasetLens", "read_dataset"),
    "changes.explaining": ("explain",),
    "changes.lens": ("ChangeLens",),
    "changes.making": ("read_change",),
    "changes.steps": ("OptimizerStep", "optimizer_step"),
    "checking": ("CheckReport", "check"),
    "data.making": ("make_records",),
    "data.records": ("Record", "Records", "read_records"),
    "evaluation.evaluation": ("Evaluation",),
    "evaluation.harness": ("evaluate",),
    "gradient.capturing": ("Gradients", "capture", "vjps"),
    "gradient.low_rank": ("LowRankGradient", "LowRankMatrix"),
    "gradient.objectives": ("KL", "NLL", "SFT", "LogitDifference", "Objective"),
    "gradient.preferences": ("DPO", "IPO", "KTO", "SimPO", "capture_preference"),
    "lens.backward": ("BackwardLens",),
    "lens.making": ("backward_lens",),
    "lens.preference": ("PreferenceLens", "preference_lens"),
    "model.chat": ("chat",),
    "model.loading": ("load_model",),
    "model.prompts": ("Batch", "Edit", "make_batch"),
    "model.sites": ("MATRICES", "Site"),
    "reading.readouts": ("Readout", "readout"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bwlens")
    if name in _ROOMS:
        return import_module(f"bwlens.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bwlens' has no attribute {name!r}")
    value = getattr(import_module(f"bwlens.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(
        {"__doc__", "__file__", "__name__", "__path__", "__version__", *_ROOMS, *_HOME_OF}
    )
