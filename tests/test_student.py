"""Student copies have no solutions, and their checks tell right, wrong and not done apart."""

import builtins
import re
import symtable
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import PARAMETERS
from nbformat import NotebookNode

from steerkit.files import ROOT
from steerkit.lab import cli
from steerkit.lab import exercises as lab
from steerkit.lab.exercises import student_copy

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECRET = "N * 21"
CELLS = [
    "## Exercises\n\n**1 (5 minutes).** Make *a* number. *Hint: see N,\nand multiply.*",
    f"given = 2\n# Solution: because\nanswer = {SECRET}\n"
    'with exercise(1, answer):\n    assert answer == 42, f"{answer} is not 42"',
    "**2 (10 minutes, difficulty 1 of 3, importance 3 of 3).** Write one. *Hint: `def`.*",
    '# Solution\ndef double(x: int, times=2) -> int:\n    """Twice `x`: int -> int."""\n'
    "    return x * times\n\n"
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


def test_a_copy_that_was_worked_on_is_not_replaced(kit, capsys):
    copy = kit / "class" / "student" / "01_kit.ipynb"
    assert cli.main(["student", "class"]) == cli.main(["student", "class"]) == 0
    answers = kit / "class" / "answers" / "01_kit.ipynb"
    assert answers.read_bytes() == (kit / "01_kit.ipynb").read_bytes()
    copy.write_text(worked_on := copy.read_text().replace("answer = ...", "answer = 42"))
    assert cli.main(["student", "class"]) == 2
    assert "01_kit.ipynb exists and differs: move it away" in capsys.readouterr().err
    assert copy.read_text() == worked_on


def test_the_copy_keeps_what_is_given_and_folds_the_hint(notebook):
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="before\n")]
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", text="42\n")]
    copy = student_copy(notebook)
    nbformat.validate(copy)
    assert SECRET not in str(copy) and "return x" not in str(copy) and SECRET in str(notebook)
    assert all(cell.get("outputs", []) == [] for cell in copy.cells)
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
        'def double(x: int, times=2) -> int:\n    """Twice `x`: int -> int."""\n'
        "    return ...  # your code\n\n\nanswer = ...  # your code\n"
        "with exercise(2, double, answer):"
    )


