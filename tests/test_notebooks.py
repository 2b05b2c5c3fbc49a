"""Each committed notebook, run once at its default profile: its artefacts lie on disk, and nbval
finds its outputs to be the stored ones. And hygiene that nbval does not see."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from conftest import PARAMETERS, write_notebook
from nbformat import NotebookNode
from nbval.plugin import IPyNbFile, coalesce_streams, get_sanitize_patterns

from steerkit.files import ROOT
from steerkit.lab import cli, runner
from steerkit.lab.exercises import TAG, student_copy

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = ROOT / "figures"
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
MARK = "# NBVAL_CHECK_OUTPUT"
PICTURE = re.compile(r'data:image/png;base64,([^"]*)')
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|private|work|workspace|mnt|opt|var)/\w[^\s\"']*"
    r"|[A-Z]:\\+Users\\+\w+)"
)
CLAIM_KEYS = {
    "claim", "paper", "ours", "n", "interval", "seeds", "profile", "model", "versions", "holds",
}  # fmt: skip


class Run(NamedTuple):
    """One execution of a committed notebook, then of its exercises unsolved, and answered by 0."""

    committed: Path
    outcome: runner.Outcome


def longest_first(profile: str, leave_out: tuple[str, ...] = ()) -> list[Any]:
    """A parameter for each notebook; what one run serves stays on one worker (see conftest.py)."""
    paths = [path for path in NOTEBOOKS if not path.stem.startswith(leave_out)]
    records = [FIGURES / profile / path.stem / "run.json" for path in paths]
    return [
        pytest.param(
            path,
            id=f"{path.stem}@{profile}{path.stem[:2]}",
            marks=pytest.mark.first(json.loads(record.read_text())["cpu_seconds"]),
        )
        for path, record in zip(paths, records, strict=True)
    ]


def execute(path: Path, folder: Path, profile: str) -> runner.Outcome:
    values = runner.overrides(path, profile)
    return runner.execute(path, values, profile, folder / "runs", cwd=folder)


@pytest.fixture(scope="module", params=longest_first("cpu"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param.stem)
    notebook = read(request.param)
    for cell in tagged(student_copy(notebook), TAG):
        zero = re.sub(r"\.\.\.(?=  # your code)", "0", cell.source)
        zero = f"try:\n    exec({zero!r})\nexcept Exception:\n    print('refused')"
        for source, tag in ((cell.source, "stub"), (zero, "zero")):
            new = nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})
            notebook.cells.append(new)
    nbformat.write(notebook, folder / request.param.name)
    return Run(request.param, execute(folder / request.param.name, folder, "cpu"))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def differences(committed, executed, session):
    """What `pytest --nbval-lax` says of marked cells, when the kernel's outputs are these."""
    judge = IPyNbFile.from_parent(session, path=committed)
    judge.compare_outputs = False  # only marked cells: --nbval-lax
    judge.sanitize_patterns.update(get_sanitize_patterns(SANITIZE.read_text()))
    new = [cell.outputs for cell in executed if cell.cell_type == "code"]
    return [
        "\n".join([cell.cell.source, *cell.comparison_traceback])
        for cell, outputs in zip(judge.collect(), new, strict=False)
        if cell.options["check"]
        and not cell.compare_outputs(coalesce_streams(outputs), coalesce_streams(cell.cell.outputs))
    ]


def test_it_runs_to_the_end(run):
    assert run.outcome.error is None, run.outcome.error
    record = json.loads((run.outcome.results / "run.json").read_text())
    assert record["cpu_seconds"] > 0


def test_its_outputs_are_the_stored_ones(run, request):
    executed = nbformat.reads(runner.stripped(read(run.outcome.executed)), as_version=4)
    assert differences(run.committed, executed.cells, request.session) == []


def test_it_leaves_the_committed_claims_in_the_agreed_form(run):
    names = {path.name for path in run.outcome.results.glob("*.claim.json")}
    assert names == {p.name for p in (FIGURES / "cpu" / run.committed.stem).glob("*.claim.json")}
    for name in sorted(names):
        row = json.loads((run.outcome.results / name).read_text(encoding="utf-8"))
        assert row.keys() == CLAIM_KEYS, name
        assert row["profile"] == "cpu" and row["holds"] in (True, False) and row["ours"]
        assert row["paper"] is None or re.search(r"arXiv \d{4}\.\d{5}", row["paper"]["paper"])


