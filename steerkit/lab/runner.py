"""Execute the kit's notebooks by papermill: inspect, run, record, keep what a failure left."""

import ast
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import torch
from filelock import FileLock, Timeout
from papermill.exceptions import PapermillExecutionError

from steerkit.files import ROOT, write_json, write_text
from steerkit.lab.memory import USAGE_FILE
from steerkit.results import versions

CELL_TIMEOUT = {"smoke": 300, "cpu": 1200, "gpu": 6 * 3600}  # seconds per cell: a stuck run ends
PROFILES = tuple(CELL_TIMEOUT)


class Outcome(NamedTuple):
    """What became of one notebook; `error` is None or names the cell and the reason."""

    notebook: str
    seconds: float
    error: str | None
    executed: Path  # after an error what there is of it: nothing, if the disk was full


def find(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks of `folder` in order; `only` holds prefixes ("04"), each must match one."""
    found = sorted(p for p in Path(folder).glob("*.ipynb") if not p.name.startswith("."))
    names = [p.stem for p in found]
    if not found:
        raise FileNotFoundError(f"no notebooks in {folder}: run steerkit from its clone")
    for prefix in only:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no notebook starts with {prefix!r}; there are {', '.join(names)}")
    return [p for p in found if not only or p.stem.startswith(tuple(only))]


def parameters(path: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`, as papermill reads them."""
    raw = papermill.inspect_notebook(_literal(path))
    try:
        return {name: ast.literal_eval(p["default"]) for name, p in raw.items()}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"{path.stem}: a parameter's default is no Python literal: {raw}"
        ) from error


def overrides(
    path: Path, *, profile: str, model: str | None = None, extra: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What to inject into the notebook: the wanted values that differ from its defaults.

    A notebook without MODEL trains its own and ignores `model`; any other unknown name is an error
    (papermill itself only warns). Text becomes the default's type; a path becomes absolute.
    """
    defaults = parameters(path)
    wanted = {"PROFILE": profile, **(extra or {})}
    if model is not None and "MODEL" in defaults:
        wanted["MODEL"] = model
    for name in wanted:
        if name not in defaults:
            have = ", ".join(defaults) or "none: is a cell tagged `parameters`?"
            raise ValueError(f"{path.stem} has no parameter {name}; it has {have}")
    typed = {name: _typed(name, text, defaults[name]) for name, text in wanted.items()}
    return {name: value for name, value in typed.items() if value != defaults[name]}


def execute(
    path: Path,
    values: Mapping[str, Any],
    *,
    profile: str,
    out: Path,
    figures: Path,
    timeout: int,
    progress: bool = True,
    cwd: Path | None = None,
) -> Outcome:
    """Run one notebook with `values` as parameters, in `cwd` (default: its own folder).

    The executed copy is out/<name>.ipynb, or out/<name>.partial.ipynb after a failure; time, peak
    memory and machine go to figures/<profile>/<name>/run.json. `timeout` is in seconds per cell.
    """
    partial, usage = out / f"{path.stem}.partial.ipynb", out / f"{path.stem}.usage.tmp"
    partial.unlink(missing_ok=True)
    usage.unlink(missing_ok=True)
    start, done = time.perf_counter(), out / path.name
    record = {"notebook": path.stem, "profile": profile, "parameters": values}
    record |= {"machine": machine(), "versions": versions()}
    try:
        with _kernel_environment(figures, usage):
            papermill.execute_notebook(
                _literal(path),
                _literal(partial),
                parameters=dict(values),
                kernel_name="python3",
                cwd=cwd or path.parent,
                execution_timeout=timeout,
                progress_bar=progress,
                # a local kernel warns of plain TCP; the extension writes what the kernel used
                extra_arguments=["--log-level=ERROR", "--ext=steerkit.lab.memory"],
            )
        seconds = round(time.perf_counter() - start, 1)
        record["seconds"] = seconds
        if usage.exists():  # else the kernel died while it ended
            record |= json.loads(usage.read_text(encoding="utf-8"))
        write_json(figures / profile / path.stem / "run.json", record)
        return Outcome(path.stem, seconds, None, partial.replace(done))
    except Exception as failure:  # one notebook's failure must not stop the others
        seconds = round(time.perf_counter() - start, 1)
        return Outcome(path.stem, seconds, _explain(failure, partial), partial)
    finally:
        usage.unlink(missing_ok=True)


def store(executed: Path, committed: Path) -> None:
    """Put an executed notebook in the committed one's place, without what changes at each run."""
    new = nbformat.read(executed, as_version=4)
    old = nbformat.read(committed, as_version=4)
    if [c.source for c in new.cells] != [c.source for c in old.cells]:
        raise ValueError(
            f"{committed.name} was edited while it ran, or has overrides: run it again"
        )
    write_text(committed, stripped(new))


def stripped(notebook: nbformat.NotebookNode) -> str:
    """The notebook's text without times, widget views (they do not survive a file), library
    versions and paths of this machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _is_progress(o)]
    text = nbformat.writes(notebook).replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
    return re.sub(r"/[\w/.]*ipykernel_\d+/\d+\.py", "cell", text) + "\n"


@contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Hold `folders` for this process alone; RuntimeError if another run has one of them.

    The system's file locks end with the process that holds them, so a killed run leaves none.
    """
    with ExitStack() as held:
        for folder in sorted({Path(f).resolve() for f in folders}):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(folder / ".steerkit.lock", timeout=0))
            except Timeout:
                raise RuntimeError(
                    f"another steerkit run is writing into {folder}: wait for it, or give this "
                    "one folders of its own with --out and --figures"
                ) from None
        yield


