"""Numbers typed in the README and in notebooks' first tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from steerkit.results import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = ROOT / "figures" / "cpu"


def claim(notebook: str, name: str) -> dict:
    return json.loads((FIGURES / notebook / f"{name}.claim.json").read_text())


def row(notebook: str) -> str:
    """The README's table row of one notebook."""
    return next(line for line in README.splitlines() if line.startswith(f"| [{notebook}]"))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_relative_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("notebook", sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb")))
def test_every_notebook_has_a_row_with_its_measured_time(notebook: str) -> None:
    seconds = json.loads((FIGURES / notebook / "run.json").read_text())["seconds"]
    assert f"| {round(seconds)} s |" in row(notebook)


def test_forgetting_is_the_measured_one() -> None:
    ours = claim("00_start_here", "forgetting")["ours"]
    assert f"replies 1 / 3: {ours['reply 1']:.0%} / {ours['reply 3']:.0%}" in row("00_start_here")


def test_the_learnable_sink_is_the_measured_one() -> None:
    ours = claim("05_sink_from_scratch", "table3_learnable_sink")["ours"]
    assert f"0+64 / 1+63: {ours['0+64']:.0f} / {ours['1+63']:.1f}" in row("05_sink_from_scratch")


def test_streaming_losses_are_the_measured_ones() -> None:
    for stream in ("English", "market"):
        for setting in ("dense", "window", "re-computation"):
            (nats,) = claim("04_streaming_llm", f"{stream}_{setting}")["ours"].values()
            assert f"{setting} {nats:+.2f}" in row("04_streaming_llm")


def test_gatt_is_the_measured_one() -> None:
    texts = {"table30_baseline": "base", "table30_gatt": "GAtt", "lasts_seen": "seen values"}
    for name, text in (texts | {"lasts_held_out": "held-out values"}).items():
        ours = claim("01_gatt_training", name)["ours"]
        factor = 100 if name.startswith("lasts") else 1
        numbers = " / ".join(f"{factor * ours[turn]:.0f}" for turn in ("2", "4", "6", "20"))
        assert f"{text} {numbers}" in row("01_gatt_training")


def test_weights_on_the_instruction_are_the_measured_ones() -> None:
    for text in ("follow", "forget"):
        ours = claim("02_attention_heatmaps", f"late_turns_{text}{'t' * (text[-1] == 't')}ing")[
            "ours"
        ]
        numbers = f"{ours['base']:.2f} / {ours['GAtt']:.2f} on replies that {text}"
        assert numbers in row("02_attention_heatmaps")


def test_steered_tasks_are_the_measured_ones() -> None:
    tasks = {"JSON": "json", "Pronouns": "pronouns", "BiasBios": "biasbios"}
    for label, name in (tasks | {"CounterFact": "counterfact"}).items():
        ours = claim("03_pasta_head_search", name)["ours"]
        steered = ours["task-specific"]
        numbers = f"{label} {steered - ours['gain']:.0%} / {steered:.0%}"
        assert numbers in row("03_pasta_head_search")


def test_every_claim_that_does_not_hold_is_named() -> None:
    failed = [
        json.loads(path.read_text())["claim"]
        for path in sorted(Path(FIGURES).glob("*/*.claim.json"))
        if not json.loads(path.read_text())["holds"]
    ]
    words = " ".join(README.split())
    assert [text for text in failed if text not in words] == []


def test_the_minutes_of_all_notebooks_are_the_sum() -> None:
    files = (FIGURES / p.stem / "run.json" for p in (ROOT / "notebooks").glob("*.ipynb"))
    seconds = sum(json.loads(file.read_text())["seconds"] for file in files)
    assert f"take {seconds / 60:.0f} minutes in all" in README


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
