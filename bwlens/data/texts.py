"""Plain text to measure on: documents out of a file or a data set."""

from __future__ import annotations

import json
from pathlib import Path


def read_texts(source: str) -> list[str]:
    """Documents from a JSON list of strings, a text file (two blank lines between), or the hub.

    Args:
        source: a path that ends in `.json` or `.txt`, or the name of a Hugging Face data set
            with a `text` column, whose first 1,000 training documents are taken.

    Raises:
        ValueError: the file's content is not what its name says.
    """
    path = Path(source)
    if path.suffix == ".json":
        documents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
            raise ValueError(f"{source} should hold a JSON list of strings, one a document")
    elif path.suffix == ".txt":
        documents = path.read_text(encoding="utf-8").split("\n\n\n")
    else:
        from datasets import load_dataset

        documents = load_dataset(source, split="train[:1000]")["text"]
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents
