"""Read what a language model learns: the Backward Lens for TransformerLens."""

from bwlens.capture import Gradients as Gradients
from bwlens.capture import capture as capture
from bwlens.capture import vjps as vjps
from bwlens.gradients import LowRankGradient as LowRankGradient
from bwlens.objectives import NLL as NLL
from bwlens.objectives import LogitDifference as LogitDifference
from bwlens.objectives import Objective as Objective
from bwlens.prompts import Batch as Batch
from bwlens.prompts import Edit as Edit
from bwlens.sites import MATRICES as MATRICES
from bwlens.sites import Site as Site
