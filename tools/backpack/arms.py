"""Train the arms that ask what k does, and the demo's Backpack: `python -m tools.backpack.arms`.

    python -m tools.backpack.arms --prose stories.json --steps 1000 --jobs 2 --out figures

Each arm is trained from each seed on the same rows in the same order. Needs torch, numpy,
transformers, safetensors and tokenizers alone. A run that was killed goes on when the same command
is given again. `--minutes` measures how fast a model trains, and chooses as many
steps as fit, the same for every arm. Leaves `results.csv`, `curves.csv` and the demo's weights.
"""

import argparse
import csv
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tools.backpack.text import CONTEXT, prepare, tokenizer
from tools.backpack.training import Job, Training

TRUNK = {"n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}

ARMS: dict[str, dict[str, Any] | None] = {
    "transformer": None,
    "k=1": {"num_senses": 1},
    "k=2": {"num_senses": 2},
    "k=4": {"num_senses": 4},
    "k=16": {"num_senses": 16},
    # A wider sense network: as many parameters as k = 16.
    "k=1, wide": {"num_senses": 1, "sense_intermediate_scale": 34},
    # The weights of k = 16 total 16, those of k = 1 total 1.
    "k=1, scaled": {"num_senses": 1, "output_scale": 16.0},
    "k=16, unit": {"num_senses": 16, "output_scale": 1 / 16},
    # Senses tied: k = 1's store, mixed as k = 16 mixes.
    "one store, 16 mixings": {"num_senses": 16, "shared_senses": True},
    "one store, 16 mixings, wide": {
        "num_senses": 16, "shared_senses": True, "sense_intermediate_scale": 34,
    },
    "k=1, signed": {"num_senses": 1, "signed_weights": True},
    "k=16, signed": {"num_senses": 16, "signed_weights": True},
}  # fmt: skip

_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

DEMOS = {
    "demo-d128-k16": (128, 16, 4),
    "demo-d144-k16": (144, 16, 2),
    "demo-d160-k8": (160, 8, 3),
    "demo-d176-k4": (176, 4, 3),
}
"""Name to d, k and layers: each less than 6 MB in half precision."""
DEMO_SEED = 100


def jobs(seeds: Sequence[int], scale: float, dropout: float, demos: int) -> list[Job]:
    """The arms' jobs by seed, then the demo's; `scale` shrinks the trunk for a try."""
    size = {**TRUNK, "n_embd": int(TRUNK["n_embd"] * scale)}
    size |= dict.fromkeys(_DROPOUT, dropout)
    arms = [Job(name, seed, senses, size) for seed in seeds for name, senses in ARMS.items()]
    small = dict.fromkeys(_DROPOUT, 0.0) | {"n_positions": CONTEXT}
    return arms + [
        Job(
            name, DEMO_SEED, {"num_senses": k},
            small | {"n_embd": int(d * scale), "n_layer": layers, "n_head": 4},
            longer=3, keep=True, lr=2e-3,
        )
        for name, (d, k, layers) in list(DEMOS.items())[:demos]
    ]  # fmt: skip


MEASURED = 60
"""Steps by which a model's speed is measured."""


def work(
    job: Job, folder: str, device: str, threads: int, steps: int, deadline: float, bar: bool = False
) -> None:
    """Train, measure, leave `<title>.json`; a fault is left as `<title>.error`."""
    import torch

    path = Path(folder)

    def report(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {job.title}: {line}", flush=True)

    try:
        torch.set_num_threads(threads)
        words = tokenizer()
        training = Training(job, path, len(words), words.eos_token_id, device)
        row = training.run(steps * job.longer, deadline, report, bar)
        _write(path / f"{job.title}.json", {"row": row, "curve": training.curve})
        report(f"finished: {row}")
    except Exception:
        (path / f"{job.title}.error").write_text(traceback.format_exc())
        report(traceback.format_exc())


def fitting_steps(todo: Sequence[Job], folder: Path, device: str, seconds: float, most: int) -> int:
    """Steps of each model that fit, as fast as its largest arm goes by itself here."""
    words = tokenizer()
    job = next((job for job in todo if job.name == "k=16"), todo[0])
    training = Training(job, folder, len(words), words.eos_token_id, device)
    training.step, begin = 0, 0.0
    for measured in range(2 * MEASURED):
        if measured == MEASURED:
            training.synchronize()
            begin = time.time()
        training.step %= MEASURED
        training.advance(10**9)
    training.synchronize()
    each = (time.time() - begin) / MEASURED
    units = sum(job.longer for job in todo)
    fit = min(most, max(100, int(0.75 * seconds / units / each)))
    print(f"{1000 * each:.2f} ms a step: {fit} steps", flush=True)
    return fit


def _write(path: Path, content: Any) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content))
    os.replace(unfinished, path)


