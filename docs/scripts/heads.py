"""Which rankings of heads find those that a task needs, on SmolLM2.

python docs/scripts/heads.py [FOLDER OF THE LRE RELATIONS]

Writes results/heads.csv and heads-TASK.png; what was measured before is taken from docs/.heads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bwlens
from bwlens.experiments._head_ranking import head_ranking, in_context, induction

RESULTS = Path(__file__).parents[1] / "results"
KEPT = RESULTS.parent / ".heads"
RELATIONS = ("factual/country_capital_city", "factual/country_language", "linguistic/adj_antonym")


def main() -> None:
    """Run both tasks."""
    import pandas as pd

    model, tables = bwlens.load_model("smollm2"), []
    tasks: dict[str, Any] = {"induction": induction(model.cfg.d_vocab, n_prompts=26)}
    if len(sys.argv) > 1:
        files = [Path(sys.argv[1]) / f"{name}.json" for name in RELATIONS]
        relations = [json.loads(file.read_text("utf-8")) for file in files]
        tasks["in context"] = in_context(relations, n_prompts=26, shots=2)
    for task, (prompts, targets) in tasks.items():
        print(f"{task}: 2 prompts rank 270 heads, 24 judge", flush=True)
        result = head_ranking(
            model, prompts, targets, n_ranking=2, seeds=1, batch_size=45,
            kept=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0), out=KEPT / task.replace(" ", "_"),
        )  # fmt: skip
        figure = result.plot()
        figure.axes[0].set_title(f"SmolLM2-135M, {task}", fontsize=7)
        figure.savefig(RESULTS / f"heads-{task.replace(' ', '-')}.png", dpi=200)
        tables += [result.summary(top).assign(task=task, top=top) for top in (1, 2, 3)]
        print(result.area().to_string(), flush=True)
        result.area().assign(task=task).to_csv(RESULTS / f"heads-{task.replace(' ', '-')}.csv")
    pd.concat(tables).to_csv(RESULTS / "heads.csv", index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
