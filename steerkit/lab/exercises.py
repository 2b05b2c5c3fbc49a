"""Exercises of a notebook: checked where they stand, without solution in a student's copy, graded.

An exercise is a question cell `**1 (5 minutes).** ... *Hint: ...*` and one code cell below it,
tagged `exercise`: lines that the student gets, `# Solution` and its lines, and the block
`with exercise(1, answer):` whose asserts check the answers that it names.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
from IPython.display import display
from nbformat import NotebookNode

from steerkit.files import NOTEBOOKS, write_text

TAG = "exercise"
RIGHT, OPEN, GONE = "right", "not done yet", "no verdict: its cell is gone"
QUESTION = re.compile(r"\*\*(\d+) \(\d+ minutes\)\.\*\*.*?(\s*\*Hint: (.+?)\*\s*)\Z", re.DOTALL)
ANSWER = re.compile(
    r"(?P<given>.*?)^# Solution\b.*?\n(?P<solution>.*?)"
    r"(?P<check>^with exercise\((?P<number>\d+), (?P<names>\w+(?:, \w+)*)\):\n.*)",
    re.DOTALL | re.MULTILINE,
)
WELCOME = """*Your copy.* In the exercises below, replace each `...` by your answer and run the
cell: it says whether the answer is right. `steerkit check NOTEBOOK` runs the whole notebook at
small size and lists them all."""


@contextmanager
def exercise(number: int, *answers: Any) -> Iterator[None]:
    """Show whether an exercise is right; an answer that is still `...` is no error, only not done.

    A wrong answer raises what the block raises.
    """
    unsolved = any(answer is ... for answer in answers)
    with suppress(Exception) if unsolved else nullcontext():
        yield
    state = OPEN if unsolved else RIGHT
    display({"text/plain": f"Exercise {number}: {state}."}, raw=True)


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions, with folded hints; ValueError names a malformed exercise."""
    copy = deepcopy(notebook)
    places = [copy.cells.index(cell) for cell in _tagged(copy, TAG)]
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
        code.source, code.outputs, code.execution_count = _stub(answer), [], None
    if places:
        copy.cells.insert(places[0] - 1, nbformat.v4.new_markdown_cell(WELCOME, id="your-copy"))
    return copy


def _stub(answer: re.Match[str]) -> str:
    """The student's cell: what is given, an ellipsis for each answer, the check."""
    lines = []
    for name in answer["names"].split(", "):
        signature = re.search(rf"^def ({name}\(.*\)).*:", answer["solution"], re.MULTILINE)
        wish = f": a function {signature[1]}" if signature else ""
        lines.append(f"{name} = ...  # your code{wish}\n")
    return answer["given"] + "".join(lines) + answer["check"]


def write_copies(notebooks: Sequence[Path], out: Path) -> list[Path]:
    """Write out/student/<name>.ipynb and out/answers/<name>.ipynb; a copy that was edited since
    is not replaced."""
    texts = {}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        texts[out / "student" / path.name] = nbformat.writes(student_copy(notebook)) + "\n"
        texts[out / "answers" / path.name] = nbformat.writes(notebook) + "\n"
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} exists and differs: move it away, or choose another folder")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def grade(path: Path, key: Path = NOTEBOOKS) -> list[str]:
    """Run a copy of a student's notebook at small size, and say of each exercise: right, not done
    yet, wrong: ..., not reached: ..., or no verdict.

    The assertions are those of the notebook of this name in the folder `key`; the student's own
    are not executed. Of several cells for one exercise the last one counts.
    """
    from steerkit.lab import runner

    originals = [file for file in key.glob("*.ipynb") if path.stem.startswith(file.stem)]
    if not originals:
        raise ValueError(f"{path}: no notebook in {key} has its name, and the assertions to check")
    notebook = nbformat.read(path, as_version=4)
    exercises = _tagged(nbformat.read(originals[0], as_version=4), TAG)
    for number, original in enumerate(exercises, start=1):
        _put_assertions(notebook, number, original)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        nbformat.write(notebook, trial)
        values, out = runner.overrides(trial, "smoke"), Path(folder) / "runs"
        outcome = runner.execute(trial, values, "smoke", out, cwd=path.parent.resolve())
        executed = nbformat.read(outcome.executed, as_version=4)
    attempts = [_tagged(executed, f"attempt-{number + 1}") for number in range(len(exercises))]
    return [_state(cells[-1], outcome.error) if cells else GONE for cells in attempts]


def _tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def _put_assertions(notebook: NotebookNode, number: int, original: NotebookNode) -> None:
    """End a student's cells for an exercise with the original's block instead of their own."""
    check = ANSWER.fullmatch(original.source)["check"]
    block = re.compile(rf"^with {TAG}\({number}\b.*", re.DOTALL | re.MULTILINE)
    for cell in notebook.cells:
        if cell.cell_type == "code" and (cell.id == original.id or block.search(cell.source)):
            answer = block.sub("", cell.source)
            cell.source = f"{answer}\nfrom steerkit.lab.exercises import {TAG}\n{check}"
            # After a wrong answer on to the next exercise.
            cell.metadata["tags"] = ["raises-exception", f"attempt-{number}"]


def _state(cell: NotebookNode, error: str | None) -> str:
    """From an executed exercise's last output: the block's own line, or what was raised."""
    for output in reversed(cell.outputs):
        if output.output_type == "error":
            return f"wrong: {output.ename}: {output.evalue}".rstrip(": ")
        shown = output.get("data", {}).get("text/plain", "")
        if match := re.fullmatch(rf"Exercise \d+: ({RIGHT}|{OPEN})\.", shown):
            return match[1]
    return GONE if cell.execution_count else f"not reached: {error}"
