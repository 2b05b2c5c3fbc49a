"""Run the benchmarks one after another: one table of ratios, with the machine beside it.

    python benchmarks/collect.py [--only NAME ...] [--quick] [--out FOLDER]

Writes FOLDER/results.json and results.md (default: here; with --quick runs/bench) after each
script, so a run that was cut goes on with --only. Results of another machine or other versions are
replaced, not mixed. `make bench` calls this.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from table import HERE

from steerkit.files import write_json, write_text
from steerkit.results import machine, versions

NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("collect", "gpu", "table"))


def measure(name: str, *, quick: bool, out: Path) -> dict[str, Any]:
    """One script in a process of its own; its rows, minutes, and the load before and after."""
    part, start, load = out / f"{name}.json.tmp", time.perf_counter(), os.getloadavg()[0]
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(part)]
    try:
        subprocess.run(command + ["--quick"] * quick, check=True)
        rows = json.loads(part.read_text(encoding="utf-8"))
    finally:
        part.unlink(missing_ok=True)
    minutes = round((time.perf_counter() - start) / 60, 1)
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    return {"date": time.strftime("%Y-%m-%d"), "minutes": minutes, "load": loads, "rows": rows}


def page(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    here, used = results["machine"], results["versions"]
    lines = [
        "# Ratios, measured side by side",
        "",
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, GPU {here['gpu']}; "
        f"torch {used['torch']}, transformers {used['transformers']}; {results['threads']} thread. "
        "Medians of interleaved rounds, on the clock of the one thread.",
    ]
    for name, script in results["scripts"].items():
        about = "{date}, {minutes} minutes, load {load[0]} to {load[1]}".format(**script)
        lines += ["", f"## {name} ({about})", "", "| what | measured | goal | times behind it |"]
        lines += ["|---|---|---|---|"]
        for row in script["rows"]:
            goal = row["goal"] if met(row) else f"{row['goal']} **missed**"
            lines.append(f"| {row['what']} | {row['shown']} | {goal} | {row['how']} |")
    return "\n".join(lines) + "\n"


def met(row: dict[str, Any]) -> bool:
    """Is the number, before it was rounded, on the goal's side (">= 3x", "< 1e-5", or no goal)?"""
    if not row["goal"].startswith((">", "<")):
        return True
    limit = float(re.search(r"[\d.e-]+", row["goal"])[0])
    return row["value"] >= limit if row["goal"].startswith(">") else row["value"] <= limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small sizes, only to try it out")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="gets results.json, results.md")
    options = parser.parse_args()
    out = options.out or (HERE.parent / "runs" / "bench" if options.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "versions": versions(), "threads": 1, "scripts": {}}
    if (out / "results.json").exists():
        old = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if old == results | {"scripts": old["scripts"]}:
            results = old
    for name in options.only:
        print(f"\n{name}", flush=True)
        done = {name: measure(name, quick=options.quick, out=out)}
        results["scripts"] = dict(sorted((results["scripts"] | done).items()))
        write_json(out / "results.json", results)
        write_text(out / "results.md", page(results))
    print(f"\n{out / 'results.md'}")


if __name__ == "__main__":
    main()
