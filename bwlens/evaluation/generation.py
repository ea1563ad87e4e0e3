"""Text that a model goes on to write: greedy, or sampled the same way every time.

All rows of a batch advance together, one position at a time, and a row whose prompt is longer
takes its prompt's own tokens meanwhile. So nothing is padded, and the keys and values of earlier
positions can be kept where the model offers that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bwlens.evaluation.questions import Row
from bwlens.model.passes import device_of
from bwlens.model.stepping import quickest_step


class Writer:
    """Writes on after prompts with one model, with as little work as the model allows.

    Args:
        model: A TransformerBridge or HookedTransformer; in eval mode now and while it writes.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = device_of(model)
        self._most = getattr(model.cfg, "n_ctx", None) or 1 << 30
        self._new_step = quickest_step(model)

    def greedy_contains(self, prompts: Sequence[Row], text: str, n_tokens: int) -> list[bool]:
        """Whether `text` is in the next `n_tokens` tokens after each prompt, by greedy decoding.

        As a whole word: " art" is not in " artist".
        """
        if not prompts:
            return []
        pattern = re.compile(re.escape(text) + r"(?!\w)")
        wholly = [False] * len(prompts)
        at_the_end = list(wholly)
        stops = [len(prompt) + n_tokens for prompt in prompts]
        for rows in self._written(prompts, max(stops), lambda logits, _: logits.argmax(-1)):
            for i, prompt in enumerate(prompts):
                if wholly[i] or not len(prompt) < len(rows[i]) <= stops[i]:
                    continue
                written = self._continuation(rows[i], prompt)
                ends = [match.end() for match in pattern.finditer(written)]
                # At the very end the word may still grow: so it counts if it is the last.
                wholly[i] = any(end < len(written) for end in ends)
                at_the_end[i] = bool(ends)
            if all(wholly):
                break
        return [a or b for a, b in zip(wholly, at_the_end, strict=True)]

    def sampled(
        self, prompts: Sequence[Row], length: int, top_k: int = 5, seed: int = 0
    ) -> list[str]:
        """Each prompt continued to `length` tokens in all, without special tokens.

        Each token is drawn from the `top_k` most probable ones, in proportion to their
        probabilities. The draws hang on the seed and the place alone, so models that agree write
        the same, and models that differ are compared on the same luck.
        """
        if not prompts:
            return []
        generator = torch.Generator().manual_seed(seed)
        luck = torch.rand(length, len(prompts), generator=generator).to(self._device)

        def draw(logits: Tensor, pos: int) -> Tensor:
            best, ids = logits.float().topk(min(top_k, logits.shape[-1]))
            below = best.softmax(-1).cumsum(-1)[:, :-1]
            return ids.gather(1, (luck[pos, :, None] > below).sum(-1, keepdim=True))[:, 0]

        written = [list(prompt) for prompt in prompts]
        for rows in self._written(prompts, length, draw):
            written = rows
        decode = self._model.tokenizer.decode
        return [
            decode(max(row, list(prompt), key=len), skip_special_tokens=True)
            for row, prompt in zip(written, prompts, strict=True)
        ]

    def _continuation(self, row: Sequence[int], prompt: Row) -> str:
        """What a row says after its prompt; decoded whole, as a piece may lose its first space."""
        decode = self._model.tokenizer.decode
        before = decode(list(prompt), clean_up_tokenization_spaces=False)
        return decode(list(row), clean_up_tokenization_spaces=False)[len(before) :]

    def _written(
        self, prompts: Sequence[Row], length: int, choose: Callable[[Tensor, int], Tensor]
    ) -> Iterator[list[list[int]]]:
        """The rows after each new token, until all have `length` tokens or fill the context.

        `choose` takes logits [row, d_vocab] and the position to be filled. A row that has not
        reached its prompt's end is shown as far as it got.
        """
        start = min(map(len, prompts))
        rows = [list(prompt[:start]) for prompt in prompts]
        new = torch.tensor(rows, device=self._device)
        step = self._new_step(len(prompts))
        for pos in range(start, min(length, self._most)):
            with torch.no_grad():
                chosen = choose(step(new), pos).tolist()
            for row, prompt, token in zip(rows, prompts, chosen, strict=True):
                row.append(prompt[pos] if pos < len(prompt) else token)
            new = torch.tensor([row[-1:] for row in rows], device=self._device)
            yield rows
