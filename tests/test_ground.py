"""Packaging agrees with itself: one list of extras, one Python range, one test command."""

import os
import re
import socket
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from steerkit.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)


def makefile_extras() -> set[str]:
    (extras,) = re.findall(r"^EXTRAS = (.+)$", MAKEFILE, re.MULTILINE)
    return set(extras.split(","))


def pip_section() -> list[str]:
    (section,) = (d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))
    return section


def test_conda_environment_installs_the_extras_and_constraints_of_the_makefile():
    (editable,) = (line for line in pip_section() if line.startswith("-e "))
    assert set(editable.removeprefix("-e .[").removesuffix("]").split(",")) == makefile_extras()
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    assert "-c constraints.txt" in pip_section() and "-c constraints.txt" in MAKEFILE
    assert makefile_extras() <= PROJECT["optional-dependencies"].keys()


def test_the_python_range_is_the_same_everywhere():
    low, high = (
        tuple(map(int, v.split("."))) for v in re.findall(r"3\.\d+", PROJECT["requires-python"])
    )
    assert f"python{PROJECT['requires-python']}" in ENVIRONMENT["dependencies"]
    assert f"{low} <= sys.version_info[:2] < {high}" in MAKEFILE
    named = [f"3.{minor}" for minor in range(low[1], high[1])]
    tried = re.search(r"for python in (.+);", MAKEFILE)[1]
    assert sorted(re.findall(r"python(3\.\d+)", tried)) == named


def test_every_dependency_of_every_extra_is_pinned_in_its_range():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(text) for requirements in lists for text in requirements):
        if requirement.name != "steerkit":  # an extra that another one brings along
            assert requirement.specifier.contains(PINS[requirement.name]), requirement
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in PINS.values())
    assert not any(re.match(r"(nvidia-|cuda-|triton)", name) for name in PINS)  # the machine's


def test_ci_runs_the_same_command_as_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (extras,) = re.findall(r"^make test EXTRAS=(\S+)$", script, re.MULTILINE)
    assert set(extras.split(",")) == makefile_extras() | {"browser"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff_agrees(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_bars_are_plain_text_come_after_two_seconds_and_go():
    """tqdm.auto opens eleven widgets a bar, shown or not, and nbval loses messages behind them."""
    sources = [path.read_text() for path in (ROOT / "steerkit").rglob("*.py")]
    assert not [text for text in sources if re.search(r"tqdm\.(auto|notebook)", text)]
    bars = [bar for text in sources for bar in re.findall(r"\btqdm\((.+?)\)[:\n]", text, re.DOTALL)]
    assert bars and all("delay=2" in bar and "leave=False" in bar for bar in bars)


def test_no_test_reaches_beyond_this_machine():
    with pytest.raises(ConnectionRefusedError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "without a network" in child.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_files_that_exist(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    named = re.findall(r"`((?:steerkit|tests|data|docs|notebooks|benchmarks)/[\w./-]*)`", text)
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert missing + [path for path in named if not (ROOT / path).exists()] == []
    assert links or named


def test_the_version_is_the_same_everywhere():
    headings = re.findall(r"^## (\S+), ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] in headings
