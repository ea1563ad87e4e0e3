"""A Backpack's senses in words, how they are mixed, and which word's which sense says what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.passes import device_of, run
from bwlens.model.places import Point
from bwlens.model.prompts import make_batch, one_prompt
from bwlens.model.protocol import LensModel
from bwlens.model.sites import check_model
from bwlens.model.targets import check_ids
from bwlens.model.tokens import text_to_ids, token_texts
from bwlens.reading.readouts import Readout, readout

if TYPE_CHECKING:
    import pandas as pd


def mixing_of(model: LensModel) -> Any:
    """The block that mixes senses.

    Raises:
        TypeError: Not a TransformerLens model.
        NotImplementedError: It has none: no Backpack.
    """
    check_model(model)
    last = model.blocks[-1]
    last = getattr(last, "original_component", last)
    if not (hasattr(last, "sense_network") and hasattr(last, "sense_weight_net")):
        raise NotImplementedError(
            f"this {type(model).__name__} mixes no senses (its last block is a"
            f" {type(last).__name__}), so words have none to be read or changed; load a Backpack,"
            f' such as bwlens.load_model("backpack-demo")'
        )
    return last


def token_of(model: LensModel, word: str | int) -> int:
    """The one token that a word is.

    Raises:
        ValueError: It is several tokens, which have senses each of its own, or none; or an id
            outside the vocabulary.
    """
    if isinstance(word, int) and not isinstance(word, bool):
        check_ids(model, [word], "word")
        return word
    if not isinstance(word, str) or not word:
        raise ValueError(f"word is {word!r}; expected a word as it is written, or a token id")
    ids = text_to_ids(model, word, False)
    if len(ids) != 1:
        parts = ", ".join(map(repr, token_texts(model.tokenizer, ids)))
        raise ValueError(
            f"{word!r} is {len(ids)} tokens to this model ({parts}), and senses belong to a token:"
            f" ask for one of these"
            + ("" if word.startswith(" ") else f"; within a text it may be {' ' + word!r}")
        )
    return ids[0]


@torch.no_grad()
def sense_vectors(model: LensModel, word: str | int) -> Float[Tensor, "sense d_model"]:
    """C(x), the senses of a word: one vector each, or one in all where the senses are shared.

    Raises:
        ValueError: The word is not one token.
        NotImplementedError: The model is no Backpack.
    """
    mixing = mixing_of(model)
    token = torch.tensor([[token_of(model, word)]], device=device_of(model))
    point = Point(mixing.sense_network, "output")
    return run(model, token, points={point}).seen[point][0][0, :, 0].clone()


def senses(
    model: LensModel,
    word: str | int,
    *,
    top_k: int = 10,
    targets: int | Sequence[int] | None = None,
) -> Readout:
    """Each sense of a word, read in the vocabulary: logits C(x)_l E^T.

    Args:
        model: A bridge of a `Backpack`.
        word: As it is written, " Paris" with its leading space, or a token id; one token.
        top_k: How many words at each end.
        targets: Token ids whose ranks are wanted.

    Returns:
        A `Readout` [sense], highest and lowest words of each.

    Raises:
        ValueError: The word is not one token.
        NotImplementedError: The model is no Backpack.

    Source: Hewitt et al., ACL 2023, section 5.

    Example:
        >>> senses(model, " France").top_ids.shape  # doctest: +SKIP
        torch.Size([16, 10])
    """
    return readout(model, sense_vectors(model, word), top_k, targets)


@torch.no_grad()
def contextualization(
    model: LensModel, prompt: Any, *, prepend_bos: bool | None = None
) -> Float[Tensor, "sense to from_"]:
    """The weights alpha [k, n, n]: how much of sense l of word j goes to what follows word i.

    No word takes from a later one. Without `signed_weights` each row totals 1.
    `circuitsvis.attention.attention_heads(tokens, weights)` draws them.

    Raises:
        ValueError: More than one prompt, or what `make_batch` refuses.
        NotImplementedError: The model is no Backpack.

    Example:
        >>> contextualization(model, "Nigeria has its capital in").shape  # doctest: +SKIP
        torch.Size([16, 6, 6])
    """
    mixing = mixing_of(model)
    batch = make_batch(model, one_prompt(prompt), prepend_bos=prepend_bos)
    point = Point(mixing.sense_weight_net, "output")
    return run(model, batch.tokens, points={point}).seen[point][0][0].clone()


@dataclass(frozen=True, eq=False)
class Contributions:
    """A logit as the sum of what each sense of each word of the prompt gives to it.

    Attributes:
        values: [k, n]; their sum is `logit`, exactly. 0 for words after the position.
        tokens: The prompt's words.
        target: The word whose logit it is (less that of `other`).
        other: The word it is compared with, if any.
        position: Where it is predicted.
        logit: The model's own.
    """

    values: Float[Tensor, "sense pos"]
    tokens: tuple[str, ...]
    target: str
    other: str | None
    position: int
    logit: float

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each word and sense, the largest contributions first."""
        import pandas as pd

        k, n = self.values.shape
        rows = pd.DataFrame(
            {
                "pos": torch.arange(n).repeat(k).tolist(),
                "word": list(self.tokens) * k,
                "sense": torch.arange(k).repeat_interleave(n).tolist(),
                "logit": self.values.flatten().tolist(),
            }
        )
        return rows.sort_values("logit", key=abs, ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        of = f"{self.target!r}" + ("" if self.other is None else f" less {self.other!r}")
        top = self.frame.head(3)
        said = ", ".join(
            f"{word!r} sense {sense} {value:+.2f}"
            for word, sense, value in zip(top["word"], top["sense"], top["logit"], strict=True)
        )
        return f"Contributions(logit of {of} = {self.logit:.3f}; {said}, ...)"


@torch.no_grad()
def contributions(
    model: LensModel,
    prompt: Any,
    target: str | int,
    other: str | int | None = None,
    *,
    position: int | str = "last",
    prepend_bos: bool | None = None,
) -> Contributions:
    """What each (word, sense) gives to a logit: scale * alpha[l, i, j] C(x_j)_l . E_target.

    Args:
        model: A bridge of a `Backpack`.
        prompt: One prompt.
        target: The word whose logit at the position is taken apart; one token.
        other: Take apart logit(target) - logit(other).
        position: Which position predicts: "last" or an index, negative ones from the end.
        prepend_bos: Whether a text gets a BOS.

    Raises:
        ValueError: Target or other are not one token, the position is out of range, or what
            `make_batch` refuses.
        NotImplementedError: The model is no Backpack.

    Example:
        >>> contributions(model, "Nigeria has its capital in", " Abuja").frame  # doctest: +SKIP
    """
    mixing = mixing_of(model)
    goal = token_of(model, target)
    against = None if other is None else token_of(model, other)
    batch = make_batch(model, one_prompt(prompt), prepend_bos=prepend_bos)
    ids = batch.tokens[0].tolist()
    at = len(ids) - 1 if position == "last" else position
    if isinstance(at, bool) or not isinstance(at, int) or not -len(ids) <= at < len(ids):
        raise ValueError(
            f"position is {position!r}; expected 'last' or an index of the {len(ids)} tokens"
        )
    at %= len(ids)
    weights_at = Point(mixing.sense_weight_net, "output")
    senses_at = Point(mixing.sense_network, "output")
    passed = run(model, batch.tokens, points={weights_at, senses_at})
    weights = passed.seen[weights_at][0][0, :, at]  # [k, n]
    vectors = passed.seen[senses_at][0][0]  # [stores, n, d]
    W_U = model.unembed.W_U.detach()
    direction, logit = W_U[:, goal], passed.logits[0, at, goal]
    if against is not None:
        direction, logit = direction - W_U[:, against], logit - passed.logits[0, at, against]
    words = token_texts(model.tokenizer, [*ids, goal, *([] if against is None else [against])])
    return Contributions(
        values=(mixing.scale * weights * (vectors @ direction)).cpu(),
        tokens=tuple(words[: len(ids)]),
        target=words[len(ids)],
        other=None if against is None else words[-1],
        position=at,
        logit=float(logit),
    )
