"""Records whose fact the model knows: on others an edit has nothing to overcome or to spare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bwlens.data.given import as_records
from bwlens.data.records import Problem, Record, Records
from bwlens.evaluation.questions import (
    BATCH_TOKENS,
    Asked,
    Questions,
    Row,
    answers_of,
    questions_of,
)
from bwlens.model.passes import in_eval_mode
from bwlens.model.sites import check_model
from bwlens.model.targets import unwarned
from bwlens.runs.parts import progress_bar

_AT_ONCE = 200  # Records whose questions are held together.


@unwarned()
def known_records(
    model: Any,
    records: Any,
    *,
    limit: int | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Records:
    """The records whose true answer the model finds more probable than the new one.

    `NLL(target_true) < NLL(target_new)`, per token, after the edit's own prompt: the records that
    have ES 0 before an edit. Of a fact that the model does not know, ES may be 100 without an edit,
    and NS asks to keep answers that were never given: there both mean little.

    Args:
        model: A TransformerBridge or HookedTransformer.
        records: As for `evaluate`.
        limit: Ask no further when so many are known; None asks all.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.
        batch_tokens: Tokens of a forward pass, padding included.
        progress: Show a bar.

    Returns:
        The known records in their order; `problems` say which could not be asked, and why.

    Raises:
        ValueError: No record, or none that can be asked.
        FloatingPointError: The model's logits are not finite.

    Example:
        >>> known = known_records(model, bwlens.read_records("counterfact.json"))  # doctest: +SKIP
        >>> bwlens.evaluate(model, ["none", "rome"], known)                        # doctest: +SKIP
    """
    check_model(model)
    listed = as_records(records)
    known: list[Record] = []
    problems: list[Problem] = []
    with progress_bar("Asking", len(listed), shown=progress) as advance:
        for start in range(0, len(listed), _AT_ONCE):
            asked: list[tuple[Record, Questions]] = []
            for index, record in enumerate(listed[start : start + _AT_ONCE], start):
                try:
                    asked.append((record, _question(model, record, prepend_bos)))
                except ValueError as error:
                    problems.append(Problem(index, "edit", str(error)))
            if asked:
                knows = _knows(model, [questions for _, questions in asked], batch_tokens)
                known += [record for (record, _), yes in zip(asked, knows, strict=True) if yes]
            advance(min(_AT_ONCE, len(listed) - start))
            if limit is not None and len(known) >= limit:
                known = known[:limit]
                break
    if len(problems) == len(listed):
        raise ValueError(f"none of the records can be asked: {'; '.join(map(str, problems[:3]))}")
    source = listed if isinstance(listed, Records) else Records(())
    return replace(source, records=tuple(known), problems=(*source.problems, *problems))


def _question(model: Any, record: Record, prepend_bos: bool | None) -> Questions:
    """The edit's own prompt with both answers.

    Raises:
        ValueError: The true answer is not given, or the prompt cannot be tokenised.
    """
    if record.edit.target_true is None:
        raise ValueError("target_true is missing, so that nobody can tell whether it is known")
    return questions_of(model, Record(record.case_id, record.edit), prepend_bos)


def _knows(model: Any, each: list[Questions], batch_tokens: int) -> list[bool]:
    """Whether the true answer is the more probable one, of several questions in few passes."""
    rows: list[Row] = []
    new: list[Asked] = []
    true: list[Asked] = []
    for one in each:
        for side, answers in ((new, one.new), (true, one.true)):
            side += [replace(asked, row=asked.row + len(rows)) for asked in answers["rewrite"]]
        rows += one.rows
    together = Questions(tuple(rows), {}, {"edit": tuple(new)}, {"edit": tuple(true)})
    with in_eval_mode(model), torch.no_grad():
        answers = answers_of(model, together, batch_tokens)["edit"]
    return (answers.nll_true < answers.nll_new).tolist()
