"""Student copies have no solutions, and their checks tell right, wrong and not done apart."""

import ast
import base64
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import PARAMETERS, NotebookMaker
from nbformat import NotebookNode

from steerkit.files import ROOT
from steerkit.lab import cli
from steerkit.lab import exercises as student
from steerkit.lab.exercises import exercise, exercises, student_copy

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECRET = "N * 21"
FIGURE = """import matplotlib.pyplot as plt
from steerkit.viz.plots import show
from steerkit.results import figures_dir
fig, ax = plt.subplots(figsize=(1, 1))
show(fig, "a", out=figures_dir(PROFILE, "01"), caption="None.", alt="Empty axes.", values={})"""
ASKED = [
    (
        "## Exercises\n\n**1 (5 minutes).** Make *a* number. *Hint: see N,\nand multiply.*",
        f"given = 2\n# Solution: because\nanswer = {SECRET}\n"
        'with exercise(1, answer):\n    assert answer == 42, f"{answer} is not 42"',
    ),
    (
        "**2 (10 minutes).** Write a function. *Hint: `def`.*",
        "def double(x, times=2):\n    return x * times\n\n"
        "with exercise(2, double):\n    assert double(answer) == 84",
    ),
    (
        "**3 (15 minutes).** Draw. *Hint: axes.*",
        f"{FIGURE}\npair = fig, ax\nwith exercise(3, pair):\n    pass",
    ),
]


@pytest.fixture
def notebook() -> NotebookNode:
    return build()


