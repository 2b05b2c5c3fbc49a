"""Results on disk: paper numbers read, our claims written atomically, both in one table."""

import difflib
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent  # the clone: the kit is installed editable


def data_file(name: str) -> Path:
    """Path of `name` in the clone's data/ folder; FileNotFoundError if the clone is not there."""
    path = ROOT / "data" / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: steerkit runs from a clone of its repository; install it there "
            "with `pip install -e .` (or `make run`), not as a wheel"
        )
    return path


def figures_dir(profile: str, notebook: str) -> Path:
    """Where `notebook` writes under `profile`: ../figures/<profile>/<notebook>, or the same below
    the folder that the environment variable STEERKIT_FIGURES names (`steerkit run --figures`)."""
    for name in (profile, notebook):
        _refuse_folders(name)
    return Path(os.environ.get("STEERKIT_FIGURES", "../figures")) / profile / notebook


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader, or a kill, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Like `write_bytes`, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Like `write_text`; tensors and arrays become lists, non-finite numbers "inf", "-inf", "nan"
    (JSON has no word for them; `float("inf")` reads them back)."""
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def paper_result(key: str) -> dict[str, Any]:
    """One published number: {"value" | "values", "unit", "paper", "where"}; KeyError if unknown."""
    table = json.loads(data_file("paper_results.json").read_text(encoding="utf-8"))
    if key not in table:
        near = difflib.get_close_matches(key, table, n=3, cutoff=0.3)
        raise KeyError(f"paper result {key!r} is not in data/paper_results.json; near: {near}")
    return table[key]


def bootstrap(
    values: Tensor, *, block: int = 1, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float] | tuple[Tensor, Tensor, Tensor]:
    """Mean and 95 % percentile interval over the first axis: (N,) -> floats, (N, ...) -> (...).

    The first axis must hold independent things (dialogues, streams, seeds). For tokens of one text
    take a `block` so long that blocks are: (T,) -> means of T // block blocks, NaN left out.
    """
    values = torch.as_tensor(values).double().cpu()
    if block < 1:
        raise ValueError(f"block={block}: expected at least 1")
    if block > 1 and values.ndim:
        values = values[: len(values) // block * block].unflatten(0, (-1, block)).nanmean(1)
        values = values[~values.isnan()]
    if values.ndim == 0 or len(values) < 2:
        raise ValueError(f"values of shape {tuple(values.shape)}: expected at least 2 along axis 0")
    draw = torch.Generator().manual_seed(seed)
    n = len(values)
    means = torch.stack(
        [values[torch.randint(n, (n,), generator=draw)].mean(0) for _ in range(resamples)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    triple = values.mean(0), low, high
    return triple if values.ndim > 1 else tuple(x.item() for x in triple)


def save_claim(
    out: Path,
    name: str,
    *,
    claim: str,
    paper: dict[str, Any] | str | None = None,
    ours: dict[str, Any],
    holds: bool,
    n: int,
    interval: Sequence[float] | None = None,
    seeds: Sequence[int],
    profile: str,
    model: str,
) -> dict[str, Any]:
    """Write out/<name>.claim.json and return it; `holds` is computed by the caller, never typed.

    `paper` is a published number, or its key for `paper_result`.
    """
    _refuse_folders(name)
    row = {
        "claim": claim,
        "paper": paper_result(paper) if isinstance(paper, str) else paper,
        "ours": ours,
        "n": n,
        "interval": interval,
        "seeds": list(seeds),
        "profile": profile,
        "model": model,
        "versions": versions(),
        "holds": bool(holds),
    }
    write_json(Path(out) / f"{name}.claim.json", row)
    return row


def _refuse_folders(name: str) -> None:
    """What is written under a name stays in the folder that it was meant for."""
    if not name or name == ".." or Path(name).name != name:
        raise ValueError(f"name={name!r}: expected a plain file name without folders")


def collect(figures: Path, profile: str, *, since: float = 0.0) -> list[dict[str, Any]]:
    """All claims below figures/<profile>/, by notebook and name, with both added to each dict;
    `since` (seconds of the epoch) leaves out what an earlier run wrote."""
    files = sorted((Path(figures) / profile).glob("*/*.claim.json"))
    return [
        {"notebook": f.parent.name, "name": f.name.removesuffix(".claim.json")}
        | json.loads(f.read_text(encoding="utf-8"))
        for f in files
        if f.stat().st_mtime >= since
    ]


def claims_table(claims: Sequence[dict[str, Any]]) -> Table:
    """The one table at the end of a run: claim | paper | ours | holds?"""
    table = Table(title="Claims", show_lines=True)
    for column in ("notebook", "claim", "paper", "ours", "holds?"):
        table.add_column(column, overflow="fold")
    for row in claims:
        cells = row["notebook"], row["claim"], _paper_cell(row["paper"]), _numbers(row["ours"])
        table.add_row(*cells, "yes" if row["holds"] else "NO")
    return table


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions, as every claim and run record carries them."""
    names = ("steerkit", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: _version(n) for n in names}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def _paper_cell(paper: dict[str, Any] | None) -> str:
    if paper is None:
        return "-"
    numbers = paper.get("values", paper.get("value"))
    where = ", ".join(str(paper[k]) for k in ("paper", "where") if k in paper)
    return f"{_numbers(numbers)}\n({where})" if where else _numbers(numbers)


def _numbers(value: Any) -> str:
    """Short text: four significant digits, `name value` pairs on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_numbers(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_numbers(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
