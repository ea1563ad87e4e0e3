"""What is watched while libraries load a model: package installers, and tensors that are missing.

TransformerLens runs `pip install torchvision` by itself for models that also see, which may
replace the user's torch; and what a checkpoint lacks, transformers fills with random numbers and a
line in a log that TransformerLens has switched off.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import subprocess
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

_ONE_AT_A_TIME = threading.RLock()


@dataclass
class Seen:
    """What happened meanwhile.

    Attributes:
        refused: Commands that would have installed something, as they were to be run.
        missing: Names of the model's tensors that the checkpoint does not have.
    """

    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@contextmanager
def watched() -> Generator[Seen, None, None]:
    """Refuse every process that installs packages, and note the tensors that were not loaded.

    Both by what is done, not by who does it: a process is refused where "install" is one of its
    arguments. One model is loaded at a time, as what is put in place here is the process' own.
    """
    from transformers import PreTrainedModel

    seen, pretrained = Seen(), cast(Any, PreTrainedModel)
    start: Any = subprocess.Popen
    load = pretrained.__dict__["from_pretrained"]

    class Popen(start):
        def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
            words = args.split() if isinstance(args, str) else [str(word) for word in args]
            if "install" in words:
                seen.refused.append(" ".join(words[words.index("install") - 1 :]))
                raise PermissionError(f"not installed while a model is loaded: {' '.join(words)}")
            super().__init__(args, *rest, **options)

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        wanted = options.pop("output_loading_info", False)
        model, info = load.__func__(cls, *args, output_loading_info=True, **options)
        seen.missing += sorted(info["missing_keys"])
        return (model, info) if wanted else model

    with _ONE_AT_A_TIME:
        subprocess.Popen, pretrained.from_pretrained = Popen, classmethod(from_pretrained)
        try:
            yield seen
        finally:
            subprocess.Popen, pretrained.from_pretrained = start, load
