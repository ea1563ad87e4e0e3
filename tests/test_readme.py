"""The README's Python runs as it stands, in its order; only what it leaves open is filled in."""

import ast
import re
from pathlib import Path

import bwlens

README = Path(bwlens.__file__).parents[1] / "README.md"


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    prompts = ["Obama grew up in", "Lionel Messi plays for"]
    names = {"prompt": prompts[0], "target": " Paris"}
    names |= {"prompts": prompts, "objective": [" Paris", " Rome"]}
    for block in blocks:
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            try:
                exec(code, names)
            except Exception as error:
                raise AssertionError(f"README says {code!r}: {error!r}") from error
            names["other"] = names.get("lens")
            if "edits" in names:
                names["edits"] = names["edits"][:8]  # all 680 take a minute
    for name in ("messi.html", "lens.html", "page.html", "messi.safetensors", "edited"):
        assert (tmp_path / name).exists(), name