def build() -> NotebookNode:
    new = nbformat.v4
    cells = [
        new.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new.new_code_cell("from steerkit.lab.exercises import exercise\nprint('told')"),
    ]
    for question, code in ASKED:
        cells.append(new.new_markdown_cell(question))
        cells.append(new.new_code_cell(code, metadata={"tags": ["exercise"]}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit whose one notebook has been run and stored."""
    root = tmp_path_factory.mktemp("kit")
    (root / "notebooks").mkdir()
    nbformat.write(build(), root / "notebooks" / "01_kit.ipynb")
    assert cli.main(["run", "--save"], root=root) == 0
    return root


@pytest.fixture
def stored(kit: Path) -> NotebookNode:
    return nbformat.read(kit / "notebooks" / "01_kit.ipynb", as_version=4)


def tagged(notebook: NotebookNode) -> list[NotebookNode]:
    return [c for c in notebook.cells if "exercise" in c.metadata.get("tags", [])]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_notebook_itself_shows_that_its_answers_are_right(stored: NotebookNode) -> None:
    shown = [cell.outputs[-1].data["text/plain"] for cell in tagged(stored)]
    assert shown == [f"Exercise {n}: right." for n in (1, 2, 3)]


def test_check_tells_wrong_open_right_and_tampered_apart(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["student", "--out", str(tmp_path)], root=kit) == 0
    path = tmp_path / "student" / "01_kit.ipynb"
    copy = nbformat.read(path, as_version=4)
    one, _, three = tagged(copy)
    one.source = one.source.replace("answer = ...", "answer = 41")
    three.source = three.source.replace("pair = ...", "pair = 1, 2")
    last = nbformat.v4.new_code_cell("pass", metadata={"tags": ["exercise"]})
    copy.cells.append(last)
    nbformat.write(copy, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert cli.main(["check", str(path)], root=kit) == 1
    assert lines_of(capsys) == [
        str(path),
        "  Exercise 1: wrong: AssertionError: 41 is not 42",
        "  Exercise 2: not done yet",
        "  Exercise 3: right",
        "  Exercise 4: no verdict: its block `with exercise(...)` is gone",
    ]
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_an_error_before_the_exercises_is_named(
    stored: NotebookNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored.cells[1].source = "1 / 0"
    paths = [str(tmp_path / name) for name in ("01.ipynb", "another.ipynb")]
    for path in paths:
        nbformat.write(stored, path)
    assert cli.main(["check", *paths], root=tmp_path) == 1
    reason = "not reached: cell In [3], '1 / 0': ZeroDivisionError: division by zero"
    verdicts = [f"  Exercise {n}: {reason}" for n in (1, 2, 3)]
    assert lines_of(capsys) == [paths[0], *verdicts, paths[1], *verdicts]


def test_a_notebook_without_exercises_is_named(
    make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_notebook("01", ["1"])
    assert cli.main(["check", str(path)]) == 2
    assert "no cell is tagged exercise" in capsys.readouterr().err


def test_the_answer_key_is_the_notebook_and_the_copy_has_no_solution(
    kit: Path, tmp_path: Path, stored: NotebookNode
) -> None:
    assert cli.main(["student", "--out", str(tmp_path)], root=kit) == 0
    assert nbformat.read(tmp_path / "answers" / "01_kit.ipynb", as_version=4) == stored
    text = (tmp_path / "student" / "01_kit.ipynb").read_text()
    assert SECRET not in text and "return x" not in text and "given = 2" in text


def test_the_copy_keeps_figures_and_drops_only_the_exercises_outputs(
    kit: Path, stored: NotebookNode
) -> None:
    copy = student_copy(stored)
    assert [o.text for o in copy.cells[1].outputs] == ["told\n"]
    assert all(c.outputs == [] and c.execution_count is None for c in tagged(copy))
    question = copy.cells[-2]
    assert "![Empty axes.](attachment:target-3-1.png)" in question.source
    (picture,) = (kit / "figures" / "cpu" / "01").glob("*.png")
    attached = question.attachments["target-3-1.png"]["image/png"]
    assert base64.b64decode(attached) == picture.read_bytes()
    nbformat.validate(copy)
    assert exercises(stored) and "Solution" in stored.cells[3].source  # the source is left alone


def test_a_copy_that_was_worked_on_is_not_replaced(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "student" / "01_kit.ipynb"
    command = ["student", "--out", str(tmp_path)]
    assert cli.main(command, root=kit) == cli.main(command, root=kit) == 0
    copy.write_text(worked_on := copy.read_text().replace("answer = ...", "answer = 42"))
    assert cli.main(command, root=kit) == 2
    assert f"{copy} exists and differs: move it away" in capsys.readouterr().err
    assert copy.read_text() == worked_on


def test_the_stub_keeps_what_is_given_and_folds_the_hint(notebook: NotebookNode) -> None:
    copy = student_copy(notebook)
    assert copy.cells[2].source == student.WELCOME
    assert copy.cells[3].source == (
        "## Exercises\n\n**1 (5 minutes).** Make *a* number.\n\n<details><summary>Hint</summary>"
        "\n\nsee N, and multiply.\n\n</details>"
    )
    assert copy.cells[4].source == (
        "given = 2\nanswer = ...  # your code\n"
        'with exercise(1, answer):\n    assert answer == 42, f"{answer} is not 42"'
    )
    assert copy.cells[6].source.startswith(
        "double = ...  # your code: a function double(x, times=2)\nwith exercise(2, double):"
    )


def edit(cell: int, old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        source = notebook.cells[cell].source
        assert old in source
        notebook.cells[cell].source = source.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.cells[3].metadata.update(tags=[]), "question 1: expected one cell tagged"),
        (lambda n: n.cells.pop(2), "expected a question right above it"),
        (lambda n: n.cells.pop(), "question 3: expected one cell tagged exercise below it"),
        (edit(2, "*Hint", "Hint"), r"question 1: expected `\*Hint: ...\*` as its last words"),
        (edit(4, "**2 ", "**3 "), r"expected `with exercise\(3, name, ...\):`"),
        (edit(3, "answer == 42", "1\n2"), "its last statement is not `with exercise"),
        (edit(3, "(1, answer)", "(1)"), r"expected `with exercise\(1, name, ...\):`"),
        (edit(3, "(1, answer)", "(1, answer, N * 2)"), r"`with exercise\(1, name, ...\):`"),
        (edit(5, "2, double)", "2, single)"), r"the solution does not make \['single'\]"),
        (edit(3, "with exercise(1", "with exercise(2"), r"expected `with exercise\(1, name"),
        (
            lambda n: (edit(2, "**1 ", "**2 ")(n), edit(3, "e(1", "e(2")(n)),
            r"exercises are numbered \[2, 2, 3\]: expected 1, 2",
        ),
    ],
)
def test_a_malformed_exercise_is_named(
    notebook: NotebookNode, change: Callable[[NotebookNode], object], message: str
) -> None:
    change(notebook)
    with pytest.raises(ValueError, match=message):
        exercises(notebook)


def test_the_block_tells_open_right_and_wrong_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with exercise(1, 3, ...):
        raise TypeError("a tensor cannot be compared with an ellipsis")
    with exercise(2, ...):
        pass
    with exercise(3, 4, "x"):
        pass
    assert lines_of(capsys) == [
        "Exercise 1: not done yet.", "Exercise 2: not done yet.", "Exercise 3: right.",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="five"), exercise(4, 5):
        raise AssertionError("five")
    with pytest.raises(KeyboardInterrupt), exercise(5, ...):
        raise KeyboardInterrupt
    assert lines_of(capsys) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_of_the_kit_has_three_exercises_and_a_clean_copy(path: Path) -> None:
    full = nbformat.read(path, as_version=4)
    found = exercises(full)
    assert len(found) == 3
    text = nbformat.writes(student_copy(full))
    for one in found:
        lines = [s for s in one.solution.splitlines() if not s.startswith(("#", "import", "from"))]
        assert any(line.strip() and repr(line.strip())[1:-1] not in text for line in lines)
        shown = re.findall(
            rf"Exercise {one.number}: \w+", str(full.cells[one.question + 1].outputs)
        )
        assert shown == [f"Exercise {one.number}: right"], "run it again with steerkit run --save"


def test_a_notebook_that_imports_exercise_does_not_wait_for_the_runner() -> None:
    body = ast.parse(Path(student.__file__).read_text(encoding="utf-8")).body
    imported = [ast.unparse(n) for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert imported and not [line for line in imported if re.search("nbformat|runner", line)]
