"""The Backward Lens of a prompt is made: gradients captured, read, judged, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, Literal

import torch

from bwlens.attention.maps import Taking
from bwlens.gradient.capturing import captured
from bwlens.gradient.objectives import NLL, as_objective
from bwlens.lens import neurons as neurons_
from bwlens.lens.asking import prompt_of, readings_of, whole_number
from bwlens.lens.backward import BackwardLens
from bwlens.lens.reading import Positions, Reading, resolve_positions
from bwlens.model.head import head_of
from bwlens.model.identity import model_label
from bwlens.model.prompts import Edit, Prompts
from bwlens.model.sites import Layers, default_matrices, resolve_layers, resolve_matrices
from bwlens.model.tokens import first_token, subject_positions, token_texts
from bwlens.reading.readouts import Readout
from bwlens.reading.transported import check_jacobian
from bwlens.reading.trust import measure_trust


def backward_lens(
    model: Any,
    prompt: Prompts | Sequence[int] | Edit | Any,
    target: Any = None,
    *,
    subject: str | None = None,
    matrices: str | Sequence[str] | None = None,
    layers: Layers = None,
    top_k: int = 10,
    normalize: bool | Literal["both"] = False,
    prepend_bos: bool | None = None,
    reading: str | Sequence[str] = "plain",
    imprint: str = "plain",
    positions: Positions = None,
    temper: float = 0.0,
    bias: bool = True,
    jacobian: Any = None,
    trust: bool | Positions = False,
    follow: str | Sequence[str] = (),
    neurons: int = 0,
    attention: bool = False,
) -> BackwardLens:
    """Read what one gradient step would write: every layer, every token, in the vocabulary.

    Args:
        model: A TransformerBridge or HookedTransformer (`bwlens.load_model` makes one).
        prompt: One prompt: a text, token ids ([pos] or [1, pos], a tensor or a list), or an `Edit`
            or record, whose text, new target and subject are taken.
        target: What the model is to say next, as it is written (" Paris" is not "Paris"), or an
            objective. None takes the edit's.
        subject: A part of the prompt that the fact is about; its tokens are marked.
        matrices: One or several out of `bwlens.MATRICES`; None for those of the MLP.
        layers: One, several or a slice, from 0, negative ones from the model's end; None for all.
        top_k: Words kept at each end of each cell, from 1; at most all that there are.
        normalize: Read each vector at unit length (appendix H): "normalised" in place of "plain".
            Norms stay the raw ones. "both" keeps the two readings.
        prepend_bos: Whether a text prompt gets a BOS token; None is the model's own default.
        reading: How delta becomes words: one, or several for tables to switch between. "plain", the
            paper's, applies the final norm and the unembedding; "dual" and "cosine" undo the
            unembedding instead (`bwlens.reading.standardised`); "transported" carries delta through
            `jacobian` first. "effect" measures what a step on each cell does to the words that
            follow (`bwlens.reading.effect`), at two forward passes a cell or more; of a loss that
            reads several positions, at the first from the cell's own on.
        imprint: How x becomes words: "plain", "dual" or "cosine".
        positions: Positions to read: "last", "subject", one, several, a slice; None for all. Others
            have no words. "effect" reads at most 512 cells: beyond, the subject's and the last.
        temper: For "effect": words are ordered by p^temper times the change of their
            log-probability. 0 lets words lead that nobody would say; .1 reads better on SmolLM2,
            and worse where the target is all but impossible beforehand (the demo).
        bias: False leaves a final LayerNorm's bias (and the unembedding's) out of plain readings.
        jacobian: A `JacobianLens` of TransformerLens 4.3 or later, fitted to this model.
        trust: Also measure how far the words of W_out (of W_O, where W_out is not read) say what a
            step does, as `BackwardLens.trust`, which the tables show: True at the last position
            read, or at positions named as in `positions` (`BackwardLens.trust_at`).
        follow: Further words, as they are written, whose rank every cell is to hold, as those of
            the target and the answer: " Madrid". Of a word of several tokens, the first one's.
        neurons: Of how many neurons, those that the step moves most, to read the word in each cell
            (`BackwardLens.neurons`); that takes about as long as to read so many more vectors.
        attention: Also take R and A of every head (`bwlens.reversed_attention`),
            in the same pass.

    Raises:
        ValueError: An unknown reading, or `normalize` without the plain one; positions out of
            range; "transported" without a `jacobian` of this model; more than one prompt, no
            target, a subject that is not in the prompt, another `normalize` or `top_k`, or anything
            that `capture` and `readout` refuse; `trust` without a matrix read through delta.
        UntrueGradientError: `trust` found that the loss does not fall as delta says.
        NotImplementedError: No MLP was found and no matrices were named, or what `capture` refuses.

    Source: Backward Lens, sections 4.2 and 5, figures 4 and 11-15.

    Example:
        >>> lens = backward_lens(model, "Lionel Messi plays for", " Paris")  # doctest: +SKIP
        >>> lens.promoted(k=3)  # doctest: +SKIP
    """
    prompt, target, subject, start = prompt_of(prompt, target, subject)
    top_k = whole_number(top_k, "top_k")
    follow = [follow] if isinstance(follow, str) else list(follow)
    if not all(isinstance(word, str) and word for word in follow):
        raise ValueError(f"follow takes words as they are written, such as ' Madrid'; got {follow}")
    readings = readings_of(reading, normalize, temper, imprint)
    matrices = default_matrices(model) if matrices is None else resolve_matrices(matrices)
    wanted = resolve_layers(model, layers)
    marked = _subject(model, prompt, subject, prepend_bos, start)
    judged = next((m for m in ("W_out", "W_O") if m in matrices), None)
    wants_trust = trust is not None and trust is not False
    if wants_trust and judged is None:
        raise ValueError(
            f"trust is measured of delta's words, and {', '.join(matrices)} are not read through"
            f" delta; read W_out or W_O as well"
        )
    neurons = whole_number(neurons, "neurons") if neurons else 0
    fed = [m for m in matrices if m in neurons_.WITH_NEURONS]
    if neurons and not fed:
        raise ValueError(f"{', '.join(matrices)} have no neurons; read W_in, W_gate or W_out")
    if readings != ("effect",):
        head_of(model)  # refused before the work, where there is none
    if "transported" in readings:
        check_jacobian(model, jacobian, matrices, wanted)
    taking = Taking() if attention else None
    grads, every = captured(
        model, prompt, target, matrices, None if layers is None else wanted,
        prepend_bos=prepend_bos, replay=wants_trust or "effect" in readings,
        attention=taking and taking.expect,
    )  # fmt: skip
    maps = taking and taking.taken(model, grads.batch)
    ids = grads.batch.tokens[0].tolist()
    probabilities = torch.softmax(grads.next_logits[0].float(), -1)
    answer_id = int(probabilities.argmax())
    target_ids = grads.batch.targets[0] if grads.batch.targets else ()
    follow_ids = tuple(dict.fromkeys(first_token(model, word) for word in follow))
    followed = [*target_ids, answer_id, *follow_ids]
    last = int(grads.batch.last[0])
    chosen = resolve_positions(positions, len(ids), marked, last)
    named = None if isinstance(trust, bool) else trust
    judged_at = resolve_positions(named, len(ids), marked, last, "trust") or ()
    objective = as_objective(target)
    task = Reading(
        model, grads, objective, matrices, wanted, chosen, top_k, followed,
        imprint=imprint, temper=temper, bias=bias, jacobian=jacobian, every=every,
    )  # fmt: skip
    if "effect" in readings:
        task = task.affordable(marked)
    readouts = {name: task.by(name) for name in readings}
    known = {}
    if wants_trust and judged is not None:
        known = measure_trust(
            model, grads, objective, judged, wanted, judged_at or (task.positions or (last,))[-1:],
            readings=readings, temper=temper, bias=bias, jacobian=jacobian, every=every,
        )  # fmt: skip
    moved = neurons_.moved_anywhere(grads, fed if neurons else (), wanted, task.positions, neurons)
    of_neurons = neurons_.read_neurons(model, moved, bias)
    read = chain.from_iterable(each.values() for each in readouts.values())
    words = _vocabulary(model, read, [*ids, *followed, *of_neurons.values()])
    return BackwardLens(
        prompt=prompt if isinstance(prompt, str) else "".join(words[i] for i in ids),
        tokens=tuple(words[i] for i in ids),
        token_ids=tuple(ids),
        n_prompt=int(grads.batch.prompt_lengths[0]),
        subject=marked,
        target="".join(words[i] for i in target_ids),
        target_ids=target_ids,
        answer=words[answer_id],
        answer_probability=float(probabilities[answer_id]),
        target_probability=float(probabilities[target_ids[0]]) if target_ids else None,
        loss=float(grads.losses[0]),
        layers=tuple(wanted),
        matrices=tuple(matrices),
        gradients=grads,
        settings={
            "model": model_label(model),
            "model_class": type(model).__name__,
            "objective": repr(objective)
            if hasattr(objective, "target")
            else getattr(objective, "__name__", type(objective).__name__),
            "top_k": top_k,
            "prepend_bos": prepend_bos,
            "reading": ", ".join(readings),
            **{
                name: value
                for name, value, usual in (
                    ("imprint", imprint, "plain"),
                    ("temper", temper, 0),
                    ("bias", bias, True),
                    ("attention", attention, False),
                )
                if value != usual
            },
            **{name: version(name) for name in ("bwlens", "transformer_lens", "torch")},
        },
        _readings=readouts,
        _words=words,
        loss_is=_loss_is(objective, len(target_ids)),
        n_layers=len(model.blocks),
        reading=readings[0],
        positions=task.positions,
        _trust=known,
        follow_ids=follow_ids,
        _neurons=of_neurons,
        _attention=maps,
    )


def _loss_is(objective: Any, n_tokens: int) -> str:
    """What the loss is of, where it is not simply one token's."""
    if not isinstance(objective, NLL) or n_tokens < 2:
        return "loss"
    kind = "mean" if objective.reduction == "mean" else "summed"
    return f"{kind} loss of the target's {n_tokens} tokens"


def _vocabulary(model: Any, readouts: Iterable[Readout], more: list[int]) -> dict[int, str]:
    """What each token that occurs anywhere in the lens says."""
    seen = [torch.tensor(more)]
    for read in readouts:
        seen += [read.top_ids.flatten().cpu(), read.bottom_ids.flatten().cpu()]
    ids = [i for i in torch.cat(seen).unique().tolist() if i >= 0]
    return dict(zip(ids, token_texts(model.tokenizer, ids), strict=True))


def _subject(
    model: Any, prompt: Any, subject: str | None, prepend_bos: bool | None, start: int | None
) -> tuple[int, ...]:
    if subject is None:
        return ()
    if not isinstance(prompt, str):
        raise ValueError("a subject is found in a prompt given as text, not in tokens")
    return subject_positions(model, prompt, subject, prepend_bos, start)
