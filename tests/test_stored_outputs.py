"""The committed notebooks: outputs that nbval reproduces, and hygiene that nbval does not see."""

import ast
import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import PARAMETERS, write_notebook
from nbval.plugin import get_sanitize_patterns

from steerkit.files import ROOT
from steerkit.lab import cli, runner

SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARK = "# NBVAL_CHECK_OUTPUT"
PICTURE = re.compile(r'data:image/png;base64,([^"]*)')
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|private|work|workspace|mnt|opt|var)/\w[^\s\"']*"
    r"|[A-Z]:\\+Users\\+\w+)"
)
Cell = nbformat.NotebookNode


def problems(path: Path, figures: Path) -> list[str]:
    """What is wrong with a committed notebook; `figures` is figures/<default profile>/<name>."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [line for cell in code for line in cell_problems(cell)]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from top to bottom in one go")
    before = [i for i, cell in enumerate(notebook.cells) if "## Exercises" in cell.source]
    if len(notebook.cells[: before[0] if before else None]) > 40:
        found.append("more than 40 cells before the exercises")
    if path.stat().st_size >= 2_000_000:
        found.append(f"{path.stat().st_size} bytes: expected less than 2 MB")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if "papermill" in notebook.metadata:
        found.append("papermill metadata: store it with steerkit run --save")
    found += [f"machine path {m}" for m in MACHINE_PATH.findall(PICTURE.sub("", text_of(path)))]
    if not any(MARK in cell.source for cell in code):
        found.append(f"no cell is marked {MARK}")
    shown = {base64.b64decode(p) for c in code for page in pages(c) for p in PICTURE.findall(page)}
    if shown != {picture.read_bytes() for picture in figures.glob("*.png")}:
        found.append(f"pictures differ from those of the default profile in {figures.name}")
    return found + list(parameter_problems(path, code))


def cell_problems(cell: Cell) -> Iterator[str]:
    name, lines = f"cell {cell.source[:30]!r}", cell.source.splitlines()
    if len(lines) > 15:
        yield f"{name}: {len(lines)} lines, limit 15"
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.ClassDef):
            yield f"{name}: a class belongs in the package"
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 8:
            yield f"{name}: def {node.name} is longer than 8 lines"
    if MARK in lines and not cell.outputs:
        yield f"{name}: marked for nbval but has no output"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"{name}: error output"
        if output.get("name") == "stderr":
            yield f"{name}: output on stderr"
        if {"image/png", "image/jpeg"} & output.get("data", {}).keys():
            yield f"{name}: a picture without words: use plots.show"
    for page in pages(cell):
        for figure in re.findall(r"<img[^>]*>(?:<figcaption>\s*[^<\s])?", page):
            if not re.search(r'alt="\s*[^"\s]', figure) or "<figcaption>" not in figure:
                yield f"{name}: a figure without caption or alt text"


def parameter_problems(path: Path, code: list[Cell]) -> Iterator[str]:
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells tagged parameters: expected 1"
        return
    lines = tagged[0].source.splitlines()
    if not all(re.match(r"\w+: \w+ = [^#]+  # \S", line) for line in lines):
        yield "parameters cell: expected one `name: type = literal  # help` per line"
    elif len(runner.parameters(path)) != len(lines):
        yield "parameters cell: papermill cannot read all of it"
    elif runner.parameters(path).get("PROFILE") != "cpu":
        yield "parameters cell: the default PROFILE is not cpu"
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in code):
        yield "outputs of injected parameters, not of the defaults"


def pages(cell: Cell) -> list[str]:
    return [o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})]


def text_of(path: Path) -> str:
    """The file's text with JSON's escapes of quotes and line ends undone."""
    return path.read_text(encoding="utf-8").replace('\\"', '"').replace("\\n", "\n")


def nbval(path: Path, figures: Path) -> subprocess.CompletedProcess[str]:
    """As a user would run it, except that figures go to a folder of the test."""
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", str(SANITIZE)]
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", *options, str(path)]
    environment = os.environ | {"STEERKIT_FIGURES": str(figures)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_clean(path: Path) -> None:
    assert problems(path, ROOT / "figures" / "cpu" / path.stem) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_reproduced(path: Path, tmp_path: Path) -> None:
    done = nbval(path, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert f"{len(code)} passed" in done.stdout


# The checks themselves, on a small notebook that is clean until a test spoils it.

FIGURE = """import matplotlib.pyplot as plt
from steerkit.viz.plots import show
from steerkit.results import figures_dir
fig, ax = plt.subplots(figsize=(1, 1))
show(fig, "a", out=figures_dir(PROFILE, "01"), caption="No line.", alt="Empty axes.", values={})"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit with one notebook whose outputs `steerkit run --save` has stored."""
    root = tmp_path_factory.mktemp("kit")
    write_notebook(root, "01", [FIGURE, f"{MARK}\nprint(N + 1, 'of 0x7f12ab34cd')"])
    assert cli.main(["run", "--save"], root=root) == 0
    return root


