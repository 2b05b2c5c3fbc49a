"""Exercises of a notebook: checked where they stand, stubbed in a student's copy, graded from it.

An exercise is a question cell `**1 (5 minutes).** ... *Hint: ...*` and behind it one code cell
tagged `exercise`: given lines (kept), `# Solution` and its lines, and last the block
`with exercise(1, answer):` whose asserts check the answers that it names.
"""

import ast
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from IPython.display import display

from steerkit.files import write_text

if TYPE_CHECKING:  # every notebook imports this file for `exercise`: no nbformat, no papermill
    from nbformat import NotebookNode

TAG = "exercise"
RIGHT, OPEN = "right", "not done yet"
QUESTION = re.compile(r"^\*\*(\d+) \((\d+) minutes\)\.\*\*", re.MULTILINE)
HINT = re.compile(r"\s*\*Hint: (.+?)\*\s*\Z", re.DOTALL)
FIGURE = re.compile(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"')
SOLUTION = re.compile(r"^# Solution\b.*\n", re.MULTILINE)
WELCOME = """*Your copy.* In the exercises below, replace each `...` by your answer and run the
cell: it says whether the answer is right. `steerkit check NOTEBOOK` runs the whole notebook at
small size and lists them all. The figures were drawn at full size: they are what you should get."""


class Exercise(NamedTuple):
    """One exercise: what a student reads and gets, and what is kept from them."""

    number: int
    minutes: int
    hint: str
    question: int  # index of the markdown cell; the code is in the next one
    given: str
    solution: str
    check: str
    answers: tuple[str, ...]

    @property
    def stub(self) -> str:
        """The student's cell: what is given, an ellipsis per answer, the check."""
        functions = {
            node.name: f"  # your code: a function {node.name}({ast.unparse(node.args)})"
            for node in ast.parse(self.solution).body
            if isinstance(node, ast.FunctionDef)
        }
        lines = [f"{name} = ...{functions.get(name, '  # your code')}" for name in self.answers]
        return self.given + "\n".join(lines) + "\n" + self.check


class Verdict(NamedTuple):
    """What a run of a student's notebook says of one exercise; `state` starts with a key word."""

    number: int
    state: str  # right, not done yet, wrong: ..., or not reached: ...


class _Line(str):
    """Shown without quotes."""

    __repr__ = str.__str__


@contextmanager
def exercise(number: int, *answers: Any) -> Iterator[None]:
    """Show whether an exercise is right; an answer that is still `...` is no error, only not done.

    A wrong answer raises what the block raises.
    """
    unsolved = any(answer is ... for answer in answers)
    try:
        yield
    except Exception:
        if not unsolved:
            raise
    display(_Line(f"Exercise {number}: {OPEN if unsolved else RIGHT}."))


def exercises(notebook: "NotebookNode") -> list[Exercise]:
    """The exercises of a notebook in order; ValueError says what a cell lacks."""
    found = []
    for index, cell in enumerate(notebook.cells):
        asked = cell.cell_type == "markdown" and QUESTION.findall(cell.source)
        tagged = TAG in cell.metadata.get("tags", [])
        after = notebook.cells[index + 1] if index + 1 < len(notebook.cells) else None
        if tagged and (not found or found[-1].question != index - 1):
            raise ValueError(f"exercise {cell.source[:40]!r}: expected a question right above it")
        if asked:
            if len(asked) > 1 or after is None or TAG not in after.metadata.get("tags", []):
                raise ValueError(f"question {asked[0][0]}: expected one cell tagged {TAG} below it")
            found.append(_exercise(cell.source, after.source, index))
    if [e.number for e in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"exercises are numbered {[e.number for e in found]}: expected 1, 2, ...")
    return found


def _exercise(question: str, code: str, index: int) -> Exercise:
    number, minutes = map(int, QUESTION.search(question).groups())
    hint, body = HINT.search(question), ast.parse(code).body
    if hint is None:
        raise ValueError(f"question {number}: expected `*Hint: ...*` as its last words")
    match body[-1] if body else None:
        case ast.With(items=[ast.withitem(ast.Call(ast.Name("exercise"), [first, *rest], []))]):
            names = tuple(name.id for name in rest if isinstance(name, ast.Name))
        case _:
            raise ValueError(f"exercise {number}: its last statement is not `with exercise(...):`")
    if ast.unparse(first) != str(number) or not names or len(names) != len(rest):
        raise ValueError(f"exercise {number}: expected `with exercise({number}, name, ...):`")
    lines = code.splitlines(keepends=True)
    before, check = "".join(lines[: body[-1].lineno - 1]), "".join(lines[body[-1].lineno - 1 :])
    *given, solution = SOLUTION.split(before, maxsplit=1)
    made = {n.id for n in ast.walk(ast.parse(solution)) if isinstance(n, ast.Name)}
    made |= {n.name for n in ast.parse(solution).body if isinstance(n, ast.FunctionDef)}
    if missing := set(names) - made:
        raise ValueError(f"exercise {number}: the solution does not make {sorted(missing)}")
    return Exercise(number, minutes, hint[1], index, "".join(given), solution, check, names)


def student_copy(notebook: "NotebookNode") -> "NotebookNode":
    """A copy without solutions; figures stay as targets, those of exercises in their question."""
    from nbformat.v4 import new_markdown_cell

    copy = deepcopy(notebook)
    found = exercises(copy)
    for one in found:
        question, code = copy.cells[one.question : one.question + 2]
        text, hint = HINT.sub("", question.source), " ".join(one.hint.split())
        question.source = f"{text}\n\n<details><summary>Hint</summary>\n\n{hint}\n\n</details>"
        _aim(question, code, one.number)
        code.source, code.outputs, code.execution_count = one.stub, [], None
    if found:
        welcome = new_markdown_cell(WELCOME, id="your-copy")
        copy.cells.insert(found[0].question, welcome)
    return copy


def _aim(question: "NotebookNode", code: "NotebookNode", number: int) -> None:
    """Attach the solution's figures to the question."""
    pages = [o.data["text/html"] for o in code.outputs if "text/html" in o.get("data", {})]
    for count, (alt, png) in enumerate(FIGURE.findall("".join(pages)), start=1):
        name = f"target-{number}-{count}.png"
        question.setdefault("attachments", {})[name] = {"image/png": png}
        question.source += f"\n\nYour figure should look like this:\n\n![{alt}](attachment:{name})"


def write_copies(notebooks: Sequence[Path], out: Path) -> list[Path]:
    """Write out/student/<name>.ipynb and out/answers/<name>.ipynb; nothing that was edited since
    is replaced."""
    import nbformat

    texts = {}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        try:
            copy = student_copy(notebook)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path.name}: {error}") from error
        texts[out / "student" / path.name] = nbformat.writes(copy) + "\n"
        texts[out / "answers" / path.name] = nbformat.writes(notebook) + "\n"
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} exists and differs: move it away, or choose another --out")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def grade(path: Path, *, profile: str, timeout: int, progress: bool = True) -> list[Verdict]:
    """Run a student's notebook under `profile` and read what each exercise shows; the notebook
    itself is left alone. `timeout` in seconds per cell."""
    import nbformat

    from steerkit.lab import runner

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    if not cells:
        raise ValueError(f"{path}: no cell is tagged {TAG}: make a copy with `steerkit student`")
    values = runner.overrides(path, profile=profile)
    for cell in cells:
        cell.metadata["tags"] = [*cell.metadata["tags"], "raises-exception"]  # and on to the next
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        nbformat.write(notebook, trial)
        where = {"out": Path(folder) / "out", "figures": Path(folder) / "figures"}
        where["out"].mkdir()
        options = {"profile": profile, "timeout": timeout, "progress": progress}
        outcome = runner.execute(trial, values, cwd=path.parent.resolve(), **where, **options)
        executed = nbformat.read(outcome.executed, as_version=4)
    done = [cell for cell in executed.cells if TAG in cell.metadata.get("tags", [])]
    return [Verdict(n, _state(cell, outcome.error)) for n, cell in enumerate(done, start=1)]


def _state(cell: "NotebookNode", error: str | None) -> str:
    """From an executed exercise's outputs: the block's own line, or what was raised."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"wrong: {output.ename}: {output.evalue}".rstrip(": ")
    shown = "\n".join(o.get("data", {}).get("text/plain", "") for o in cell.outputs)
    if match := re.search(rf"^Exercise \d+: ({RIGHT}|{OPEN})\.$", shown, re.MULTILINE):
        return match[1]
    if cell.execution_count is None:
        return f"not reached: {error}"
    return f"no verdict: its block `with {TAG}(...)` is gone"
