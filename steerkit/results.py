"""Results on disk: paper numbers read, our claims written atomically."""

import difflib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from steerkit.files import read_data, write_json

RUNS = "STEERKIT_RUNS"  # environment variable: the folder that replaces runs/


def figures_dir(profile: str, notebook: str) -> Path:
    """Where `notebook` writes under `profile`: runs/<profile>/<notebook> below the current folder.

    `steerkit run` names another folder than runs/ by an environment variable.
    """
    for name in (profile, notebook):
        refuse_folders(name)
    return Path(os.environ.get(RUNS, "runs")) / profile / notebook


def paper_result(key: str) -> dict[str, Any]:
    """One published number: {"value" | "values", "unit", "paper", "where"}; KeyError if unknown."""
    table = read_data("paper_results.json")
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
    refuse_folders(name)
    record = {
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
    write_json(Path(out) / f"{name}.claim.json", record)
    return record


def refuse_folders(name: str) -> None:
    """What is written under a name stays in the folder that it was meant for."""
    if not name or name == ".." or Path(name).name != name:
        raise ValueError(f"name={name!r}: expected a plain file name without folders")


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions, as every claim and run record carries them."""
    names = ("steerkit", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}