def test_it_shows_each_figure_it_saves_with_values_and_words(run):
    pictures = sorted(run.outcome.results.glob("*.png"))
    for picture in pictures:
        sidecar = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        assert sidecar["caption"].strip() and sidecar["alt"].strip() and sidecar["values"]
    shown = shown_pictures(code_cells(run.outcome.executed))
    assert pictures and [p.name for p in pictures if p.read_bytes() not in shown] == []


def test_its_answers_are_right_and_an_unsolved_stub_says_not_done_yet(run):
    notebook = read(run.outcome.executed)
    for tag, state in ((TAG, "right"), ("stub", "not done yet")):
        shown = [cell.outputs[-1].data["text/plain"] for cell in tagged(notebook, tag)]
        assert shown == [f"Exercise {n}: {state}." for n in range(1, len(shown) + 1)]
        assert len(shown) >= 3
    for cell in tagged(notebook, "zero"):  # a progress bar may end with an empty line
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert said.rstrip().endswith("refused"), cell.source


@pytest.mark.parametrize("path", longest_first("smoke", leave_out=("00", "01", "02")))
def test_it_runs_at_small_size(path, tmp_path):
    """Where no other test does it: 00 runs from the wheel, 01 on a directory, 02 in the browser."""
    outcome = execute(path, tmp_path, "smoke")
    assert outcome.error is None, outcome.error
    claims = [json.loads(p.read_text()) for p in outcome.results.glob("*.claim.json")]
    assert claims and all(claim["profile"] == "smoke" for claim in claims)


BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@BY_NAME
def test_the_gpu_profile_takes_a_model_and_has_its_own_sizes(path):
    values = runner.overrides(path, "gpu", "org/name")
    assert values["PROFILE"] == "gpu" and values.get("MODEL", "org/name") == "org/name"
    tables = [
        {key.value for key in node.keys if isinstance(key, ast.Constant)}
        for cell in code_cells(path)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Dict)
    ]
    by_profile = [keys for keys in tables if keys & {"smoke", "cpu"}]
    assert by_profile and all(keys == {"smoke", "cpu", "gpu"} for keys in by_profile)


@BY_NAME
def test_committed_notebook_is_clean(path):
    assert problems(path, FIGURES / "cpu" / path.stem) == []


def problems(path: Path, figures: Path) -> list[str]:
    """What is wrong with a committed notebook; `figures` is figures/<default profile>/<name>."""
    notebook, code = read(path), code_cells(path)
    found = [line for cell in code for line in cell_problems(cell)]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from top to bottom in one go")
    if path.stat().st_size >= 2_000_000:
        found.append(f"{path.stat().st_size} bytes: expected less than 2 MB")
    if notebook.metadata.keys() != {"kernelspec", "language_info"}:
        found.append("metadata: store it with steerkit run --store")
    found += [f"machine path {m}" for m in MACHINE_PATH.findall(PICTURE.sub("", text_of(path)))]
    if not any(MARK in cell.source for cell in code):
        found.append(f"no cell is marked {MARK}")
    shown = shown_pictures(code)  # and those of sliders, which are not saved
    if missing := [p.name for p in figures.glob("*.png") if p.read_bytes() not in shown]:
        found.append(f"does not show {missing} of figures/cpu: store it again")
    return found + list(parameter_problems(path, notebook))


def cell_problems(cell: NotebookNode) -> Iterator[str]:
    name = f"cell {cell.source[:30]!r}"
    for node in ast.walk(ast.parse(cell.source)):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        first = node.body[1 if ast.get_docstring(node) and node.body[1:] else 0]
        if node.end_lineno - first.lineno > 13:
            yield f"{name}: what is longer than 15 lines belongs in the package"
    if MARK in cell.source.splitlines() and not cell.outputs:
        yield f"{name}: marked for nbval but has no output"
    for output in cell.outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"{name}: an error, or output on stderr"
        if {"image/png", "image/jpeg"} & output.get("data", {}).keys():
            yield f"{name}: a picture without words: use plots.show"
    for page in pages(cell):
        for figure in re.findall(r"<img[^>]*>(?:<figcaption>\s*[^<\s])?", page):
            if not re.search(r'alt="\s*[^"\s]', figure) or "<figcaption>" not in figure:
                yield f"{name}: a figure without caption or alt text"


def parameter_problems(path: Path, notebook: NotebookNode) -> Iterator[str]:
    cells = tagged(notebook, "parameters")
    lines = [line for cell in cells for line in cell.source.splitlines()]
    if len(cells) != 1 or not all(re.match(r"\w+: \w+ = [^#]+  # \S", line) for line in lines):
        yield "expected 1 parameters cell of one `name: type = literal  # help` per line"
    elif runner.parameters(path).get("PROFILE") != "cpu":
        yield "parameters cell: the default PROFILE is not cpu"
    if tagged(notebook, "injected-parameters"):
        yield "outputs of injected parameters, not of the defaults"


