"""Small models trained with and without the last block's residual: where do their facts sit?

    python -m tools.residuals.train --out runs/residuals [--seeds 3] [--steps 400] [--device cuda]

Two arms, equal but for one connection: in "without", the last block hands on its feed-forward
product alone, so that every word the model says is a mix of rows of the last W_out. Same facts,
prose, seeds and steps. Every run is resumed from its checkpoint, and not repeated once its row
stands in `runs.jsonl`; then `residuals.csv` is written: for each arm, the facts known and the loss
on held-out prose, as they are and with one layer's feed-forward product put at its mean.

It stands alone: torch, transformers, this repository (its demo facts, tokenizer and prose).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bwlens.data.texts import read_texts
from bwlens.demo.triples import MODEL_DIR, ROOM, Fact, facts
from tools.demo.corpus import ANSWER, PHRASE, PROSE, Corpus, Row, split_prose

ARMS = ("with", "without")
WEIGHTS = torch.tensor([0.3, 3.0, 1.0])[torch.tensor([PHRASE, ANSWER, PROSE]).argsort()]
"""What a token of each kind counts in the loss."""


@dataclass(frozen=True)
class Settings:
    """All that decides a run, beside the facts and the prose."""

    arm: str = "with"
    seed: int = 0
    steps: int = 400
    n_facts: int = 300
    fact_rows: int = 24
    fact_length: int = 40
    prose_rows: int = 2
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 96
    lr: float = 3e-3


class Small(GPT2LMHeadModel):
    """A GPT-2 whose last block may hand on its feed-forward product alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.product: torch.Tensor | None = None
        self.means: dict[int, torch.Tensor] = {}
        blocks: Any = self.transformer.h
        for layer, block in enumerate(blocks):
            block.mlp.register_forward_hook(self._replace(layer))
        last = blocks[-1]
        last.mlp.register_forward_hook(self._keep)
        if not config.last_residual:
            last.register_forward_hook(self._alone)

    def _replace(self, layer: int) -> Any:
        return lambda module, args, output: (
            self.means[layer].expand_as(output) if layer in self.means else None
        )

    def _keep(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.product = output

    def _alone(self, module: Any, args: Any, output: Any) -> Any:
        return (self.product, *output[1:]) if isinstance(output, tuple) else self.product


def main() -> None:
    """Train what is not trained yet, measure, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prose", default=str(ROOM / "stories.txt"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    kept, held_out = split_prose(read_texts(given.prose))
    for seed in range(given.seeds):
        for arm in ARMS:
            settings = Settings(arm, seed, given.steps)
            if any(row["settings"] == asdict(settings) for row in done):
                continue
            known = random.Random(0).sample(facts(), settings.n_facts)
            corpus = Corpus(tokenizer, known, kept)
            model = train(settings, corpus, tokenizer, given.out, given.device)
            rows = measure(model, tokenizer, known, held_out, settings)
            done.append({"settings": asdict(settings), "rows": rows})
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
    table = pd.DataFrame(
        {"arm": run["settings"]["arm"], "seed": run["settings"]["seed"], **row}
        for run in done
        for row in run["rows"]
    )
    table.round(4).to_csv(given.out / "residuals.csv", index=False)
    print(table.groupby(["arm", "meaned"])[["facts", "unpaired", "prose"]].agg(["mean", "std"]))


def train(settings: Settings, corpus: Corpus, tokenizer: Any, out: Path, device: str) -> Small:
    """One run, from its checkpoint if there is one."""
    torch.manual_seed(settings.seed)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=settings.context, n_embd=settings.width,
        n_layer=settings.layers, n_head=settings.heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    config.last_residual = settings.arm == "with"
    model: Any = Small(config)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, (0.9, 0.98), weight_decay=0.05)
    checkpoint, first = out / f"{settings.arm}-{settings.seed}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"{checkpoint} was made with {state['settings']}; name another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, settings.steps), f"{settings.arm} {settings.seed}", initial=first)
    for step in bar:
        warm, left = min(1.0, (step + 1) / 40), 1 - step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warm * (0.02 + 0.98 * left)
        rng = random.Random(f"{settings.seed}|{step}")  # both arms read the same
        batches = [
            [corpus.fact_row(rng, settings.fact_length) for _ in range(settings.fact_rows)],
            [corpus.prose_row(rng, settings.context) for _ in range(settings.prose_rows)],
        ]
        losses, kinds = zip(*(_losses(model, rows, device) for rows in batches), strict=True)
        weights = WEIGHTS.to(device)[torch.cat(kinds)]
        loss = (torch.cat(losses) * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            bar.set_postfix(loss=loss.item())
            state = {"settings": asdict(settings), "step": step + 1, "model": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, f"{checkpoint}.tmp")
            Path(f"{checkpoint}.tmp").replace(checkpoint)
    return model.eval()


def _losses(model: Small, rows: Sequence[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([row.ids for row in rows], device=device)
    kinds = torch.tensor([row.kinds for row in rows], device=device)[:, 1:].flatten()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"), kinds


@torch.no_grad()
def measure(
    model: Small, tokenizer: Any, known: Sequence[Fact], prose: Sequence[str], settings: Settings
) -> list[dict[str, Any]]:
    """Facts known and loss on prose, as it is and with each layer's product at its mean."""
    means = _means(model, tokenizer, known)
    out = []
    for layer in (None, *range(settings.layers)):
        model.means = {} if layer is None else {layer: means[layer]}
        out.append(
            {
                "meaned": "none" if layer is None else str(layer),
                "facts": _known(model, tokenizer, known, "trained"),
                "unpaired": _known(model, tokenizer, known, "unpaired"),
                "prose": _prose_loss(model, tokenizer, prose, settings.context),
            }
        )
    model.means = {}
    return out


def _blocks(model: Any) -> Any:
    return model.transformer.h


def _means(model: Small, tokenizer: Any, known: Sequence[Fact]) -> dict[int, torch.Tensor]:
    """Each layer's mean product over the facts' phrasings."""
    sums: dict[int, list[torch.Tensor]] = {}
    handles = [
        block.mlp.register_forward_hook(
            lambda m, a, out, layer=layer: sums.setdefault(layer, []).append(out.flatten(0, 1))
        )
        for layer, block in enumerate(_blocks(model))
    ]
    for fact in known[::3]:
        _logits(model, tokenizer, fact.prompts("trained")[0])
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts).mean(0) for layer, parts in sums.items()}


def _logits(model: Small, tokenizer: Any, text: str) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text).input_ids], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0]


def _known(model: Small, tokenizer: Any, known: Sequence[Fact], phrasing: Any) -> float:
    """Share of facts whose answer is the likeliest next token, one phrasing each."""
    right = 0
    for fact in known:
        (answer,) = tokenizer(fact.answer).input_ids
        prompt = fact.prompts(phrasing)[0]
        right += int(_logits(model, tokenizer, prompt)[-1].argmax()) == answer
    return right / len(known)


def _prose_loss(model: Small, tokenizer: Any, prose: Sequence[str], context: int) -> float:
    """Mean NLL of a token, in nats, over the beginnings of the documents."""
    losses = []
    for text in prose:
        ids = torch.tensor(
            tokenizer(text, truncation=True, max_length=context).input_ids, device=model.device
        )
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    main()
