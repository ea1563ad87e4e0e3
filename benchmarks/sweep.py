"""The paper's experiments over many prompts: in batches, one by one, and against plain training."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, size, timed
from benchmarks.setting import Setting
from bwlens.experiments import GradientRank, SegmentNorms, TargetRank
from bwlens.experiments.running import Batches

N_PROMPTS = 96
SHORTEST, LONGEST = 5, 15
FEW, MANY = 100, 2000

_WEIGHED = ("gradient_rank", "segment_norms", "target_rank", "layer_cosine")

_WEIGH = """
import json, resource, sys, tempfile
import bwlens
from bwlens.experiments import sweep
n = int(sys.argv[1])
model, edits = bwlens.load_model("demo"), bwlens.read_records("demo").edits
edits = (edits * (n // len(edits) + 1))[:n]
with tempfile.TemporaryDirectory() as folder:
    options = {"progress": False, "page": False, "max_memory": 128 * 2**20}
    found = sweep(sys.argv[2:], model, edits, folder, **options)
    swept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found.write()
drawn = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([swept, drawn]))
"""


def sweep(setting: Setting) -> list[Row | Note]:
    """Rank, norms and target ranks of the demo model's own records, 5 to 15 tokens each."""
    model, n = setting.demo, setting.n_prompts(N_PROMPTS)
    edits = list(islice((e for e in bwlens.read_records("demo").edits if _fits(model, e)), n))
    experiments = [GradientRank(), SegmentNorms(), TargetRank()]

    def ours() -> Any:
        return _all(Batches(experiments, model, edits))

    def one_by_one() -> Any:
        return [_all(Batches(experiments, model, [edit])) for edit in edits]

    def backward() -> Any:
        for edit in edits:
            tokens = model.to_tokens(edit.text)
            target = model.to_tokens(edit.target_new, prepend_bos=False)[0, 0]
            logits = model(tokens)[0, -1]
            torch.nn.functional.cross_entropy(logits[None], target[None]).backward()
            model.zero_grad()

    few, many = (FEW // 10, MANY // 10) if setting.quick else (FEW, MANY)
    (least, least_drawn), (most, most_drawn) = (_peaks(n) for n in (few, many))
    return [
        race(
            f"{n} prompts swept / one by one, throughput",
            timed(ours),
            timed(one_by_one),
            setting.repeats,
            3.0,
            throughput=True,
        ),
        race(
            f"{n} prompts swept / loss.backward() of each alone, throughput",
            timed(ours),
            timed(backward),
            setting.repeats,
            1.0,
            throughput=True,
        ),
        Row(
            f"sweep, peak memory of the process: {many} prompts / {few}",
            size(most),
            size(least),
            most / least,
            1.1,
        ),
        Note(
            f"sweep: summaries and figures, made in one piece at the end, bring the peak of {many}"
            f" prompts to {size(most_drawn)}, that of {few} to {size(least_drawn)}"
        ),
        Note(
            f"sweep: the demo model; {', '.join(e.name for e in experiments)} of all matrices;"
            " the plain backward pass computes the gradients and reads nothing from them"
        ),
    ]


def _all(batches: Batches) -> list[Any]:
    return [batches(number) for number in range(len(batches.sizes))]


def _fits(model: Any, edit: bwlens.Edit) -> bool:
    return SHORTEST <= model.to_tokens(edit.text).shape[1] <= LONGEST


def _peaks(n: int) -> tuple[int, int]:
    """The most memory a process held that swept n prompts, and once it drew the figures, too."""
    done = subprocess.run(
        [sys.executable, "-c", _WEIGH, str(n), *_WEIGHED],
        capture_output=True,
        text=True,
        check=True,
    )
    swept, drawn = json.loads(done.stdout.splitlines()[-1])
    return swept, drawn
