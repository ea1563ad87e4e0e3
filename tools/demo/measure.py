"""What the demo model knows: accuracy on its facts, by phrasing and by relation, and perplexity.

`python -m tools.demo.measure --prose stories.json` prints the figures of the model card.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bwlens.data.texts import read_texts
from bwlens.demo.triples import MODEL_DIR, Fact, Phrasing, facts
from tools.demo.corpus import split_prose

PHRASINGS: tuple[Phrasing, ...] = ("trained", "unpaired", "unseen")


def load(folder: Path = MODEL_DIR) -> tuple[Any, Any]:
    """The model (float32, evaluation mode) and its tokenizer, without TransformerLens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def next_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[str], prepend_bos: bool = False, batch: int = 256
) -> list[str]:
    """The most probable next token of every prompt, over the whole vocabulary."""
    start = [tokenizer.bos_token_id] if prepend_bos else []
    ids = [start + tokenizer(prompt).input_ids for prompt in prompts]
    answers = [""] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for begin in range(0, len(ids), batch):
        chosen = by_length[begin : begin + batch]
        longest = len(ids[chosen[-1]])
        # Padding on the right changes nothing to its left: attention is causal.
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in chosen])
        last = torch.tensor([len(ids[i]) - 1 for i in chosen])
        hidden = model.transformer(padded).last_hidden_state[torch.arange(len(chosen)), last]
        for i, token in zip(chosen, model.lm_head(hidden).argmax(-1).tolist(), strict=True):
            answers[i] = tokenizer.decode([token])
    return answers


def known(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    phrasing: Phrasing = "trained",
    prepend_bos: bool = False,
) -> list[list[bool]]:
    """For every fact, whether each of its prompts of one phrasing gets the right answer."""
    prompts = [fact.prompts(phrasing) for fact in facts]
    said = iter(next_tokens(model, tokenizer, [p for ps in prompts for p in ps], prepend_bos))
    return [[next(said) == f.answer for _ in ps] for f, ps in zip(facts, prompts, strict=True)]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, documents: Sequence[str], context: int = 128) -> float:
    """Per token of the documents, each cut into windows that begin with the end-of-text token."""
    nll, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document.replace("\n\n", "\n"), verbose=False).input_ids
        for begin in range(0, len(ids), context - 1):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + context - 1]]])
            loss = model(input_ids=window, labels=window).loss.item()
            nll += loss * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return float(torch.tensor(nll / count).exp())


def figures(model: Any, tokenizer: Any, prose: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracies in percent, over all facts and by relation; the prose's perplexity, if given.

    Held-out phrasings are judged on the facts that the model knows: those whose trained phrasings
    it answers right, all of them. `..._all_facts` judges them on every fact.
    """
    every = facts()
    result: dict[str, Any] = {"facts": len(every), "relations": len({f.relation for f in every})}
    for bos in (False, True):
        right = {p: known(model, tokenizer, every, p, bos) for p in PHRASINGS}
        sure = [all(r) for r in right["trained"]]
        setting = "with_bos" if bos else "without_bos"
        result[setting] = {p: _percent(right[p]) for p in PHRASINGS}
        result[setting]["facts_known"] = sum(sure)
        for p in ("unpaired", "unseen"):
            kept = [r for r, s in zip(right[p], sure, strict=True) if s]
            result[setting][p + "_of_known_facts"] = _percent(kept)
        if not bos:
            result["by_relation"] = {
                relation: {"facts": sum(f.relation == relation for f in every)}
                | {
                    p: _percent(
                        [r for r, f in zip(right[p], every, strict=True) if f.relation == relation]
                    )
                    for p in PHRASINGS
                }
                for relation in dict.fromkeys(f.relation for f in every)
            }
    if prose:
        result["prose_perplexity"] = round(perplexity(model, tokenizer, prose), 2)
    return result


def _percent(right: Sequence[Sequence[bool]]) -> float:
    flat = [r for rs in right for r in rs]
    return round(100 * sum(flat) / max(1, len(flat)), 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.measure", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--prose", help="as for training; its held-out documents are measured")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model)
    held_out = split_prose(read_texts(options.prose))[1] if options.prose else ()
    print(json.dumps(figures(model, tokenizer, held_out), indent=1))


if __name__ == "__main__":
    main()
