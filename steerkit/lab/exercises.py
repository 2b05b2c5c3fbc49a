"""Exercises of a notebook: checked where they stand, without solution in a student's copy.

An exercise is a question cell `**1 (5 minutes).** ... *Hint: ...*` and one code cell below it,
tagged `exercise`: lines that the student gets, `# Solution` and its lines, and the block
`with exercise(1, answer):` whose asserts check the answers that it names. In the brackets may stand
`(15 minutes, difficulty 2 of 3, importance 3 of 3)`.
"""

import ast
import dis
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import torch
from IPython.display import display
from nbformat import NotebookNode
from torch import Tensor
from torch.testing import assert_close

from steerkit.files import write_bytes

TAG = "exercise"
CLOSE = {"rtol": 1e-4, "atol": 1e-6, "equal_nan": True, "check_dtype": False, "check_device": False}
RIGHT, OPEN = "right", "not done yet"
QUESTION = re.compile(
    r"\*\*(\d+) \(\d+ minutes(?:, difficulty [123] of 3, importance [123] of 3)?\)\.\*\*.*?"
    r"(\s*\*Hint: (.+?)\*\s*)\Z",
    re.DOTALL,
)
ANSWER = re.compile(
    r"(?P<given>.*?)^# Solution\b.*?\n(?P<solution>.*?)"
    r"(?P<check>^with exercise\((?P<number>\d+), (?P<names>\w+(?:, \w+)*)\):\n.*)",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\(((?:\.\./)?[^)#:\s]+)")  # a file beside the notebook or its folder
WELCOME = """*Your copy.* In the exercises below, replace each `...` by your answer and run the
cell: it says whether the answer is right, or what is wrong with it."""


@contextmanager
def exercise(number: int, *answers: Any) -> Iterator[None]:
    """Show whether an exercise is right; an answer that is still `...` is no error, only not done.

    So is a function that only returns `...`. A wrong answer raises what the block asserts, and one
    that the block cannot check an AssertionError that says of which types the answers are.
    """
    unsolved = any(map(_unsolved, answers))
    try:
        yield
    except Exception as error:
        if not unsolved and isinstance(error, AssertionError):
            raise
        if not unsolved:
            types = ", ".join(type(answer).__name__ for answer in answers)
            raise AssertionError(f"exercise {number}, answered by {types}: {error!r}") from error
    state = OPEN if unsolved else RIGHT
    display({"text/plain": f"Exercise {number}: {state}."}, raw=True)


def _unsolved(answer: Any) -> bool:
    """Whether it is `...`, or a function whose first step loads that: a stub's `return ...`."""
    if not inspect.isfunction(answer):
        return answer is ...
    return next(i for i in dis.get_instructions(answer) if i.opname != "RESUME").argval is ...


def compare(yours: Callable, ours: Callable, *cases: Sequence[Any]) -> None:
    """Assert that two functions return the same for each tuple of arguments.

    AssertionError names the case and says what differs. Each call gets copies of its arguments.
    Numbers are the same within 1e-4 of ours, or 1e-6.
    """
    __tracebackhide__ = True  # IPython's: a learner sees the own lines only
    for number, case in enumerate(cases, start=1):
        mine, wanted = yours(*deepcopy(case)), ours(*deepcopy(case))
        told = f"case {number} of {len(cases)}: yours is {mine!r:.300}, expected {wanted!r:.300}"
        try:
            if isinstance(wanted, Tensor | float | int):
                mine, wanted = torch.as_tensor(mine), torch.as_tensor(wanted)
            assert_close(mine, wanted, **CLOSE)
        except AssertionError as error:
            raise AssertionError(f"{told}\n\n{error}") from None
        except (TypeError, ValueError, RuntimeError):  # texts, or another kind of thing
            if type(mine) is not type(wanted) or mine != wanted:
                raise AssertionError(told) from None


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions and outputs, with folded hints.

    A stored result would give a prediction away. ValueError names a malformed exercise.
    """
    copy = deepcopy(notebook)
    places = [n for n, cell in enumerate(copy.cells) if TAG in cell.metadata.get("tags", [])]
    for number, place in enumerate(places, start=1):
        question, code = copy.cells[place - 1], copy.cells[place]
        asked, answer = QUESTION.search(question.source), ANSWER.fullmatch(code.source)
        if not (asked and answer and asked[1] == answer["number"] == str(number)):
            raise ValueError(
                f"exercise {number}: expected above it `**{number} (5 minutes).** ... *Hint: "
                f"...*`, in it `# Solution`, and last `with exercise({number}, name, ...):`"
            )
        hint = f"\n\n<details><summary>Hint</summary>\n\n{asked[3]}\n\n</details>"
        question.source = question.source.removesuffix(asked[2]) + hint
        code.source = _stub(answer)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if places:
        copy.cells.insert(places[0] - 1, nbformat.v4.new_markdown_cell(WELCOME, id="your-copy"))
    return copy


def _stub(answer: re.Match[str]) -> str:
    """The student's cell: what is given, a stub for each answer, the check."""
    lines = answer["solution"].splitlines()
    statements = ast.parse(answer["solution"]).body
    functions = {node.name: node for node in statements if isinstance(node, ast.FunctionDef)}
    stubs = []
    for name in answer["names"].split(", "):
        if node := functions.get(name):
            told = ast.get_docstring(node) is not None
            end = node.body[0].end_lineno if told else node.body[0].lineno - 1
            stubs += [*lines[node.lineno - 1 : end], "    return ...  # your code", "", ""]
        else:
            stubs.append(f"{name} = ...  # your code")
    return answer["given"] + "\n".join(stubs) + "\n" + answer["check"]


def copy_notebooks(
    notebooks: Sequence[Path], folders: Mapping[Path, Callable[[NotebookNode], NotebookNode]]
) -> list[Path]:
    """Write each notebook into each folder, changed by its function, and the files it links to.

    `../docs` becomes `docs`, so that a folder needs nothing around it. A file that was edited since
    is not replaced: ValueError before anything is written.
    """
    files: dict[Path, bytes] = {}
    for path in notebooks:
        for folder, change in folders.items():
            notebook = change(nbformat.read(path, as_version=4))
            text = nbformat.writes(notebook).replace("](../", "](") + "\n"
            files[folder / path.name] = text.encode()
            words = "".join(c.source for c in notebook.cells if c.cell_type == "markdown")
            for link in LINK.findall(words):
                if (source := path.parent / link).is_file() and source.suffix != path.suffix:
                    files[folder / link.removeprefix("../")] = source.read_bytes()
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"{path} exists and differs: move it away, or choose another folder")
    for path, content in files.items():
        write_bytes(path, content)
    return [path for path in files if path.suffix == ".ipynb"]
