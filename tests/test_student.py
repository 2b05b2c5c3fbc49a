"""Student copies have no solutions, and their checks tell right, wrong and not done apart."""

from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from conftest import PARAMETERS
from nbformat import NotebookNode

from steerkit.lab import cli
from steerkit.lab import exercises as lab
from steerkit.lab.exercises import student_copy

SECRET = "N * 21"
CELLS = [
    "## Exercises\n\n**1 (5 minutes).** Make *a* number. *Hint: see N,\nand multiply.*",
    f"given = 2\n# Solution: because\nanswer = {SECRET}\n"
    'with exercise(1, answer):\n    assert answer == 42, f"{answer} is not 42"',
    "**2 (10 minutes).** Write a function. *Hint: `def`.*",
    "# Solution\ndef double(x: int, times=2) -> int:\n    return x * times\n\n"
    "with exercise(2, double, answer):\n    assert double(answer) == 84",
]


@pytest.fixture
def notebook() -> NotebookNode:
    new = nbformat.v4
    first = new.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    say = new.new_code_cell("from steerkit.lab.exercises import exercise\nprint('before')")
    exercises = [
        new.new_code_cell(source, metadata={"tags": ["exercise"]})
        if "with exercise" in source
        else new.new_markdown_cell(source)
        for source in CELLS
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new.new_notebook(cells=[first, say, *exercises], metadata={"kernelspec": kernel})


@pytest.fixture
def kit(root: Path, notebook: NotebookNode) -> Path:
    """The current folder, with that notebook."""
    nbformat.write(notebook, root / "01_kit.ipynb")
    return root


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


SOLVED = "# Solution\na0 = 42\nwith exercise(0, a0):\n    assert a0 == 42, f'{a0} is not 42'"
REFUSED = "wrong: AssertionError: 41 is not 42"
ATTEMPTS = {  # a student's cell -> its verdict; 0 stands for the number of the exercise
    "a0 = ...\nwith exercise(0, a0):\n    assert a0 == 42": "not done yet",
    "a0 = 42\nwith exercise(0, a0):\n    assert a0 == 41": "right",
    "a0 = 42": "right",
    "a0 = 41\nwith exercise(0, a0):\n    pass": REFUSED,
    "a0 = 41\nwith exercise(0, 1): pass": REFUSED,
    "with exercise(0, 1): pass": "wrong: NameError: name 'a0' is not defined",
    "exercise = print\na0 = 41": REFUSED,
    "a0 = 42\nraise KeyError(1)": "wrong: KeyError: 1",
    "from nowhere import x": "wrong: ModuleNotFoundError: No module named 'nowhere'",
    "": "no verdict: its cell is gone",
}


def test_check_judges_each_attempt_by_the_assertions_of_the_key(root, notebook, capsys):
    copy = deepcopy(notebook)
    for book, sources in ((notebook, [SOLVED] * len(ATTEMPTS)), (copy, ATTEMPTS)):
        del book.cells[2:]
        for n, source in enumerate(sources, start=1):
            options = {"id": f"e{n}", "metadata": {"tags": ["exercise"]}}
            book.cells.append(nbformat.v4.new_code_cell(source.replace("0", str(n)), **options))
    del copy.cells[-1]
    copy.cells[3].id = "copied"  # it is found by its number
    nbformat.write(notebook, root / "01_kit.ipynb")
    (root / "class").mkdir()
    nbformat.write(copy, path := root / "class" / "01_kit_of_ada.ipynb")
    before = path.read_bytes()
    assert cli.main(["check", str(path), "--key", "."]) == 1
    verdicts = enumerate(ATTEMPTS.values(), start=1)
    wanted = [f"  Exercise {n}: {verdict.replace('0', str(n))}" for n, verdict in verdicts]
    assert lines_of(capsys) == [str(path), *wanted]
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_all_right_answers_are_right_and_an_error_before_them_is_named(kit, notebook, capsys):
    notebook.cells[1].source = "1 / 0"
    nbformat.write(notebook, "02.ipynb")
    assert cli.main(["check", "01_kit.ipynb", "--key", "."]) == 0
    assert cli.main(["check", "02.ipynb", "--key", "."]) == 1
    reason = "not reached: cell In [3], '1 / 0': ZeroDivisionError: division by zero"
    right, broken = ([f"  Exercise {n}: {state}" for n in (1, 2)] for state in ("right", reason))
    assert lines_of(capsys) == ["01_kit.ipynb", *right, "02.ipynb", *broken]


def test_a_copy_that_was_worked_on_is_not_replaced(kit, make_notebook, capsys):
    copy = kit / "class" / "student" / "01_kit.ipynb"
    assert cli.main(["student", "class"]) == cli.main(["student", "class"]) == 0
    answers = kit / "class" / "answers" / "01_kit.ipynb"
    assert answers.read_bytes() == (kit / "01_kit.ipynb").read_bytes()
    copy.write_text(worked_on := copy.read_text().replace("answer = ...", "answer = 42"))
    assert cli.main(["student", "class"]) == 2
    assert "01_kit.ipynb exists and differs: move it away" in capsys.readouterr().err
    assert cli.main(["check", str(make_notebook("02", ["1"]))]) == 2
    assert "02.ipynb: no notebook in " in capsys.readouterr().err
    assert copy.read_text() == worked_on


def test_the_copy_keeps_what_is_given_and_folds_the_hint(notebook):
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="before\n")]
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", text="42\n")]
    copy = student_copy(notebook)
    nbformat.validate(copy)
    assert SECRET not in str(copy) and "return x" not in str(copy) and SECRET in str(notebook)
    assert copy.cells[1].outputs and copy.cells[4].outputs == []
    assert copy.cells[2].source == lab.WELCOME
    assert copy.cells[3].source == (
        "## Exercises\n\n**1 (5 minutes).** Make *a* number.\n\n<details><summary>Hint</summary>"
        "\n\nsee N,\nand multiply.\n\n</details>"
    )
    assert copy.cells[4].source == (
        "given = 2\nanswer = ...  # your code\n"
        'with exercise(1, answer):\n    assert answer == 42, f"{answer} is not 42"'
    )
    assert copy.cells[6].source.startswith(
        "double = ...  # your code: a function double(x: int, times=2)\n"
        "answer = ...  # your code\nwith exercise(2, double, answer):"
    )


@pytest.mark.parametrize(
    ("cell", "old", "new", "number"),
    [
        (2, "*Hint", "Hint", 1),
        (4, "**2 ", "**3 ", 2),
        (3, "# Solution", "# So", 1),
        (3, "(1, answer)", "(1)", 1),
        (3, "exercise(1", "exercise(2", 1),
    ],
)
def test_a_malformed_exercise_is_named(notebook, cell, old, new, number):
    notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)
    with pytest.raises(ValueError, match=rf"exercise {number}: expected above it .* in it"):
        student_copy(notebook)
