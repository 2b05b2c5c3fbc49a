"""`steerkit run` and `doctor`, on throw-away notebooks in an empty kit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from conftest import NotebookMaker
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.files import ROOT
from steerkit.lab import cli, memory, runner

CLAIM = """import os, pathlib
from steerkit.results import figures_dir, save_claim
common = dict(paper=None, n=N, interval=None, seeds=[0], profile=PROFILE, model="tiny")
out = figures_dir(PROFILE, "NAME")
save_claim(out, "one", claim="one and one", ours={"sum": 2.0}, holds=1 + 1 == 2, **common)"""


def claim(name: str) -> str:
    return CLAIM.replace("NAME", name)


def output_of(path: Path) -> list[str]:
    """Text that each code cell of an executed notebook printed."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]


def test_run_executes_records_and_ends_with_the_table(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    half = (
        "from steerkit.lab.memory import peak\nprint(peak()['peak_gib'])\nhalf = bytearray(2**29)"
    )
    cells = ["import os\nprint(os.path.basename(os.getcwd()))", half, claim("01_good")]
    make_notebook("01_good", cells)
    assert cli.main(["run", "--profile", "smoke"], root=root) == 0
    printed = capsys.readouterr().out
    assert "one and one" in printed and "holds?" in printed and "yes" in printed
    *_, where, before, _ = output_of(root / "runs" / "smoke" / "01_good.ipynb")
    assert where == "notebooks\n"
    record = json.loads((root / "figures" / "smoke" / "01_good" / "run.json").read_text())
    assert 0 < record["cpu_seconds"] < record["seconds"] and record["parameters"] == {
        "PROFILE": "smoke"
    }
    assert record["machine"].keys() == {"cores", "cpu", "memory_gib", "gpu"}
    assert record["memory"]["peak_gib"] == pytest.approx(float(before) + 0.5, abs=0.05)
    assert record["memory"].keys() == {"peak_gib", "gpu_peak_gib"}
    assert list(root.rglob("*.tmp")) == []


def test_a_failure_is_named_kept_and_does_not_stop_the_others(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_notebook("01_bad", ["print('before')", "# why\nvalue = 1 / (N - 2)", "print('never')"])
    make_notebook("02_good", [claim("02_good")])
    assert cli.main(["run"], root=root) == 1
    printed = capsys.readouterr().out
    assert "FAILED 01_bad, cell In [3], '# why': ZeroDivisionError: division by zero" in printed
    assert "one and one" in printed
    kept = output_of(root / "runs" / "cpu" / "01_bad.partial.ipynb")
    assert "before\n" in kept and "never\n" not in kept
    assert not (root / "runs" / "cpu" / "01_bad.ipynb").exists()
    assert (root / "runs" / "cpu" / "02_good.ipynb").exists()


def test_a_stuck_cell_ends_at_its_timeout_and_is_named(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_notebook("01_stuck", ["import time", "time.sleep(60)"])
    start = time.perf_counter()
    assert cli.main(["run", "--timeout", "2"], root=root) == 1
    assert time.perf_counter() - start < 40
    assert "cell In [3], 'time.sleep(60)': CellTimeoutError" in capsys.readouterr().out


def test_a_notebook_that_runs_out_of_memory_says_what_to_lower(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_notebook("01_big", ["import torch", "raise torch.OutOfMemoryError('CUDA: 2 GiB')"])
    assert cli.main(["run"], root=root) == 1
    assert "OutOfMemoryError: CUDA: 2 GiB; take a smaller --model" in capsys.readouterr().out


def test_a_dead_kernel_is_named(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_notebook("01_dead", ["import os", "os._exit(1)"])
    assert cli.main(["run"], root=root) == 1
    assert "'os._exit(1)': DeadKernelError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "07"], "no notebook starts with '07'; there are 01_good"),
        (["-p", "TEXT", "x"], "01_good has no parameter TEXT; it has PROFILE, N"),
        (["-p", "N", "many"], "-p N many: expected int, like 2"),
        (["-p", "N", "2.5"], "-p N 2.5: expected int, like 2"),
        (["--model", "tiny"], "none of the chosen notebooks has a parameter MODEL"),
        (["--timeout", "0"], "--timeout 0: expected at least 1 second"),
        (["--save", "-p", "N", "3"], "--save stores the default run"),
        (["--save", "--profile", "smoke"], "--save stores the default run"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(
    root: Path,
    make_notebook: NotebookMaker,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_notebook("01_good", [claim("01_good")])
    assert cli.main(["run", *arguments], root=root) == 2
    assert message in capsys.readouterr().err
    assert not (root / "runs").exists() and not (root / "figures").exists()


def test_unknown_profiles_and_commands_are_refused(root: Path) -> None:
    for arguments in (["run", "--profile", "huge"], ["fly"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments, root=root)


def test_a_folder_without_notebooks_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run"], root=root) == 2
    assert f"no notebooks in {root / 'notebooks'}" in capsys.readouterr().err


def test_a_notebook_without_parameters_cell_is_named(root: Path) -> None:
    path = root / "notebooks" / "01.ipynb"
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": kernel}), path)
    with pytest.raises(ValueError, match=r"no parameter PROFILE; it has none: is a cell tagged"):
        runner.overrides(path, profile="cpu")


def test_parameters_keep_their_type_and_defaults_are_not_injected(
    tmp_path: Path, make_notebook: NotebookMaker
) -> None:
    parameters = (
        'PROFILE: str = "cpu"  # which\nMODEL: str = "tiny"  # what\nTEXT: str = ""  # a file\n'
        "RATE: float = 0.5  # how fast\nFAST: bool = False  # or not"
    )
    path = make_notebook("01", [], parameters=parameters)
    text = tmp_path / "book.txt"
    text.touch()
    relative = os.path.relpath(text)
    extra = {"TEXT": relative, "RATE": "2", "FAST": "true"}
    values = runner.overrides(path, profile="cpu", model="org/name", extra=extra)
    assert values == {"MODEL": "org/name", "TEXT": str(text), "RATE": 2.0, "FAST": True}
    assert runner.overrides(path, profile="cpu", model="tiny", extra={"RATE": "0.5"}) == {}


def test_injected_values_reach_the_notebook(root: Path, make_notebook: NotebookMaker) -> None:
    make_notebook("01", ["print(PROFILE, N + 1)"])
    assert cli.main(["run", "--profile", "smoke", "-p", "N", "41"], root=root) == 0
    assert "smoke 42\n" in output_of(root / "runs" / "smoke" / "01.ipynb")


def test_figures_and_out_can_lie_elsewhere(
    root: Path, tmp_path: Path, make_notebook: NotebookMaker
) -> None:
    make_notebook("01", [claim("01")])
    out, figures = tmp_path / "{out}", tmp_path / "elsewhere"
    assert cli.main(["run", "--out", str(out), "--figures", str(figures)], root=root) == 0
    assert (out / "01.ipynb").exists()
    assert (figures / "cpu" / "01" / "one.claim.json").exists()
    assert not (root / "runs").exists() and not (root / "figures").exists()


def test_a_second_run_into_the_same_folder_is_refused(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_notebook("01", [])
    with runner.exclusive(root / "figures" / "cpu"):
        assert cli.main(["run"], root=root) == 2
    assert "another steerkit run is writing into" in capsys.readouterr().err
    assert cli.main(["run"], root=root) == 0


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from steerkit.lab.runner import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another steerkit run"), runner.exclusive(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with runner.exclusive(tmp_path):
        pass


def test_save_stores_outputs_without_what_changes_at_each_run(
    root: Path, make_notebook: NotebookMaker
) -> None:
    noisy = "import sys, steerkit\nprint(steerkit.__file__)\nprint('  5%|x', file=sys.stderr)"
    widget = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass\nprint('end')"
    path = make_notebook("01", [noisy, widget, "1 + 1"])
    assert cli.main(["run", "--save"], root=root) == 0
    first = path.read_text()
    notebook = nbformat.reads(first, as_version=4)
    assert [c.execution_count for c in notebook.cells] == [1, 2, 3, 4]
    assert output_of(path) == ["", "steerkit/__init__.py\n", "end\n", ""]
    assert notebook.cells[3].outputs[0].data == {"text/plain": "2"}
    assert all(c.metadata in ({}, {"tags": ["parameters"]}) for c in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert papermill.inspect_notebook(str(path))["N"]["default"] == "2"
    assert cli.main(["run", "--save"], root=root) == 0
    assert path.read_text() == first


def test_save_refuses_a_notebook_that_was_edited_meanwhile(
    tmp_path: Path, make_notebook: NotebookMaker
) -> None:
    path = make_notebook("01", ["1"])
    executed = path.rename(tmp_path / "executed.ipynb")
    make_notebook("01", ["2"])
    with pytest.raises(ValueError, match="edited while it ran"):
        runner.store(executed, path)


def test_doctor_says_what_is_here_and_what_is_missing(
    root: Path, make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"], root=root) == 1
    printed = capsys.readouterr().out
    for word in ("torch", "transformers", "cores", "memory_gib", "device", "smoke", "cpu"):
        assert word in printed
    assert f"missing: {root / 'notebooks'} holds no notebooks" in printed
    make_notebook("01", [])
    cli.main(["doctor"], root=root)
    assert "holds no notebooks" not in capsys.readouterr().out


@pytest.mark.parametrize(("free", "fitting"), [(None, 0), (10, 2), (60, 4)])
def test_doctor_says_which_models_fit_into_the_gpus_free_memory(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int | None,
    fitting: int,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: free is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    cli.main(["doctor", "--model", "tiny"], root=root)
    printed = " ".join(capsys.readouterr().out.split())
    assert "computed, not measured" in printed and "Qwen2.5-7B" in printed and "tiny" in printed
    assert printed.count("(fits)") == fitting
    assert printed.count("(does not fit)") == (0 if free is None else 4 - fitting)
    assert (f"{free} of 80 GiB free" if free else "torch sees no CUDA device") in printed


def test_computed_weights_and_cache_are_what_a_model_holds(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, ids = tiny[0], torch.arange(60).view(3, 20)
    held = model(ids, use_cache=True).past_key_values
    want = memory.need(model.config, rows=3, tokens=20, size=4)
    cache = sum(x.nbytes for layer in held.layers for x in (layer.keys, layer.values))
    assert want.cache == cache / 2**30
    assert want.weights == sum(p.nbytes for p in model.parameters()) / 2**30
    assert memory.need(memory.qwen("0.5B")).billions == 0.494032768  # as the checkpoint has them


def test_python_m_steerkit_is_the_command() -> None:
    command = [sys.executable, "-m", "steerkit", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for option in ("--profile", "--only", "--model", "--out", "--figures", "--timeout", "--save"):
        assert option in done.stdout
