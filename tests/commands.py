"""The command `bwlens`: run to the end here, shared by two processes, or killed in the middle.

Processes come from a server that has imported what each would take seven seconds for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

from typer.testing import CliRunner

from bwlens.cli import app

LAUNCHER = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
"""What `accelerate launch` is given, so that the user's own settings of it do not matter."""
PRELOADED = (
    "tests.commands",
    "bwlens.cli.editing",
    "bwlens.cli.sweeping",
    "bwlens.evaluation",
    "bwlens.experiments",
    "transformer_lens",
    "transformers.models.gpt2.modeling_gpt2",
    "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg",
)


def environment() -> dict[str, str]:
    """The environment without process numbers, and with one thread, as rounding hangs on them."""
    held = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return held | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def complete(args: Sequence[str], folder: Path) -> None:
    """Run it to its end in this process, which has one thread, too."""
    done = CliRunner().invoke(app, [*args, "--out", str(folder)])
    assert done.exit_code == 0, done.output


def launched(*commands: Sequence[str], folder: Path) -> None:
    """Run them to their ends, in turn, in two processes as `accelerate launch` numbers them."""
    done = subprocess.run(
        [sys.executable, *LAUNCHER, "-m", "tests.commands", str(folder)],
        cwd=Path(__file__).parents[1],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    variables = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert len(variables) == 2
    processes = [_server().Process(target=_run, args=(one, commands)) for one in variables]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]


def killed(args: Sequence[str], folder: Path, after: int = 1) -> None:
    """Start it, and kill it outright once so many parts are done and others are not."""
    command = [*args, "--out", str(folder)]
    process = _server().Process(target=_run, args=(environment(), [command]))
    process.start()
    deadline = time.monotonic() + 120
    while len(list(folder.glob("done/part-*.json"))) < after and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -9, "it ended before it was killed"


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(variables: Mapping[str, str], commands: Sequence[Sequence[str]]) -> None:
    """What a process of the server does."""
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables)
    with open(os.devnull, "w") as sink:
        sys.stdout = sys.stderr = sink
        for arguments in commands:
            app(arguments, standalone_mode=False)


if __name__ == "__main__":  # what `launched` starts: it leaves what a process is told
    name = f"{os.environ['RANK']}.json"
    (Path(sys.argv[1]) / name).write_text(json.dumps(dict(os.environ)))
