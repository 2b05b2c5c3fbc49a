"""Execute notebooks by papermill: choose, run, record, store.

While a notebook runs, all that it writes lies in OUT/partial/<profile>/. When it ends well, that
replaces OUT/<profile>/<notebook>/ (figures, claims, run.json) and OUT/<profile>/<notebook>.ipynb.
"""

import ast
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import nbformat
import papermill
import yaml
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from steerkit.files import NOTEBOOKS, ROOT, embedded, source_of, write_json, write_text
from steerkit.results import RUNS, machine, versions

CELL_TIMEOUT = {"smoke": 300, "cpu": 1200, "gpu": 6 * 3600}  # seconds per cell: a stuck run ends
NAMES = "[0-9]*.ipynb"


class Outcome(NamedTuple):
    """What became of one notebook; `error` is None or names the cell and the reason."""

    notebook: str
    error: str | None
    executed: Path  # after an error as far as it came
    results: Path  # the folder of its figures and claims


def find_notebooks(prefixes: Sequence[str] = ()) -> list[Path]:
    """The notebooks of the current folder, else of ./notebooks, else the kit's, in order.

    `prefixes` ("04", ...) choose some of them; ValueError if one fits none.
    """
    folders = (Path.cwd(), Path.cwd() / "notebooks", NOTEBOOKS)
    folder = next(folder for folder in folders if any(folder.glob(NAMES)))
    paths = sorted(folder.glob(NAMES))
    names = [path.stem for path in paths]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no notebook in {folder} starts with {prefix!r}; there are {names}")
    return [path for path in paths if not prefixes or path.stem.startswith(tuple(prefixes))]


def parameters(path: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`, as papermill reads them."""
    cell = papermill.inspect_notebook(str(path))
    return {name: ast.literal_eval(entry["default"]) for name, entry in cell.items()}


def overrides(
    path: Path, profile: str, model: str | None = None, extra: Iterable[Sequence[str]] = ()
) -> dict[str, Any]:
    """What to inject into the notebook: the requested values that differ from its defaults.

    A notebook without MODEL trains its own and ignores `model`; any other unknown name is an error
    (papermill itself only warns). Text becomes the default's type; a path becomes absolute.
    """
    defaults = parameters(path)
    requested = {"PROFILE": profile} | dict(extra)
    if model is not None and "MODEL" in defaults:
        requested["MODEL"] = model
    if unknown := requested.keys() - defaults:
        raise ValueError(
            f"{path.stem} has no parameter {min(unknown)}; its cell tagged `parameters` has "
            f"{list(defaults)}"
        )
    typed = {name: _typed(name, text, defaults[name]) for name, text in requested.items()}
    return {name: value for name, value in typed.items() if value != defaults[name]}


def _typed(name: str, text: str, default: Any) -> Any:
    """`text` from the command line as the type of the parameter's default.

    Where the default is an embedded model, `text` is a model; where it is empty, a file or folder.
    """
    if isinstance(default, str):
        if default in embedded():
            source_of(text)
        if default == "" != text and not Path(text).exists():
            raise ValueError(f"-p {name} {text}: no such file or folder")
        # The kernel's working directory is the notebook's, so a path means the user's.
        return str(Path(text).resolve()) if text != default and Path(text).exists() else text
    value = yaml.safe_load(text)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"-p {name} {text}: expected {type(default).__name__}, like {default!r}")
    return value


def execute(
    path: Path, values: Mapping[str, Any], profile: str, out: Path, *, cwd: Path | None = None
) -> Outcome:
    """Run one notebook with `values` as parameters, in `cwd` (default: its own folder).

    run.json holds the seconds that it took by the clock, the CPU seconds of its kernel, machine and
    versions.
    """
    partial, done = out / "partial" / profile, out / profile
    results = partial / path.stem
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    done.mkdir(exist_ok=True)
    environment = {
        RUNS: str(partial.parent.resolve()),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the kernel's debugger warns on the terminal
    }
    start, start_cpu = time.perf_counter(), _cpu_seconds_of_children()
    try:
        with patch.dict(os.environ, environment):
            papermill.execute_notebook(
                str(path),
                str(partial / path.name),
                parameters=dict(values),
                kernel_name="python3",
                cwd=cwd or path.parent,
                execution_timeout=CELL_TIMEOUT[profile],
                extra_arguments=["--log-level=CRITICAL"],  # no warning of plain TCP
            )
    except Exception as failure:  # one notebook's failure must not stop the others
        return Outcome(path.stem, _explain(failure), partial / path.name, results)

    record = {"notebook": path.stem, "profile": profile, "parameters": dict(values)}
    record |= {"machine": machine(), "versions": versions()}
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["cpu_seconds"] = round(_cpu_seconds_of_children() - start_cpu, 1)
    write_json(results / "run.json", record)
    shutil.rmtree(done / path.stem, ignore_errors=True)
    results.replace(done / path.stem)
    executed = (partial / path.name).replace(done / path.name)
    return Outcome(path.stem, None, executed, done / path.stem)


def _cpu_seconds_of_children() -> float:
    """CPU time of the processes that this one has waited for, as it waits for a kernel's end.

    Other processes on the machine do not lengthen it as they do the clock's.
    """
    times = os.times()
    return times.children_user + times.children_system


def _explain(failure: Exception) -> str:
    """`cell In [3], "first line": reason` for a failed cell, else the reason."""
    if not isinstance(failure, PapermillExecutionError):
        return f"{type(failure).__name__}: {failure}".strip()
    line = failure.source.strip().partition("\n")[0]
    place = f"cell In [{failure.exec_count}], {line[:60]!r}"
    return f"{place}: {failure.ename}: {failure.evalue}"


def store(outcome: Outcome, path: Path, figures: Path) -> None:
    """Commit a run: figures and claims replace the folder `figures`, outputs those of `path`.

    A notebook shows its default parameters, so a run with other ones leaves its outputs alone.
    """
    new, old = (nbformat.read(file, as_version=4) for file in (outcome.executed, path))
    if [cell.source for cell in new.cells] == [cell.source for cell in old.cells]:
        write_text(path, stripped(new))
    elif not any("injected-parameters" in cell.metadata.get("tags", []) for cell in new.cells):
        raise ValueError(f"{path.name} was edited while it ran: run it again")
    shutil.rmtree(figures, ignore_errors=True)
    shutil.copytree(outcome.results, figures)


def stripped(notebook: NotebookNode) -> str:
    """The notebook's text without what differs from run to run, or does not survive a file:
    times, progress bars, widget views, paths of this machine."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        kept = {key: cell.metadata.get(key) for key in ("tags", "jupyter")}  # set-up is collapsed
        cell.metadata = {key: value for key, value in kept.items() if value}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return nbformat.writes(notebook).replace(f"{ROOT}{os.sep}", "") + "\n"


def _is_progress(output: NotebookNode) -> bool:
    """Widget views; tqdm's bars on stderr, and the spaces with which a bar wipes itself out."""
    if output.output_type == "stream":
        bar = re.search(r"\d+%\||\dit \[", output.text) or not output.text.strip()
        return output.name == "stderr" and bool(bar)
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})
