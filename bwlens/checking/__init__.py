"""Is what bwlens says of a model true? Checks on the user's own model and machine."""

from bwlens.checking.checks import check as check
from bwlens.checking.report import CheckReport as CheckReport
from bwlens.checking.report import Finding as Finding
from bwlens.gradient.guard import trusted as trusted
from bwlens.gradient.probe import UntrueGradientError as UntrueGradientError
