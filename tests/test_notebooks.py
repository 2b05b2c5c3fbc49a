"""Each committed notebook runs in the smoke profile and leaves what it promises on disk."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from steerkit.files import ROOT
from steerkit.lab import runner
from steerkit.lab.exercises import exercises

EXPECTED = (
    "00_start_here", "01_gatt_training", "02_attention_heatmaps", "03_pasta_head_search",
    "04_streaming_llm", "05_sink_from_scratch",
)  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE_SECONDS = 60
SHARED_MACHINE = 3  # a test machine runs other things too

CLAIM_KEYS = {
    "claim", "paper", "ours", "n", "interval", "seeds", "profile", "model", "versions", "holds",
}  # fmt: skip


class Run(NamedTuple):
    outcome: runner.Outcome
    figures: Path  # of this notebook


def rehearsal(path: Path, folder: Path) -> Path:
    """A copy of the notebook in which a student's unsolved cells follow at the end."""
    notebook = nbformat.read(path, as_version=4)
    for one in exercises(notebook):
        cell = nbformat.v4.new_code_cell(one.stub, metadata={"tags": ["stub"]})
        notebook.cells.append(cell)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One smoke run of one notebook, and of its stubs, figures in a folder of its own."""
    source, tmp = request.param, tmp_path_factory.mktemp(request.param.stem)
    path = rehearsal(source, tmp)
    values = runner.overrides(path, profile="smoke")
    places = {"out": tmp / "runs", "figures": tmp / "figures", "cwd": source.parent}
    places["out"].mkdir()
    outcome = runner.execute(path, values, profile="smoke", timeout=300, progress=False, **places)
    return Run(outcome, tmp / "figures" / "smoke" / path.stem)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_kit_has_its_notebooks(name: str) -> None:
    assert name in [path.stem for path in NOTEBOOKS]


def test_the_first_notebook_leads_to_all_others() -> None:
    text = "".join(c.source for c in nbformat.read(NOTEBOOKS[0], as_version=4).cells)
    path = text[text.index("a reading path") :]
    others = [name.stem for name in NOTEBOOKS[1:]]
    assert [name for name in others if f"`{name}`" not in path] == []
    assert set(re.findall(r"`(\d\d_\w+)`", path)) == set(others)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_gpu_profile_takes_a_model_and_has_its_own_sizes(path: Path) -> None:
    values = runner.overrides(path, profile="gpu", model="org/name")
    assert values["PROFILE"] == "gpu" and values.get("MODEL", "org/name") == "org/name"
    sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    tables = [
        {key.value for key in node.keys if isinstance(key, ast.Constant)}
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Dict)
    ]
    by_profile = [keys for keys in tables if keys & {"smoke", "cpu"}]
    assert by_profile and all(keys == {"smoke", "cpu", "gpu"} for keys in by_profile)


def test_it_runs_to_the_end_in_time(run: Run) -> None:
    assert run.outcome.error is None, run.outcome.error
    assert run.outcome.seconds <= SHARED_MACHINE * SMOKE_SECONDS, f"{run.outcome.seconds} s"


def test_it_leaves_claims_of_the_agreed_form(run: Run) -> None:
    claims = sorted(run.figures.glob("*.claim.json"))
    assert claims or run.outcome.notebook == "00_start_here", (
        "no claim: use figures_dir, save_claim"
    )
    for path in claims:
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row.keys() == CLAIM_KEYS, path.name
        assert row["profile"] == "smoke" and row["holds"] in (True, False) and row["ours"]
        assert row["paper"] is None or re.search(r"arXiv \d{4}\.\d{5}", row["paper"]["paper"])


def test_it_leaves_figures_with_values_and_words(run: Run) -> None:
    pictures = sorted(run.figures.glob("*.png"))
    assert pictures, "no figure: use figures_dir and plots.show"
    for picture in pictures:
        sidecar = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        assert sidecar["caption"].strip() and sidecar["alt"].strip() and sidecar["values"]


def test_it_shows_each_figure_it_saves_and_no_error(run: Run) -> None:
    cells = nbformat.read(run.outcome.executed, as_version=4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    assert all(o.output_type != "error" for o in outputs)
    pages = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    shown = sum(page.count('<img alt="') for page in pages)
    assert shown == len(list(run.figures.glob("*.png")))


def test_its_answers_are_right_and_an_unsolved_stub_says_not_done_yet(run: Run) -> None:
    cells = nbformat.read(run.outcome.executed, as_version=4).cells
    for tag, state in (("exercise", "right"), ("stub", "not done yet")):
        tagged = [c for c in cells if tag in c.metadata.get("tags", [])]
        shown = [c.outputs[-1].get("data", {}).get("text/plain") for c in tagged]
        assert shown == [f"Exercise {n}: {state}." for n in (1, 2, 3)]


def test_it_records_its_time_and_machine(run: Run) -> None:
    record = json.loads((run.figures / "run.json").read_text(encoding="utf-8"))
    assert record["seconds"] > 0 and record["machine"]["cores"] >= 1
