"""Does an edit do what it should, and nothing else? Records, metrics and the harness."""

from bwlens.evaluate.evaluation import Evaluation as Evaluation
from bwlens.evaluate.harness import evaluate as evaluate
from bwlens.evaluate.measuring import Options as Options
from bwlens.evaluate.methods import Method as Method
from bwlens.evaluate.metrics import METRICS as METRICS
from bwlens.evaluate.records import Problem as Problem
from bwlens.evaluate.records import Record as Record
from bwlens.evaluate.records import Records as Records
from bwlens.evaluate.records import read_records as read_records
from bwlens.evaluate.table import Table1 as Table1
from bwlens.evaluate.table import table1 as table1
