"""The paper's experiments, each a function from a model and edits to rows and a figure.

>>> from bwlens import experiments
>>> list(experiments.EXPERIMENTS)[:4]
['gradient_rank', 'segment_norms', 'target_rank', 'layer_cosine']
"""

from bwlens.experiments.base import Experiment as Experiment
from bwlens.experiments.base import Reading as Reading
from bwlens.experiments.base import Result as Result
from bwlens.experiments.base import run as run
from bwlens.experiments.gradient_rank import GradientRank as GradientRank
from bwlens.experiments.gradient_rank import gradient_rank as gradient_rank
from bwlens.experiments.imprint_shift import ImprintShift as ImprintShift
from bwlens.experiments.imprint_shift import imprint_shift as imprint_shift
from bwlens.experiments.layer_cosine import LayerCosine as LayerCosine
from bwlens.experiments.layer_cosine import layer_cosine as layer_cosine
from bwlens.experiments.naive_reading import NaiveMap as NaiveMap
from bwlens.experiments.naive_reading import NaiveReading as NaiveReading
from bwlens.experiments.naive_reading import naive_map as naive_map
from bwlens.experiments.naive_reading import naive_reading as naive_reading
from bwlens.experiments.segment_norms import SegmentNorms as SegmentNorms
from bwlens.experiments.segment_norms import segment_norms as segment_norms
from bwlens.experiments.step_sizes import StepSizes as StepSizes
from bwlens.experiments.step_sizes import step_sizes as step_sizes
from bwlens.experiments.sweep import Sweep as Sweep
from bwlens.experiments.sweep import read_sweep as read_sweep
from bwlens.experiments.sweep import sweep as sweep
from bwlens.experiments.target_rank import TargetRank as TargetRank
from bwlens.experiments.target_rank import target_rank as target_rank

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
    )
}
"""Every experiment of the paper, by its name."""
