"""Every benchmark runs at small size, and the one table of them keeps what it measured."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from steerkit.files import ROOT

BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(p.stem for p in BENCHMARKS.glob("*.py") if p.stem not in ("collect", "gpu", "table"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a script is started: its folder comes first on the path."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", [*NAMES, "gpu"])
def test_a_script_yields_rows_whose_names_differ(here, name):
    rows = list(runpy.run_path(str(BENCHMARKS / f"{name}.py"))["measure"](True))
    names = [row.what for row in rows]
    assert rows and len(set(names)) == len(names)
    assert all(row.value >= 0 and row.form.format(row.value) for row in rows)
    exact = [row for row in rows if row.goal.startswith("< ")]
    assert all(row.value < float(row.goal[2:]) for row in exact)


def collect(folder: Path, monkeypatch: pytest.MonkeyPatch, only: str) -> dict:
    """Run the collector on a script of one row whose value counts the calls."""
    scope = runpy.run_path(str(BENCHMARKS / "collect.py"))
    calls = []

    def fake(command: list[str], check: bool) -> None:
        calls.append(command)
        row = {"what": "a", "value": 2.0, "shown": "2.0x", "goal": "", "how": command[1][-9:]}
        Path(command[3]).write_text(json.dumps([row]))

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(sys, "argv", ["collect.py", "--only", only, "--out", str(folder)])
    scope["main"]()
    assert [Path(command[1]).stem for command in calls] == [only]
    return json.loads((folder / "results.json").read_text())


def test_the_table_grows_on_one_machine_and_starts_anew_on_another(here, tmp_path, monkeypatch):
    collect(tmp_path, monkeypatch, NAMES[0])
    both = collect(tmp_path, monkeypatch, NAMES[1])
    assert list(both["scripts"]) == NAMES[:2] and both["threads"] == 1
    page = (tmp_path / "results.md").read_text()
    assert page.count("| a | 2.0x |") == 2 and both["machine"]["cpu"] in page
    both["machine"]["cores"] += 1
    (tmp_path / "results.json").write_text(json.dumps(both))
    assert list(collect(tmp_path, monkeypatch, NAMES[0])["scripts"]) == NAMES[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]
