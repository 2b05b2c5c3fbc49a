"""Killed, out of space, started twice: what was finished stays whole, a rerun ends the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import write_notebook
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.files import write_json
from steerkit.gatt import dialogues as gatt
from steerkit.lab import cli

CLAIM = """from steerkit.results import figures_dir, save_claim
common = dict(paper=None, n=N, interval=None, seeds=[0], profile=PROFILE, model="tiny")
out = figures_dir(PROFILE, "NAME")
save_claim(out, "one", claim="one and one", ours={"sum": 2.0}, holds=1 + 1 == 2, **common)
print("kept")"""
WAIT = """import pathlib, time
pathlib.Path("started").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.05)"""
RUN = "import sys; from pathlib import Path; from steerkit.lab import cli\n" \
      "sys.exit(cli.main(['run', *sys.argv[2:]], root=Path(sys.argv[1])))"  # fmt: skip


def run(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(root), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def claim(root: Path, name: str) -> dict:
    return json.loads((root / "figures" / "cpu" / name / "one.claim.json").read_text())


def debris(root: Path) -> list[str]:
    """Files that a cut write leaves behind."""
    return [p.name for p in root.rglob("*") if p.suffix in {".tmp", ".part"}]


def test_a_killed_run_keeps_what_was_done_and_a_rerun_ends_the_same(root: Path) -> None:
    """Two runs at once, a kill -9 in the second notebook's cell, and a rerun."""
    write_notebook(root, "01_done", [CLAIM.replace("NAME", "01_done")])
    write_notebook(root, "02_cut", [WAIT, CLAIM.replace("NAME", "02_cut")])
    first = run(root)
    wait_for(root / "notebooks" / "started", first)
    second = run(root, "--only", "01")
    assert second.wait() == 2
    assert "another steerkit run is writing into" in second.communicate()[1]
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    first.communicate()

    done = root / "runs" / "cpu" / "01_done.ipynb"
    nbformat.validate(nbformat.read(done, as_version=4))
    kept = claim(root, "01_done")
    assert not (root / "runs" / "cpu" / "02_cut.ipynb").exists()
    assert not (root / "figures" / "cpu" / "02_cut").exists() and debris(root) == []

    (root / "notebooks" / "go").touch()
    assert cli.main(["run"], root=root) == 0
    assert claim(root, "01_done") == kept == claim(root, "02_cut")
    assert not list((root / "runs").rglob("*.partial.ipynb"))


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path, rows = tmp_path / "claim.json", 20_000
    for turn in range(12):
        if not (child := os.fork()):
            try:
                for number in range(10**6):
                    write_json(path, {"number": number, "rows": [number] * rows})
            finally:
                os._exit(1)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.01 + 0.007 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = json.loads(path.read_text())
        assert found["rows"] == [found["number"]] * rows


def test_killed_sampling_goes_on_and_ends_with_the_same_file(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    rngs = [random.Random(i) for i in range(8)]
    plans = [gatt.make_plan(rng, gatt.draw(rng), turns=2) for rng in rngs]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    sample = partial(gatt.sample_dialogues, *tiny, plans, batch=1, max_new_tokens=8)
    samples = sample(out=whole)
    if not (child := os.fork()):
        try:
            sample(out=out)
        finally:
            os._exit(1)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(out.read_bytes()) < len(whole.read_bytes()), "it had finished before the kill"
    assert sample(out=out) == samples
    assert out.read_bytes() == whole.read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_spares_earlier_results(
    root: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second notebook's result does not fit, then the third's own outputs do not."""
    big = 'from steerkit.results import write_json\nwrite_json(out / "big.json", "x" * 2**20)'
    write_notebook(root, "01_fits", [CLAIM.replace("NAME", "01_fits")])
    write_notebook(root, "02_big_result", [CLAIM.replace("NAME", "02_big_result"), big])
    write_notebook(root, "03_big_output", ["print('x' * 2**20)", "print('never stored')"])
    write_notebook(root, "04_fits", ["print('here')"])
    places = ["--out", str(small_disk / "runs"), "--figures", str(small_disk / "figures")]
    assert cli.main(["run", *places], root=root) == 1
    _, second, third = capsys.readouterr().out.split("FAILED ", maxsplit=2)
    full = "OSError: [Errno 28] No space left on device"
    assert second.startswith("02_big_result, cell In [3], ") and full in second
    assert third.startswith(f"03_big_output, {full}\n") and "kept: " not in third.split("4/4")[0]
    for name in ("01_fits", "02_big_result"):
        path = small_disk / "figures" / "cpu" / name / "one.claim.json"
        assert json.loads(path.read_text())["ours"] == {"sum": 2.0}
    for name in ("01_fits", "02_big_result.partial", "04_fits"):
        nbformat.validate(nbformat.read(small_disk / "runs" / f"{name}.ipynb", as_version=4))
    assert not list((small_disk / "runs").glob("03*")) and debris(small_disk) == []
