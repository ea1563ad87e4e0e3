"""Read what a language model learns: the Backward Lens for TransformerLens."""

from bwlens import edit as edit
from bwlens import experiments as experiments
from bwlens import show as show
from bwlens.capture import Gradients as Gradients
from bwlens.capture import capture as capture
from bwlens.capture import vjps as vjps
from bwlens.edit.weights import WeightChange as WeightChange
from bwlens.evaluate.evaluation import Evaluation as Evaluation
from bwlens.evaluate.harness import evaluate as evaluate
from bwlens.evaluate.records import Record as Record
from bwlens.evaluate.records import Records as Records
from bwlens.evaluate.records import read_records as read_records
from bwlens.gradients import LowRankGradient as LowRankGradient
from bwlens.lens import BackwardLens as BackwardLens
from bwlens.lens import backward_lens as backward_lens
from bwlens.models import load_model as load_model
from bwlens.objectives import NLL as NLL
from bwlens.objectives import LogitDifference as LogitDifference
from bwlens.objectives import Objective as Objective
from bwlens.prompts import Batch as Batch
from bwlens.prompts import Edit as Edit
from bwlens.prompts import make_batch as make_batch
from bwlens.readout import Readout as Readout
from bwlens.readout import readout as readout
from bwlens.sites import MATRICES as MATRICES
from bwlens.sites import Site as Site
