"""Pictures of a lens: for a terminal, for a page. Takes results, never a model."""

from bwlens.show.comparison import Comparison as Comparison
from bwlens.show.comparison import compare as compare
from bwlens.show.heads import head_maps as head_maps
from bwlens.show.heads import head_maps_figure as head_maps_figure
from bwlens.show.heads import head_scores_figure as head_scores_figure
from bwlens.show.heads import head_table as head_table
