"""The README's table and picture are the committed results', and its code runs."""

import json
import re
import runpy
import shutil
from pathlib import Path

import torch

from steerkit.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATOR = runpy.run_path(str(ROOT / "docs" / "readme.py"))


def test_the_page_is_short_and_its_table_is_that_of_the_results():
    assert len(README.splitlines()) <= 120
    assert GENERATOR["render"](README) == README, "run `make readme`"
    teaching = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    assert GENERATOR["render"](teaching) == teaching, "run `make readme`"


def test_the_committed_picture_is_drawn_from_the_committed_results(tmp_path):
    draw = GENERATOR["draw"]
    figures = Path(shutil.copytree(ROOT / "figures" / "cpu", tmp_path / "cpu"))
    old = json.loads((figures / "overview.json").read_text())
    draw(figures)
    assert json.loads((figures / "overview.json").read_text()) == old, "run `make readme`"
    assert (figures / "overview.png").read_bytes().startswith(b"\x89PNG") and old["alt"]


def test_the_ten_lines_run_on_the_embedded_model(tmp_path, monkeypatch, tiny):
    """The code block as it stands, on a book of 2,000 words."""
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 11  # the import, and ten
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Ada is a baker. She lives in Oslo. " * 300)
    scope: dict = {}
    exec(code, scope)
    ids, losses, out = (scope[name] for name in ("ids", "losses", "out"))
    assert losses.shape == (1, ids.shape[1] - 1) and ids.shape[1] > 1024
    assert torch.equal(out[:, :100], ids[:, :100]) and out.shape[1] <= 300
    span = slice(*scope["span"])
    assert tiny[1].decode(scope["inputs"].input_ids[0][span]).strip() == "Ada is a doctor"
    assert scope["model"].config._attn_implementation == "sdpa"