def train_all(
    todo: Sequence[Job], folder: Path, device: str, at_once: int, steps: int,
    seconds: float | None, threads: int,
) -> None:  # fmt: skip
    """Every job whose figures are not there yet, `at_once` side by side."""
    begin = time.time()
    for stale in folder.glob("*.error"):
        stale.unlink()
    chosen = folder / "steps"
    if not chosen.exists():
        fit = steps if seconds is None else fitting_steps(todo, folder, device, seconds, steps)
        _write(chosen, fit)
    steps = json.loads(chosen.read_text())
    waiting = [job for job in todo if not (folder / f"{job.title}.json").exists()]
    deadline = begin + seconds if seconds is not None else float("inf")
    if at_once == 1:
        for job in waiting:
            work(job, str(folder), device, threads, steps, deadline, bar=True)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["tools.backpack.training"])
    running: list[Any] = []
    while waiting or running:
        running = [p for p in running if p.is_alive()]
        while waiting and len(running) < at_once:
            arguments = (waiting.pop(0), str(folder), device, threads, steps, deadline)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            running.append(process)
        time.sleep(0.1)


def collect(todo: Sequence[Job], folder: Path, out: Path) -> bool:
    """Write the tables; whether every job has its figures."""
    rows, curves = [], []
    for job in todo:
        path = folder / f"{job.title}.json"
        if path.exists():
            content = json.loads(path.read_text())
            rows.append(content["row"])
            curves += [
                {"arm": job.name, "seed": job.seed, "step": s, "perplexity": p}
                for s, p in content["curve"]
            ]
        weights = folder / f"{job.title}.safetensors"
        if weights.exists():
            shutil.copyfile(weights, out / weights.name)
    for name, table in (("results.csv", rows), ("curves.csv", curves)):
        if table:
            with (out / name).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]))
                writer.writeheader()
                writer.writerows(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                    for row in table
                )
    errors = sorted(folder.glob("*.error"))
    for error in errors:
        print(error.name, error.read_text(), flush=True)
    return len(rows) == len(todo)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.backpack.arms", description=__doc__)
    parser.add_argument("--prose", required=True, type=Path, help="a JSON list of stories")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables and weights")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (OUT/work)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=1500, help="a model, at most")
    parser.add_argument("--minutes", type=float, help="choose fewer steps so that all fit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="train these alone")
    parser.add_argument("--demos", type=int, default=len(DEMOS), help="how many of the demo's")
    parser.add_argument("--jobs", type=int, default=1, help="models side by side")
    parser.add_argument("--processes", type=int, default=1, help="for making the rows")
    parser.add_argument("--threads", type=int, default=1, help="a model, on the CPU")
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths, for a try")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the arms")
    options = parser.parse_args(arguments)
    begin = time.time()
    folder = options.work or options.out / "work"
    options.out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    todo = jobs(range(options.seeds), options.scale, options.dropout, options.demos)
    if options.arms is not None:
        unknown = set(options.arms) - {job.name for job in todo}
        if unknown:
            parser.error(f"no such arm: {sorted(unknown)}; there are {sorted({*ARMS, *DEMOS})}")
        todo = [job for job in todo if job.name in options.arms]
    steps: dict[int, int] = {}
    for job in todo:
        steps[job.seed] = max(steps.get(job.seed, 0), options.steps * job.longer)
    prepare(folder, json.loads(options.prose.read_text()), steps, options.processes)
    print(f"{len(todo)} models; rows made in {time.time() - begin:.0f} s", flush=True)
    # Measuring at the end takes the last seconds.
    seconds = options.minutes and options.minutes * 60 - (time.time() - begin) - 15
    train_all(todo, folder, options.device, options.jobs, options.steps, seconds, options.threads)
    done = collect(todo, folder, options.out)
    print(f"{time.time() - begin:.0f} s in all", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