def cumulated(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(0)


WRONG = {  # an answer -> what is said of it; the cases are one row and three
    "missing": (lambda x: None, "case 1 of 2: yours is None, expected tensor"),
    "text": (lambda x: "3", "case 1 of 2: yours is '3', expected tensor"),
    "shape": (lambda x: x.sum(0), "do not match: torch.Size([]) != torch.Size([2])"),
    "values": (lambda x: x.cumsum(0) + (x > 3), "Mismatched elements: 2 / 4"),
    "nothing": (lambda x: 0, "case 1 of 2: yours is 0, expected tensor([1., 3.])"),
    "not a number": (lambda x: x * torch.nan, "case 1 of 2: yours is tensor([nan, nan])"),
}


@pytest.mark.parametrize(("yours", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_function_is_told_the_case_and_both_values(yours, told):
    cases = [(torch.tensor([1.0, 2.0]),), (torch.tensor([[2.0, 1.0], [7.0, 8.0]]),)]
    lab.compare(cumulated, cumulated, *cases)
    with pytest.raises(AssertionError, match=re.escape(told)):
        lab.compare(yours, cumulated, *cases)


def test_an_answer_that_cannot_be_checked_is_told_by_its_type():
    told = "exercise 3, answered by list, int: AttributeError"
    with pytest.raises(AssertionError, match=told), lab.exercise(3, [1, 2], 7):
        [1, 2].items()


def test_long_answers_are_told_short_and_by_one_traceback():
    with pytest.raises(AssertionError, match="case 1 of 1") as caught:
        lab.compare(lambda x: "b" + x, lambda x: x, ("a" * 5000,))
    assert len(str(caught.value)) < 1500 and caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_answers_may_be_lists_texts_and_entries_by_name():
    row = {"ids": [1, 2], "mean": torch.tensor([0.5])}
    lab.compare(lambda: dict(row, mean=torch.tensor([0.5 + 1e-7])), lambda: row, ())
    lab.compare(lambda: 0.5 + 1e-7, lambda: torch.tensor(0.5), ())
    lab.compare(lambda: ["a", "b"], lambda: ["a", "b"], ())
    for wrong in (dict(row, ids=[1, 3]), {"ids": [1, 2]}, ["a"], None):
        with pytest.raises(AssertionError, match=r"case 1 of 1: yours is .*, expected \{'ids'"):
            lab.compare(lambda wrong=wrong: wrong, lambda: row, ())
    for wrong in (["a"], "ab", None):
        with pytest.raises(AssertionError, match=r"yours is .*, expected \['a', 'b'\]"):
            lab.compare(lambda wrong=wrong: wrong, lambda: ["a", "b"], ())


def test_an_answer_that_changes_its_input_spoils_no_other_case():
    given = torch.ones(2)
    lab.compare(lambda x: x.mul_(2), lambda x: 2 * x, (given,), (given,))
    assert given.tolist() == [1, 1]


def test_copies_bring_what_their_text_links_to(root, make_notebook, capsys):
    path = make_notebook("01", [])
    linked = {"notebooks/img/01.svg": "<svg/>", "docs/words.md": "# Words", "docs/other.md": "-"}
    for name, text in linked.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    text = "![a map](img/01.svg) [nats](../docs/words.md#nats) [paper](https://arxiv.org) [up](#a)"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell(text))
    nbformat.write(notebook, path)
    assert cli.main(["student", "class"]) == 0
    lab.copy_notebooks([path], {root / "course": lambda notebook: notebook})
    for folder in ("class/student", "class/answers", "course"):
        names = {str(f.relative_to(root / folder)) for f in (root / folder).rglob("*.*")}
        assert names == {"01.ipynb", "img/01.svg", "docs/words.md"}
        assert "[nats](docs/words.md#nats)" in (root / folder / "01.ipynb").read_text()
    # What a class has edited is kept, and then nothing at all is written.
    (root / "course" / "docs" / "words.md").write_text("mine")
    (root / "course" / "01.ipynb").unlink()
    with pytest.raises(ValueError, match=r"words\.md exists and differs"):
        lab.copy_notebooks([path], {root / "course": lambda notebook: notebook})
    assert not (root / "course" / "01.ipynb").exists()


# Right answers under other variable names


def names_of(code: str) -> tuple[set[str], set[str]]:
    """Global names that a piece of a notebook (reads, binds), those in its functions too."""
    reads, binds = set(), set()

    def walk(table: symtable.SymbolTable, top: bool) -> None:
        for symbol in table.get_symbols():
            if top and symbol.is_assigned() | symbol.is_imported():
                binds.add(symbol.get_name())
            if symbol.is_referenced() and (top or symbol.is_global()):
                reads.add(symbol.get_name())
        for child in table.get_children():
            walk(child, False)

    walk(symtable.symtable(code, "cell", "exec"), True)
    return reads, binds


def dependences(notebook: NotebookNode) -> list[str]:
    """Where a notebook needs a solution's own names, so that another right answer would fail."""
    found, known, hidden = [], set(dir(builtins)) | {"get_ipython", "display"}, set()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        answer = (
            lab.ANSWER.fullmatch(cell.source) if lab.TAG in cell.metadata.get("tags", []) else None
        )
        reads, binds = names_of(answer["given"] if answer else cell.source)
        found += [f"{cell.source[:40]!r} reads {name}" for name in reads & hidden - binds]
        known |= binds
        hidden -= binds
        if answer:
            answers = set(answer["names"].split(", "))
            _, solution = names_of(answer["solution"])
            reads, binds = names_of(answer["check"])
            # What the solution binds may mean something else where it was bound before.
            own = (solution - answers) | hidden
            wrong = (reads - answers - binds) & own | (reads - answers - binds - known)
            found += [f"exercise {answer['number']} reads {name}" for name in sorted(wrong)]
            hidden |= solution
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_right_answers_under_other_variable_names_pass(path):
    assert dependences(nbformat.read(path, as_version=4)) == []


def test_a_check_or_a_later_cell_that_reads_a_solution_is_named(notebook):
    assert dependences(notebook) == []
    spoiled = deepcopy(notebook)
    spoiled.cells[3].source = (
        CELLS[1]
        .replace("# Solution", "mine = 1\n# Solution")
        .replace("answer = ", "best = mine = 21\nanswer = ")
        .replace("answer == 42", "answer == 2 * best == 2 * mine")
    )
    spoiled.cells.append(nbformat.v4.new_code_cell("def f():\n    return double(2)"))
    told = ["exercise 1 reads best", "exercise 1 reads mine"]
    assert dependences(spoiled) == [*told, "'def f():\\n    return double(2)' reads double"]


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
