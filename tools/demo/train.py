"""Train the demo model: `python -m tools.demo.train --prose stories.json --out demo-model`.

Tokenizer, rows and weights follow from the seed and the settings alone. A checkpoint is written
every so many steps, by renaming a finished file into place; the same command started again goes on
from it and ends where an undisturbed run ends, up to the order of floating-point sums.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bwlens.data.texts import read_texts
from bwlens.demo.triples import Fact, facts
from tools.demo.corpus import ANSWER, PHRASE, PROSE, Corpus, Row, split_prose
from tools.demo.tokenizer import train_tokenizer

LOSS_WEIGHTS = {PHRASE: 0.3, ANSWER: 3.0, PROSE: 1.0}
"""What a token counts in the loss: names cannot be foretold, answers are the point."""


@dataclass(frozen=True)
class Settings:
    """All that decides the trained weights, beside the facts, the prose and the versions."""

    seed: int = 0
    steps: int = 900
    fact_rows: int = 40
    fact_length: int = 64
    prose_rows: int = 8
    context: int = 128
    vocab: int = 5000
    layers: int = 8
    heads: int = 6
    width: int = 192
    lr: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.1

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    settings: Settings,
    known: Sequence[Fact],
    prose: Sequence[str],
    out: Path,
    checkpoint_every: int = 50,
    stop_after: int | None = None,
) -> Path:
    """Train on the facts and the prose; leave a Hugging Face folder in half precision at `out`.

    Args:
        settings: sizes, steps, seed.
        known: the facts to learn.
        prose: the documents to train on (the held-out ones already taken away).
        out: the folder to fill; a checkpoint in it is gone on from.
        checkpoint_every: steps between two checkpoints.
        stop_after: leave off after this step, with a checkpoint and no model, as if killed.

    Raises:
        ValueError: the checkpoint in `out` was made with other settings, or answers do not fit
            into the vocabulary as single tokens.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    state = _load_checkpoint(checkpoint, settings)
    if state is None:
        tokenizer = train_tokenizer(prose, known, settings.vocab, settings.context)
        tokenizer.save_pretrained(out)
        _compact(out / "tokenizer.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    corpus = Corpus(tokenizer, known, prose)
    model, optimizer = _initial(settings, len(tokenizer), tokenizer.eos_token_id)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    with _progress(first, settings.steps) as advance:
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            answer_loss = _step(model, optimizer, corpus, settings, step)
            advance(answer_loss)
            done = step + 1
            if done % checkpoint_every == 0 or done in (settings.steps, stop_after):
                _save_checkpoint(checkpoint, settings, done, model, optimizer)
            if done == stop_after and done < settings.steps:
                return out
    save_model(model, out)
    checkpoint.unlink()
    return out


def save_model(model: GPT2LMHeadModel, out: Path) -> None:
    """Write config and weights, the latter in half precision; a load gives float32 again."""
    model.half()
    model.config.dtype = torch.float32
    # Trained with the fused kernel; the same function under the name that GPT-2 gives it.
    model.config.activation_function = "gelu_new"
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config["n_ctx"] = config["n_positions"]  # GPT-2's own name for it, which HookedTransformer asks
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _initial(
    settings: Settings, vocab: int, end: int
) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer]:
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "wte" not in n]
    decayed = [p for p in decayed if p is not model.transformer.wpe.weight]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _step(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    settings: Settings,
    step: int,
) -> float:
    """One update from rows of facts and rows of prose; the mean loss of the facts' answers."""
    rng = random.Random(f"{settings.seed}|{step}")
    batches = [
        [corpus.fact_row(rng, settings.fact_length) for _ in range(settings.fact_rows)],
        [corpus.prose_row(rng, settings.context) for _ in range(settings.prose_rows)],
    ]
    total = sum(LOSS_WEIGHTS[k] for rows in batches for row in rows for k in row.kinds[1:])
    answer_loss, answers = 0.0, 0
    for rows in batches:
        losses, kinds = _losses(model, rows)
        weights = torch.tensor([LOSS_WEIGHTS[kind] for kind in sorted(LOSS_WEIGHTS)])[kinds]
        ((losses * weights).sum() / total).backward()
        answer_loss += losses.detach()[kinds == ANSWER].sum().item()
        answers += int((kinds == ANSWER).sum())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return answer_loss / max(1, answers)


def _losses(
    model: GPT2LMHeadModel, rows: list[Row]
) -> tuple[Float[torch.Tensor, " token"], torch.Tensor]:
    """Cross-entropy of every token but the first of its row, and the kinds of these tokens."""
    ids = torch.tensor([row.ids for row in rows])
    kinds = torch.tensor([row.kinds for row in rows])[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses, kinds.flatten()


def _save_checkpoint(
    path: Path, settings: Settings, step: int, model: torch.nn.Module, optimizer: Any
) -> None:
    state = {
        "settings": asdict(settings),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _load_checkpoint(path: Path, settings: Settings) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise ValueError(
            f"{path} was made with other settings, {state['settings']}: "
            "start with those, or in another folder"
        )
    return state


def _compact(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )


@contextmanager
def _progress(first: int, steps: int) -> Iterator[Any]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, answer loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, completed=first, loss=math.nan)
        yield lambda loss: progress.update(task, advance=1, loss=loss)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.train", description=__doc__)
    parser.add_argument(
        "--prose", required=True, help="JSON list, text file, or Hugging Face data set name"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="folder to fill")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, steps=options.steps)
    prose, _ = split_prose(read_texts(options.prose))
    started = time.monotonic()
    train(settings, facts(), prose, options.out)
    print(f"{options.out}: trained in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
