"""Results on disk: paper numbers read, our claims written atomically, and listed in one table."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from steerkit.files import DATA, read_json, write_json

RUNS = "STEERKIT_RUNS"  # environment variable: the folder that replaces runs/
LINE = "{:5} {:8} {:44.44} {:21.21} {:18.18}"  # of the table, 100 columns: the rest is cut


def figures_dir(profile: str, notebook: str) -> Path:
    """Where `notebook` writes under `profile`: runs/<profile>/<notebook> below the current folder.

    `steerkit run` names another folder than runs/ by an environment variable.
    """
    return Path(os.environ.get(RUNS, "runs")) / profile / notebook


def paper_result(key: str) -> dict[str, Any]:
    """One published number: {"value" | "values", "unit", "paper", "where"}; KeyError if unknown."""
    return read_json(DATA / "paper_results.json")[key]


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


def machine() -> dict[str, Any]:
    """The machine of a run: cores that it may use, CPU and GPU names, memory in GiB; nothing that
    names a person."""
    import torch  # here: the command says its --help without it

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cores": cores, "cpu": cpu, "memory_gib": round(memory, 1), "gpu": gpu}


# The table


def read_claims(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every claim in `folders`, one folder for each notebook, whose name is added to each claim."""
    return [
        {"notebook": folder.name} | read_json(file)
        for folder in folders
        for file in sorted(folder.glob("*.claim.json"))
    ]


def claims_table(claims: Iterable[dict[str, Any]]) -> str:
    """One line for each claim, at most 100 columns."""
    lines = [LINE.format("holds", "notebook", "claim", "ours", "paper")]
    for claim in claims:
        holds, number = "yes" if claim["holds"] else "NO", claim["notebook"].partition("_")[0]
        paper = claim["paper"] or {}
        published = paper.get("values", paper.get("value", "-"))
        ours = _short(claim["ours"])
        lines.append(LINE.format(holds, number, claim["claim"], ours, _short(published)))
    return "\n".join(map(str.rstrip, lines))


def _short(value: Any) -> str:
    """Numbers to four significant digits, side by side."""
    if isinstance(value, dict):
        return _short(list(value.values()))
    if isinstance(value, list):
        return " ".join(_short(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
