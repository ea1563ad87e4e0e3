"""Does an edit do what it should, and nothing else? Records, metrics and the harness."""

from bwlens.data.records import Problem as Problem
from bwlens.data.records import Record as Record
from bwlens.data.records import Records as Records
from bwlens.data.records import read_records as read_records
from bwlens.evaluation.evaluation import Evaluation as Evaluation
from bwlens.evaluation.harness import evaluate as evaluate
from bwlens.evaluation.known import known_records as known_records
from bwlens.evaluation.measuring import Options as Options
from bwlens.evaluation.methods import Method as Method
from bwlens.evaluation.metrics import METRICS as METRICS
from bwlens.evaluation.table import Table1 as Table1
from bwlens.evaluation.table import table1 as table1
