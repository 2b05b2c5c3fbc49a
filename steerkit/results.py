"""Results on disk: paper numbers read, our claims written atomically, both in one table."""

import difflib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from steerkit.files import data_file, write_json


def figures_dir(profile: str, notebook: str) -> Path:
    """Where `notebook` writes under `profile`: ../figures/<profile>/<notebook>, or the same below
    the folder that the environment variable STEERKIT_FIGURES names (`steerkit run --figures`)."""
    for name in (profile, notebook):
        _refuse_folders(name)
    return Path(os.environ.get("STEERKIT_FIGURES", "../figures")) / profile / notebook


def paper_result(key: str) -> dict[str, Any]:
    """One published number: {"value" | "values", "unit", "paper", "where"}; KeyError if unknown."""
    table = json.loads(data_file("paper_results.json").read_text(encoding="utf-8"))
    if key not in table:
        near = difflib.get_close_matches(key, table, n=3, cutoff=0.3)
        raise KeyError(f"paper result {key!r} is not in data/paper_results.json; near: {near}")
    return table[key]


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
