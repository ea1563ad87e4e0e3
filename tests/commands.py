"""The command `bwlens`: run to the end here, shared by two processes, or killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner

from bwlens.cli import app

LAUNCHER = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
"""What `accelerate launch` is given, so that the user's own settings of it do not matter."""


def environment() -> dict[str, str]:
    """The environment without process numbers, and with one thread, as rounding hangs on them."""
    held = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return held | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def complete(args: Sequence[str], folder: Path) -> None:
    """Run it to its end in this process, which has one thread, too."""
    done = CliRunner().invoke(app, [*args, "--out", str(folder)])
    assert done.exit_code == 0, done.output


def launched(*commands: Sequence[str]) -> None:
    """Have `accelerate launch` run them to their ends, in turn, in two processes."""
    done = subprocess.run(
        [sys.executable, *LAUNCHER, "-m", "tests.commands", json.dumps(commands)],
        cwd=Path(__file__).parents[1],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def killed(args: Sequence[str], folder: Path, after: int = 1) -> None:
    """Start it, and kill it outright once so many parts are done and others are not."""
    with subprocess.Popen(
        [sys.executable, "-m", "bwlens", *args, "--out", str(folder)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("done/part-*.json"))) < after and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


if __name__ == "__main__":  # what `launched` starts
    for arguments in json.loads(sys.argv[1]):
        app(arguments, standalone_mode=False)
