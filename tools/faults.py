"""Known faults, put into a copy of the package one at a time: the tests must notice each.

    python -m tools.faults              all of them, some fifteen minutes
    python -m tools.faults KL ranks     those whose names hold one of these

A fault that is not noticed is named at the end, and the exit code is 1. `tests/test_faults.py`
sees that the list still fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("bwlens", "tests", "tools", "benchmarks", "notebooks", "docs")


class Fault(NamedTuple):
    """What is wrong, where, and which tests should see it."""

    name: str
    path: str
    right: str
    wrong: str
    tests: str


FAULTS = (
    # What a lens says of itself.
    Fault(
        "target's ranks are the answer's", "lens/backward.py",
        "return self._ranks(matrix)[..., 0]",
        "return self._ranks(matrix)[..., len(self.target_ids)]", "lens",
    ),
    Fault(
        "answer's ranks are the target's", "lens/backward.py",
        "return self._ranks(matrix)[..., len(self.target_ids)]",
        "return self._ranks(matrix)[..., 0]", "lens",
    ),
    Fault(
        "the target's probability is of its last token", "lens/making.py",
        "float(probabilities[target_ids[0]])", "float(probabilities[target_ids[-1]])", "lens",
    ),
    Fault(
        "W_Q shows what W_in's x says", "lens/reading.py",
        '"attn" if matrix[2:] in "QKVO" else "mlp"', '"mlp"', "lens",
    ),
    Fault(
        "promoted and suppressed words are swapped", "lens/backward.py",
        '(which == "promoted") == (self.through(matrix) != "delta")',
        '(which == "promoted") == (self.through(matrix) == "delta")', "lens",
    ),
    # Gradients.
    Fault(
        "the norm leaves out the rows' overlap", "gradient/matrix.py",
        "squared = self.inner(self)", "squared = self._row_norms().square().sum()", "gradient",
    ),
    Fault(
        "a hook point that fires again replaces its gradient", "gradient/capturing.py",
        "out[name] = out[name] + delta if name in out else delta", "out[name] = delta", "gradient",
    ),
    Fault(
        "padding is kept as rows", "gradient/capturing.py",
        "self._keep = None if bool(keep.all()) else keep", "self._keep = None", "gradient",
    ),
    # Readings.
    Fault(
        "ranks count ties", "reading/scoring.py",
        "torch.gt(tile, target_scores", "torch.ge(tile, target_scores", "reading",
    ),
    Fault(
        "the dual reads delta without the gain", "reading/standardised.py",
        "(solved * gain / length)", "(solved / length)", "reading",
    ),
    Fault(
        "the cosine is not centred", "reading/standardised.py",
        "centre = (total / head.W_U.shape[1]).to(dtype)",
        "centre = torch.zeros_like(total / head.W_U.shape[1]).to(dtype)", "reading",
    ),
    Fault(
        "an effect steps uphill", "reading/effect.py",
        "down = -delta / delta.norm().square()", "down = delta / delta.norm().square()", "reading",
    ),
    # Identity and data.
    Fault(
        "a fingerprint walks in even steps", "model/identity.py",
        "while math.gcd(step, flat.numel()) > 1:", "while step % 2 and step > 1:",
        "model/test_identity.py",
    ),
    Fault(
        "prose of exactly 30 characters is left out", "data/prose.py",
        "len(line) >= LEAST_CHARACTERS", "len(line) > LEAST_CHARACTERS", "data evaluation",
    ),
    # Editing.
    Fault(
        "the value's KL is reversed", "edit/value.py",
        "kl = (new.exp() * (new - original)).sum(1)",
        "kl = (original.exp() * (original - new)).sum(1)", "edit",
    ),
    Fault(
        "MEND's KL is reversed", "edit/mend_passes.py",
        "return (log_p.exp() * (log_p - log_q))", "return (log_q.exp() * (log_q - log_p))",
        "edit/test_mend.py",
    ),
    Fault(
        "ROME's default layer is one too deep", "edit/_rome.py",
        "int(_DEPTH * (len(model.blocks) - 1))", "int(_DEPTH * (len(model.blocks) - 1)) + 1",
        "edit model/test_default_layers.py",
    ),
    Fault(
        "the shift's default layer is one too deep", "edit/shift.py",
        "return int(_DEPTH * (len(model.blocks) - 1))",
        "return int(_DEPTH * (len(model.blocks) - 1)) + 1", "edit model/test_default_layers.py",
    ),
    Fault(
        "MEMIT's lowest layer is left out", "edit/spread.py",
        "range(int(_FIRST * top), int(_LAST * top) + 1)",
        "range(int(_FIRST * top) + 1, int(_LAST * top) + 1)", "edit model/test_default_layers.py",
    ),
    Fault(
        "MEMIT writes all that is missing in every layer", "edit/spread.py",
        "residual / left)", "residual)", "edit/test_memit.py edit/test_alpha_edit.py",
    ),
    Fault(
        "AlphaEdit writes where the text's keys are large", "edit/_alpha_edit.py",
        "sizes < threshold * sizes.mean()", "sizes >= threshold * sizes.mean()",
        "edit/test_alpha_edit.py",
    ),
    # Changes of weights.
    Fault(
        "undo subtracts, and keeps the rounding", "changes/change.py",
        "weight.live.copy_(self.saved[site])",
        "weight.write(weight.plus(-self.change[site].to(weight.device, weight.dtype).dense()))",
        "changes",
    ),
    # Evaluation.
    Fault(
        "a tie counts as success", "evaluation/metrics.py",
        "(nll_other > nll_wanted).double()", "(nll_other >= nll_wanted).double()", "evaluation",
    ),
    Fault(
        "S is the arithmetic mean", "evaluation/metrics.py",
        "3 / sum(1 / part for part in parts)", "sum(parts) / 3", "evaluation",
    ),
    Fault(
        "an interval leaves out twice as much", "runs/intervals.py",
        "tail = (1 - level) / 2", "tail = 1 - level", "runs experiments evaluation",
    ),
    # Attention.
    Fault(
        "heads are in order of their weakest score", "attention/scores.py",
        "argsort(descending=True, stable=True)", "argsort(stable=True)", "attention",
    ),
)  # fmt: skip


def noticed(fault: Fault, checkout: Path) -> bool:
    """Whether a test fails with it; the copy is as before afterwards."""
    file = checkout / "bwlens" / fault.path
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--no-header"]
    # Neither a file read before the change nor data that lie elsewhere must decide.
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BWLENS_SHARED": os.environ.get("BWLENS_SHARED", str(ROOT.parent / "shared")),
    }
    try:
        done = subprocess.run(
            [*command, *(f"tests/{path}" for path in fault.tests.split())],
            cwd=checkout, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        file.write_text(text, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode and not failed:  # pytest itself
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    print(f"  {failed[0] if failed else 'every test passed'}", flush=True)
    return bool(failed)


def main(names: list[str]) -> int:
    """Try those that are named; 1 if one is not noticed."""
    chosen = [
        f for f in FAULTS if not names or any(name.lower() in f.name.lower() for name in names)
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        for name in COPIED:
            shutil.copytree(
                ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, checkout)
        missed = []
        for fault in chosen:
            print(f"{fault.name} ({fault.path})", flush=True)
            if not noticed(fault, checkout):
                missed.append(fault.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} noticed", *missed, sep="\n  not: ")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
