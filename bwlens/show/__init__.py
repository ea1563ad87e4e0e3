"""Pictures of a lens: for a terminal, for a page. Takes results, never a model."""

from bwlens.show.comparison import Comparison as Comparison
from bwlens.show.comparison import compare as compare
