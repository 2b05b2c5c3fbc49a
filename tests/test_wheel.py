"""The wheel of a clean clone, installed where no clone is, brings models and notebooks along."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from steerkit.files import ROOT


def links_of(folder: Path) -> set[str]:
    """Files that the notebooks in a folder link to, as written there."""
    cells = [
        cell
        for path in folder.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return set(re.findall(r"\]\((?!https?:)([^)#\s]+)", text))


@pytest.mark.first(50)
def test_a_wheel_brings_models_and_notebooks_and_they_run(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "no_network")}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clone, new = tmp_path / "clone", tmp_path / "venv"
    for name in run("git", "ls-files", cwd=ROOT).splitlines():  # what git does not know is left out
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, clone)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(clone)

    # A new environment that sees the packages of this one, but not the kit in it.
    venv.create(new, with_pip=False)
    python, steerkit = new / "bin" / "python", new / "bin" / "steerkit"
    (packages,) = new.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    run(*pip, "--python", python, "install", "--no-deps", "--ignore-installed", wheel)

    load = "import steerkit; steerkit.load('tiny'); print(steerkit.__file__)"
    assert Path(run(python, "-c", load).strip()).is_relative_to(packages)
    run(steerkit, "notebooks", "course")
    course = tmp_path / "course"
    links = links_of(course)
    assert {Path(link).suffix for link in links} >= {".ipynb", ".md", ".svg"}
    assert [link for link in links if not (course / link).exists()] == []
    printed = run(steerkit, "run", "--only", "00", "--profile", "smoke", cwd=course)
    assert "runs/smoke" in printed
    record = json.loads((course / "runs" / "smoke" / "00_start_here" / "run.json").read_text())
    assert record["versions"]["steerkit"] != "not installed"
    assert (course / "runs" / "smoke" / "00_start_here.ipynb").exists()
