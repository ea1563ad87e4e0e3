"""A conversation as the tokens that a chat model was trained on."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportUnnecessaryComparison=false, reportUnnecessaryIsInstance=false
# (What torch's types rule out does come, and what users give is checked.)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bwlens.model.protocol import LensModel


def chat(
    model: LensModel,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> Int[Tensor, " pos"]:
    """Token ids of a conversation, by the tokenizer's own chat template.

    `backward_lens`, `capture` and the rest take them as they are. What comes next is the model's
    reply, whose first word has no blank before it. To ask for one word of it, give the reply's
    beginning as the assistant's message, with `add_generation_prompt=False,
    continue_final_message=True`.

    Args:
        model: A TransformerBridge or HookedTransformer whose tokenizer has a chat template.
        messages: `{"role": "user", "content": "..."}` and the like, or the user's text alone.
        add_generation_prompt: Whether to end with the beginning of a reply.
        **options: Passed on to `tokenizer.apply_chat_template`, such as `tools`.

    Raises:
        ValueError: The tokenizer has no chat template, or the template does not take this.

    Example:
        >>> asked = {"role": "user", "content": "What is the capital of France?"}
        >>> begun = {"role": "assistant", "content": "The capital of France is"}
        >>> prompt = chat(  # doctest: +SKIP
        ...     model, [asked, begun], add_generation_prompt=False, continue_final_message=True
        ... )
        >>> lens = backward_lens(model, prompt, " Rome")  # doctest: +SKIP
    """
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the model's tokenizer has no chat template, so it was not made for conversations;"
            " pass plain text as a prompt instead"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = list(messages)
    bad = [m for m in messages if not (isinstance(m, Mapping) and {"role", "content"} <= set(m))]
    if not messages or bad:
        raise ValueError(
            f"expected messages such as {{'role': 'user', 'content': 'Hello'}}, found"
            f" {bad[0] if bad else messages!r}"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **options
        )
    except TemplateError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    # The template writes every special token itself.
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
