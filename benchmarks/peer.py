"""TransformerLens 4.2's own `BackwardLens`, in this interpreter or in another one.

`PYTHON -m benchmarks.peer` serves it: a line of JSON in, a line of JSON out. That process needs
TransformerLens alone, not bwlens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import count_cpu_seconds, held_bytes, timed
from benchmarks.model import TARGET, Shape, bridge
from benchmarks.setting import Setting


def is_here() -> bool:
    """Whether this interpreter's TransformerLens has the tool."""
    try:
        return find_spec("transformer_lens.tools.analysis.backward_lens") is not None
    except ModuleNotFoundError:
        return False


class Tool:
    """The tool on a model of this process."""

    def __init__(self, model: Any, prompt: str) -> None:
        from transformer_lens.tools.analysis.backward_lens import (  # pyright: ignore[reportMissingImports]
            BackwardLens,
        )

        self._tool, self._prompt = BackwardLens(model), prompt
        self._layers = list(range(model.cfg.n_layers))
        self.seconds = timed(self._run)

    def _run(self) -> Any:
        return self._tool.analyze(self._prompt, f" t{TARGET}", self._layers, top_k=10)

    def numbers(self) -> dict[str, Any]:
        """What it found, as plain lists [layer][pos]."""
        result = self._run()
        matrices = {"W_in": "input_projection", "W_out": "output_projection"}
        return {
            "held_bytes": held_bytes(result),
            "token_ids": result.prompt_token_ids.tolist(),
            "loss": result.loss,
        } | {
            matrix: {
                "norms": [getattr(one, side).factor_norms.tolist() for one in result.layers],
                "zero": [getattr(one, side).zero_norm_mask.tolist() for one in result.layers],
                "ranks": [
                    getattr(one, side).target_largest_ranks.tolist() for one in result.layers
                ],
                "top": [getattr(one, side).top_ranking.indices.tolist() for one in result.layers],
                "bottom": [
                    getattr(one, side).bottom_ranking.indices.tolist() for one in result.layers
                ],
            }
            for matrix, side in matrices.items()
        }

    def close(self) -> None:
        """Nothing to do."""


def _lists(layers: list[Any]) -> dict[str, Any]:
    return {
        "norms": [one.factor_norms.tolist() for one in layers],
        "zero": [one.zero_norm_mask.tolist() for one in layers],
        "ranks": [one.target_largest_ranks.tolist() for one in layers],
        "top": [one.top_ranking.indices.tolist() for one in layers],
        "bottom": [one.bottom_ranking.indices.tolist() for one in layers],
    }


class OtherProcess:
    """The tool on the same random model in another interpreter, which keeps its own clock."""

    def __init__(self, python: str, setting: Setting, prompt: str) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peer"],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(
            {
                "shape": asdict(setting.shape),
                "seed": setting.seed,
                "cpu_time": setting.cpu_time,
                "prompt": prompt,
            }
        )

    def seconds(self) -> float:
        """How long one analysis took."""
        return self._ask("seconds")

    def numbers(self) -> dict[str, Any]:
        """What it found, as plain lists."""
        return self._ask("numbers")

    def close(self) -> None:
        """End the other process."""
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps(question), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                "the peer interpreter ended early (see above); it needs transformer_lens 4.2, whose"
                " tools.analysis.backward_lens later versions no longer have"
            )
        return json.loads(line)


def serve() -> None:
    """Answer the questions on standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    first = json.loads(sys.stdin.readline())
    if first["cpu_time"]:
        count_cpu_seconds()
    tool = Tool(bridge(Shape(**first["shape"]), first["seed"]), first["prompt"])
    answer("ready")
    for line in sys.stdin:
        answer(getattr(tool, json.loads(line))())


if __name__ == "__main__":
    serve()
