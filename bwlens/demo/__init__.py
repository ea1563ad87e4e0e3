"""A small model that knows its facts, and the facts it knows.

`MODEL_DIR` is a GPT-2 in miniature (a Hugging Face folder, loaded offline), trained on the
triples that `facts()` returns. `records()` gives the split that its evaluation uses, in the record
format of CounterFact, and `EXAMPLES` the edits of the Backward Lens paper that the model can show.
Importing this room reads no weights and needs neither torch nor transformers.

    >>> from bwlens import demo
    >>> demo.EXAMPLES[0].prompt, demo.EXAMPLES[0].target_new
    ('Lionel Messi plays for', ' Paris')
"""

from bwlens.demo.triples import (
    BACKPACK_DIR,
    EXAMPLES,
    MODEL_DIR,
    ROOM,
    Example,
    Fact,
    facts,
    records,
)

__all__ = ["BACKPACK_DIR", "EXAMPLES", "MODEL_DIR", "ROOM", "Example", "Fact", "facts", "records"]
