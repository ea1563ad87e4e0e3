"""The demo model's tokenizer: byte-level BPE in which every answer is one token.

BPE merges what is frequent, so each answer is put into the training text often enough for its
merges to come first; whether that was enough is checked, never assumed.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from bwlens.demo.triples import Fact

END = "<|endoftext|>"

_ANSWER_REPEATS = 400
_SENTENCES_PER_FACT = 4


def train_tokenizer(
    prose: Iterable[str], facts: Iterable[Fact], vocab_size: int, context: int
) -> GPT2Tokenizer:
    """Fit the vocabulary to the prose, to a few sentences of every fact and to the answers.

    Raises:
        ValueError: `vocab_size` is too small for every answer to be a single token.
    """
    facts = list(facts)
    answers = sorted({fact.answer for fact in facts})
    text = [*prose, *(p for fact in facts for p in fact.prompts()[:_SENTENCES_PER_FACT])]
    text += [answer * _ANSWER_REPEATS for answer in answers]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore
        special_tokens=[END],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    bpe.train_from_iterator(text, trainer)
    split = [answer for answer in answers if len(bpe.encode(answer).ids) != 1]
    if split:
        raise ValueError(
            f"{len(split)} answers are more than one token, {split[:5]} among them: "
            f"raise the vocabulary's size (now {vocab_size})"
        )
    fitted = json.loads(bpe.to_str())["model"]
    return GPT2Tokenizer(
        vocab=fitted["vocab"],
        merges=[tuple(pair) for pair in fitted["merges"]],  # pyright: ignore[reportArgumentType]
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=context,
    )
