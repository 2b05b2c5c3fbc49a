"""The README's numbers, and those of notebooks' first tables, are the committed results'; its code
runs."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from steerkit.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


GENERATOR = runpy.run_path(str(ROOT / "docs" / "readme.py"))
claim = GENERATOR["claim"]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_relative_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_numbers_are_those_of_the_results() -> None:
    assert GENERATOR["render"](README) == README, "run `make readme`"


def test_other_results_make_another_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row shows a number of its own results."""
    render, scope = GENERATOR["render"], GENERATOR["render"].__globals__
    read, seen = scope["read"], []

    def other(path: str | Path) -> dict:
        seen.append(str(path).removeprefix(f"{ROOT}/"))
        return changed(read(path))

    monkeypatch.setitem(scope, "read", other)
    before, after = numbers(README), numbers(render(README))
    assert len(before) == len(after) > 2 * len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert not set(before) & set(after)
    assert {path.split("/")[0] for path in seen} == {"figures", "benchmarks"}


def numbers(text: str) -> list[tuple[str, str]]:
    """(row, cell) of all that is measured in the two tables."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    notebooks = [(row[0], cell) for row in rows if row[0].startswith("| [0") for cell in row[3:5]]
    return notebooks + [(row[1], row[2]) for row in rows if row[0].startswith("| attention_map")]


def changed(value: object) -> object:
    """Numbers one larger, claims turned round."""
    if isinstance(value, dict):
        return {key: "other" if key == "shown" else changed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [changed(part) for part in value]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else value


def test_the_ten_lines_run_on_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple
) -> None:
    """The code block as it stands, on a book of 2,000 words."""
    (code,) = re.findall(r"## Your own model.*?```python\n(.+?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 11  # the import, and ten
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Ada is a baker. She lives in Oslo. " * 300)
    scope: dict = {}
    exec(code, scope)
    ids, losses, out = (scope[name] for name in ("ids", "losses", "out"))
    assert losses.shape == (1, ids.shape[1] - 1) and ids.shape[1] > 1024
    assert torch.equal(out[:, :100], ids[:, :100]) and out.shape[1] <= 300
    assert tiny[1].decode(scope["inputs"].input_ids[0][slice(*scope["span"])]).strip() == (
        "Ada is a doctor"
    )
    assert scope["model"].config._attn_implementation == "sdpa"


def first_table(notebook: str) -> str:
    """The cell with a notebook's claim."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return "".join(cells[0]["source"])


def test_the_first_table_of_notebook_01_is_the_measured_one() -> None:
    base, gatt = (
        claim("01_gatt_training", f"table30_{arm}")["ours"] for arm in ("baseline", "gatt")
    )
    cells = " | ".join(f"{base[turn]:.0f} / {gatt[turn]:.0f}" for turn in ("2", "4", "6", "20"))
    assert f"three seeds | {cells} |" in first_table("01_gatt_training")


def test_the_first_table_of_notebook_02_is_the_measured_one() -> None:
    for text in ("forgetting", "following"):
        found = claim("02_attention_heatmaps", f"late_turns_{text}")
        low, high = found["interval"]
        table = first_table("02_attention_heatmaps")
        assert f"{text} text | {found['ours']['base']:.2f} (" in table
        assert f"| {found['ours']['GAtt']:.2f} ({low:.2f} to {high:.2f}) |" in table


def test_the_first_table_of_notebook_03_is_the_measured_one() -> None:
    tasks = [
        claim("03_pasta_head_search", t)["ours"]
        for t in ("json", "pronouns", "biasbios", "counterfact")
    ]
    table = first_table("03_pasta_head_search")
    best = " | ".join(f"{100 * (t['task-specific'] - t['gain']):.0f}" for t in tasks)
    steered = " | ".join(f"{100 * t['task-specific']:.0f}" for t in tasks)
    assert f"three seeds) | {best} |" in table and f"embedded model | {steered} |" in table
