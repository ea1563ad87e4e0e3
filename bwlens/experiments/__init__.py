"""The paper's experiments and more, each a function from a model and edits to rows and a figure.

>>> from bwlens import experiments
>>> list(experiments.EXPERIMENTS)[:4]
['gradient_rank', 'segment_norms', 'target_rank', 'layer_cosine']
"""

from bwlens.experiments._gradient_rank import GradientRank as GradientRank
from bwlens.experiments._gradient_rank import gradient_rank as gradient_rank
from bwlens.experiments._head_ranking import HeadRanking as HeadRanking
from bwlens.experiments._head_ranking import head_ranking as head_ranking
from bwlens.experiments._imprint_shift import ImprintShift as ImprintShift
from bwlens.experiments._imprint_shift import imprint_shift as imprint_shift
from bwlens.experiments._layer_cosine import LayerCosine as LayerCosine
from bwlens.experiments._layer_cosine import layer_cosine as layer_cosine
from bwlens.experiments._naive_reading import NaiveMap as NaiveMap
from bwlens.experiments._naive_reading import NaiveReading as NaiveReading
from bwlens.experiments._naive_reading import naive_map as naive_map
from bwlens.experiments._naive_reading import naive_reading as naive_reading
from bwlens.experiments._patching_alphas import PatchingAlphas as PatchingAlphas
from bwlens.experiments._patching_alphas import patching_alphas as patching_alphas
from bwlens.experiments._reading_fidelity import ReadingFidelity as ReadingFidelity
from bwlens.experiments._reading_fidelity import reading_fidelity as reading_fidelity
from bwlens.experiments._residual_removal import ResidualRemoval as ResidualRemoval
from bwlens.experiments._residual_removal import prose_edits as prose_edits
from bwlens.experiments._residual_removal import residual_removal as residual_removal
from bwlens.experiments._segment_norms import SegmentNorms as SegmentNorms
from bwlens.experiments._segment_norms import segment_norms as segment_norms
from bwlens.experiments._step_sizes import StepSizes as StepSizes
from bwlens.experiments._step_sizes import step_sizes as step_sizes
from bwlens.experiments._target_rank import TargetRank as TargetRank
from bwlens.experiments._target_rank import target_rank as target_rank
from bwlens.experiments.base import Experiment as Experiment
from bwlens.experiments.base import Reading as Reading
from bwlens.experiments.base import Result as Result
from bwlens.experiments.running import run as run
from bwlens.experiments.sweeps import Sweep as Sweep
from bwlens.experiments.sweeps import read_sweep as read_sweep
from bwlens.experiments.sweeps import sweep as sweep

EXPERIMENTS: dict[str, type[Experiment]] = {
    experiment.name: experiment
    for experiment in (
        GradientRank,
        SegmentNorms,
        TargetRank,
        LayerCosine,
        NaiveReading,
        ImprintShift,
        StepSizes,
        ReadingFidelity,
        ResidualRemoval,
    )
}
"""Every experiment, by its name."""