def pages(cell: NotebookNode) -> list[str]:
    return [o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})]


def shown_pictures(code: list[NotebookNode]) -> set[bytes]:
    """The PNG files in the HTML of these cells."""
    html = "".join(page for cell in code for page in pages(cell))
    return {base64.b64decode(text) for text in PICTURE.findall(html)}


def text_of(path: Path) -> str:
    """The file's text with JSON's escapes of quotes and line ends undone."""
    return path.read_text(encoding="utf-8").replace('\\"', '"').replace("\\n", "\n")


# The checks themselves, on a small notebook that is clean until a test spoils it.

FIGURE = """import matplotlib.pyplot as plt
from steerkit.viz.plots import show
from steerkit.results import figures_dir
fig, ax = plt.subplots(figsize=(1, 1))
show(fig, "a", out=figures_dir(PROFILE, "01"), caption="No line.", alt="Empty axes.", values={})"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit with one notebook whose outputs `steerkit run --store` has stored."""
    root = tmp_path_factory.mktemp("kit")
    write_notebook(
        root, "01", [FIGURE, f"{MARK}\nprint(N + 1, 'of 0x7f12ab34cd in 12.3 s; torch 2.13.0')"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["run", "--store"]) == 0
    return root


@pytest.fixture
def stored(kit: Path, tmp_path: Path) -> Path:
    """A copy of that notebook, to be spoiled."""
    return Path(shutil.copy(kit / "notebooks" / "01.ipynb", tmp_path))


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    notebook = read(path)
    change(notebook)
    nbformat.write(notebook, path)


def show(cell: int, **output: Any) -> Callable[[Any], Any]:
    """Add an output to a cell."""
    kind = output.pop("kind", "stream")
    return lambda n: n.cells[cell].outputs.append(nbformat.v4.new_output(kind, **output))


def edit(cell: int, **changes: Any) -> Callable[[Any], Any]:
    return lambda n: n.cells[cell].update(**changes)


def unsay(words: str) -> Callable[[Any], Any]:
    """Take a figure's caption or alt text away."""

    def change(notebook: Any) -> None:
        data = notebook.cells[1].outputs[0].data
        data["text/html"] = data["text/html"].replace(words, " ")

    return change


SPOILS: list[tuple[Callable[[Any], Any], str]] = [
    (edit(1, execution_count=7), "not run from top to bottom"),
    (lambda n: n.metadata.update(papermill={}), "metadata: store it"),
    (show(2, name="stdout", text="in /home/me/x.txt"), "machine path"),
    (show(2, name="stderr", text="careful"), "an error, or output on stderr"),
    (edit(2, outputs=[]), "marked for nbval but has no output"),
    (edit(2, source="print(3)"), "no cell is marked"),
    (edit(2, source="def f():\n" + " x = 1\n" * 15), "longer than 15 lines"),
    (show(2, kind="display_data", data={"image/png": "AAAA"}), "a picture without words"),
    (unsay("Empty axes."), "without caption or alt"),
    (lambda n: n.cells[1].metadata.update(tags=["parameters"]), "expected 1 parameters cell"),
    (edit(0, source="PROFILE = 'cpu'"), "expected 1 parameters cell"),
    (edit(0, source=PARAMETERS.replace("cpu", "smoke", 1)), "is not cpu"),
    (lambda n: n.cells[1].metadata.update(tags=["injected-parameters"]), "injected parameters"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    SPOILS,
    ids=[f"{i}-{message}@hygiene" for i, (_, message) in enumerate(SPOILS)],
)
def test_hygiene_names_what_is_wrong(stored, kit, change, message):
    figures = kit / "figures" / "cpu" / "01"
    assert problems(stored, figures) == []
    spoil(stored, change)
    assert any(message in line for line in problems(stored, figures))


def test_nbval_accepts_the_stored_output_and_rejects_another(stored, request, monkeypatch):
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", str(SANITIZE)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *options, stored.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stored.parent)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    cells = read(stored).cells
    cells[2].outputs[0].text = "3 of 0x1234abcd in 4 ms; torch 9.0.1+cpu\n"
    assert differences(stored, cells, request.session) == []
    cells[2].outputs[0].text = "4 of 0x1234abcd in 4 ms; torch 9.0.1+cpu\n"
    assert "4 of ADDRESS" in differences(stored, cells, request.session)[0]
    assert os.listdir(stored.parent / "runs") == ["cpu"]  # by hand, too, figures go to runs/