def machine() -> dict[str, Any]:
    """Cores this process may use, CPU and GPU names, memory in GiB; nothing that names a person."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cores": cores, "cpu": _cpu_name(), "memory_gib": round(memory, 1), "gpu": gpu}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _typed(name: str, text: str, default: Any) -> Any:
    """`text` from the command line as the type of the parameter's default."""
    if default is None or isinstance(default, str):
        # The notebook's working directory is its own, so a path means the user's.
        return str(Path(text).resolve()) if text != default and Path(text).exists() else text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(default, bool) else text)
    except (ValueError, SyntaxError):
        value = text
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if type(value) is not type(default):
        raise ValueError(f"-p {name} {text}: expected {type(default).__name__}, like {default!r}")
    return value


def _literal(path: Path) -> str:
    """papermill fills {names} in paths; ours have none."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _kernel_environment(figures: Path, usage: Path) -> Iterator[None]:
    """What the kernel inherits: where figures and its usage go, this clone's package, no debugger
    warning."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    new = {
        "STEERKIT_FIGURES": str(Path(figures).resolve()),
        USAGE_FILE: str(usage.resolve()),
        "PYTHONPATH": path,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    old = {key: os.environ.get(key) for key in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for key, value in old.items():
            os.environ.pop(key, None)
            os.environ.update({} if value is None else {key: value})


def _explain(failure: Exception, partial: Path) -> str:
    """`cell In [3], "first line": reason`, for a failed cell, a timeout or a dead kernel."""
    if isinstance(failure, PapermillExecutionError):
        source, count = failure.source, failure.exec_count
        reason = f"{failure.ename}: {failure.evalue}"
        if failure.ename == "OutOfMemoryError":
            reason += "; take a smaller --model (steerkit doctor says what it needs) or profile"
    else:
        source, count = _last_started(partial)
        reason = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    line = next((s for s in source.splitlines() if s.strip()), "")
    return f"cell In [{count}], {line.strip()[:60]!r}: {reason}" if source else reason


def _last_started(partial: Path) -> tuple[str, int | None]:
    try:
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # papermill had no room for it
        partial.unlink(missing_ok=True)
        return "", None
    code = [c for c in cells if c["cell_type"] == "code"]
    started = [c for c in code if c["metadata"].get("papermill", {}).get("start_time")]
    if not started:
        return "", None
    return "".join(started[-1]["source"]), started[-1]["execution_count"]


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Widget views and tqdm's bars on stderr."""
    if output.output_type == "stream":
        return output.name == "stderr" and re.search(r"\d+%\||\dit \[", output.text) is not None
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})
