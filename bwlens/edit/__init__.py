"""Editing facts: methods that compute a change of the weights, and the change itself."""

from bwlens.changes.change import WeightChange as WeightChange
from bwlens.edit._alpha_edit import alpha_edit as alpha_edit
from bwlens.edit._fine_tune import fine_tune as fine_tune
from bwlens.edit._mapped_shift import ValueMap as ValueMap
from bwlens.edit._mapped_shift import mapped_shift as mapped_shift
from bwlens.edit._memit import memit as memit
from bwlens.edit._mend import Mend as Mend
from bwlens.edit._mend import mend as mend
from bwlens.edit._rome import rome as rome
from bwlens.edit._subject_shift import subject_shift as subject_shift
from bwlens.edit._where import KeyResponses as KeyResponses
from bwlens.edit._where import where as where
from bwlens.edit.counting import key_statistics as key_statistics
from bwlens.edit.gradient import gradient_step as gradient_step
from bwlens.edit.shift import forward_pass_shift as forward_pass_shift
from bwlens.edit.statistics import KeyStatistics as KeyStatistics
from bwlens.edit.statistics import load_statistics as load_statistics
from bwlens.edit.statistics import save_statistics as save_statistics
