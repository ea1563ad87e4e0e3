"""Read what a language model learns: the Backward Lens for TransformerLens."""

from importlib.metadata import version as _version

from bwlens import edit as edit
from bwlens import experiments as experiments
from bwlens import show as show
from bwlens.changes.change import WeightChange as WeightChange
from bwlens.data.records import Record as Record
from bwlens.data.records import Records as Records
from bwlens.data.records import read_records as read_records
from bwlens.evaluation.evaluation import Evaluation as Evaluation
from bwlens.evaluation.harness import evaluate as evaluate
from bwlens.gradient.capturing import Gradients as Gradients
from bwlens.gradient.capturing import capture as capture
from bwlens.gradient.capturing import vjps as vjps
from bwlens.gradient.low_rank import LowRankGradient as LowRankGradient
from bwlens.gradient.objectives import NLL as NLL
from bwlens.gradient.objectives import LogitDifference as LogitDifference
from bwlens.gradient.objectives import Objective as Objective
from bwlens.lens.backward import BackwardLens as BackwardLens
from bwlens.lens.backward import backward_lens as backward_lens
from bwlens.model.chat import chat as chat
from bwlens.model.loading import load_model as load_model
from bwlens.model.prompts import Batch as Batch
from bwlens.model.prompts import Edit as Edit
from bwlens.model.prompts import make_batch as make_batch
from bwlens.model.sites import MATRICES as MATRICES
from bwlens.model.sites import Site as Site
from bwlens.reading.readouts import Readout as Readout
from bwlens.reading.readouts import readout as readout

__version__ = _version("bwlens")