@pytest.fixture
def stored(kit: Path, tmp_path: Path) -> Path:
    """A copy of that notebook, to be spoiled."""
    return Path(shutil.copy(kit / "notebooks" / "01.ipynb", tmp_path))


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def output(name: str, text: str) -> Cell:
    return nbformat.v4.new_output("stream", name=name, text=text)


SPOILS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda n: n.cells[1].update(execution_count=None), "not run from top to bottom"),
    (lambda n: n.cells[1].update(execution_count=7), "not run from top to bottom"),
    (lambda n: n.cells[2].outputs.append(output("stdout", "x" * 2_000_000)), "less than 2 MB"),
    (lambda n: n.metadata.kernelspec.update(name="mine"), "kernel is not python3"),
    (lambda n: n.metadata.update(papermill={}), "papermill metadata"),
    (lambda n: n.cells[2].outputs.append(output("stdout", "in /home/me/x.txt")), "machine path"),
    (lambda n: n.cells[2].update(source="open('/tmp/x')"), "machine path"),
    (lambda n: n.cells[2].outputs.append(output("stderr", "careful")), "output on stderr"),
    (lambda n: n.cells[2].update(outputs=[]), "marked for nbval but has no output"),
    (lambda n: n.cells[2].update(source="print(3)"), "no cell is marked"),
    (lambda n: n.cells[1].update(outputs=[]), "pictures differ"),
    (lambda n: n.cells[2].update(source="x = 1\n" * 16), "16 lines, limit 15"),
    (
        lambda n: n.cells.extend(map(nbformat.v4.new_markdown_cell, [""] * 41)),
        "more than 40 cells before the exercises",
    ),
    (lambda n: n.cells[2].update(source="class A: pass"), "a class belongs"),
    (lambda n: n.cells[2].update(source="def f():\n" + " x = 1\n" * 8), "longer than 8 lines"),
    (
        lambda n: n.cells[2].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="")),
        "error output",
    ),
    (
        lambda n: n.cells[2].outputs.append(
            nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})
        ),
        "a picture without words",
    ),
    (
        lambda n: (
            n.cells[1]
            .outputs[0]
            .data.update(
                {"text/html": n.cells[1].outputs[0].data["text/html"].replace("Empty axes.", "")}
            )
        ),
        "without caption or alt",
    ),
    (
        lambda n: (
            n.cells[1]
            .outputs[0]
            .data.update(
                {"text/html": n.cells[1].outputs[0].data["text/html"].replace("No line.", " ")}
            )
        ),
        "without caption or alt",
    ),
    (lambda n: n.cells[0].metadata.update(tags=[]), "0 cells tagged parameters"),
    (lambda n: n.cells[1].metadata.update(tags=["parameters"]), "2 cells tagged parameters"),
    (
        lambda n: n.cells[0].update(source=PARAMETERS + '\nT: str = "a=b"  # text'),
        "papermill cannot read all of it",
    ),
    (lambda n: n.cells[0].update(source="PROFILE = 'cpu'"), "expected one `name: type"),
    (lambda n: n.cells[0].update(source=PARAMETERS.replace("cpu", "smoke", 1)), "is not cpu"),
    (lambda n: n.cells[1].metadata.update(tags=["injected-parameters"]), "injected parameters"),
]


@pytest.mark.parametrize(
    ("change", "message"), SPOILS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(SPOILS)]
)
def test_hygiene_names_what_is_wrong(
    stored: Path, kit: Path, change: Callable[[Any], Any], message: str
) -> None:
    figures = kit / "figures" / "cpu" / "01"
    assert problems(stored, figures) == []
    spoil(stored, change)
    assert any(message in line for line in problems(stored, figures))


def test_nbval_accepts_the_stored_output_and_rejects_another(stored: Path, tmp_path: Path) -> None:
    assert nbval(stored, tmp_path).returncode == 0
    spoil(stored, lambda n: n.cells[2].outputs[0].update(text="4 of 0x7f12ab34cd\n"))
    done = nbval(stored, tmp_path)
    assert done.returncode == 1 and "1 failed" in done.stdout


def test_sanitize_file_has_no_rule_that_nbval_drops() -> None:
    text = SANITIZE.read_text()
    assert len(get_sanitize_patterns(text)) == len(re.findall("^regex:", text, re.MULTILINE)) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("took 12.3 s", "took DURATION"),
        ("4 ms, then 2 min", "DURATION, then DURATION"),
        ("<object at 0x7f12ab34cd56>", "<object at ADDRESS>"),
        ("torch 2.13.0+cpu", "torch VERSION"),
        ("loss 3.204 nats, 4 sinks, L3H7", "loss 3.204 nats, 4 sinks, L3H7"),
        ("5 steps in 3 layers", "5 steps in 3 layers"),
    ],
)
def test_sanitize_rules_replace_noise_and_keep_results(text: str, expected: str) -> None:
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        text = re.sub(pattern, replacement, text)
    assert text == expected
