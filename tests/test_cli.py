"""`steerkit run` and its fellows, on throw-away notebooks below the current folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import PARAMETERS, write_notebook

from steerkit.files import NOTEBOOKS, ROOT
from steerkit.lab import cli, runner
from steerkit.results import claims_table, read_claims

CLAIM = """from steerkit.results import figures_dir, save_claim
common = dict(paper=None, n=N, interval=None, seeds=[0], profile=PROFILE, model="tiny")
out = figures_dir(PROFILE, "NAME")
save_claim(out, "one", claim="one and one", ours={"sum": 2.0}, holds=N == 2, **common)"""


BUSY = "import time\nwhile time.process_time() < 2: pass"  # CPU seconds of the kernel itself


def claim(name: str) -> str:
    return CLAIM.replace("NAME", name)


def output_of(path: Path) -> list[str]:
    """Text that each code cell of an executed notebook printed."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]


def test_run_executes_records_and_ends_with_the_table(root, make_notebook, capsys):
    make_notebook("01_good", ["import os\nprint(os.getcwd())", BUSY, claim("01_good")])
    assert cli.main(["run", "--profile", "smoke", "-p", "N", "3"]) == 0
    assert re.search(r"^NO +01 +one and one +2 +-", capsys.readouterr().out, re.MULTILINE)
    *_, folder, _, _ = output_of(root / "runs" / "smoke" / "01_good.ipynb")
    assert Path(folder.strip()) == root / "notebooks"
    results = root / "runs" / "smoke" / "01_good"
    assert sorted(path.name for path in results.iterdir()) == ["one.claim.json", "run.json"]
    record = json.loads((results / "run.json").read_text())
    assert 2 < record["cpu_seconds"] < record["seconds"]
    assert record["parameters"] == {"PROFILE": "smoke", "N": 3}
    assert record["machine"].keys() == {"cores", "cpu", "memory_gib", "gpu"}


def test_the_table_has_one_line_a_claim_and_fits_100_columns():
    claims = read_claims(sorted((ROOT / "figures" / "cpu").glob("*/")))
    title, *lines = claims_table(claims).splitlines()
    assert len(lines) == len(claims) > 30 and max(map(len, lines)) <= 100
    assert title.split() == ["holds", "notebook", "claim", "ours", "paper"]
    for line, row in zip(lines, claims, strict=True):
        assert line.split()[:2] == ["yes" if row["holds"] else "NO", row["notebook"][:2]]
        assert row["claim"][:43] in line


def test_a_run_changes_nothing_that_git_follows_and_store_does(root):
    """A participant who lowers a number, by the command and by hand; then the author, twice."""
    noisy = "import sys, steerkit\nprint(steerkit.__file__)\nprint('  5%|x', file=sys.stderr)"
    widget = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass\nprint('end')"
    path = write_notebook(root, "01", [claim("01"), noisy, widget, "1 + 1"])
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata = collapsed = {"jupyter": {"source_hidden": True}}
    nbformat.write(notebook, path)
    (root / ".gitignore").write_text((ROOT / ".gitignore").read_text())

    def git(*arguments: str) -> list[str]:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [line.split()[-1] for line in done.stdout.splitlines()]

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "kit")
    assert cli.main(["run", "-p", "N", "1"]) == 0
    copy = root / "runs" / "by_hand.ipynb"
    papermill.execute_notebook(str(path), str(copy), cwd=path.parent, progress_bar=False)
    assert git("status", "-s", "-uall") == []

    assert cli.main(["run", "--store"]) == 0
    figures = [f"figures/cpu/01/{name}.json" for name in ("one.claim", "run")]
    assert sorted(git("status", "-s", "-uall")) == [*figures, "notebooks/01.ipynb"]
    first = path.read_text()
    notebook = nbformat.reads(first, as_version=4)
    assert output_of(path) == ["", "", "steerkit/__init__.py\n", "end\n", ""]
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4, 5]
    assert notebook.cells[4].outputs[0].data == {"text/plain": "2"}
    metadata = [{"tags": ["parameters"]}, collapsed, {}, {}, {}]
    assert [cell.metadata for cell in notebook.cells] == metadata
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert cli.main(["run", "--store"]) == 0
    assert path.read_text() == first


def test_a_failure_is_named_and_loses_no_older_results(root, make_notebook, capsys):
    make_notebook("01_bad", ["print('before')", "# why\nvalue = 1 / (N - 2)", claim("01_bad")])
    make_notebook("02_good", [claim("02_good")])
    assert cli.main(["run", "--only", "01", "-p", "N", "3"]) == 0
    assert cli.main(["run"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED 01_bad, cell In [3], '# why': ZeroDivisionError: division by zero" in printed
    runs = root / "runs"
    assert output_of(runs / "partial" / "cpu" / "01_bad.ipynb")[1:] == ["before\n", "", ""]
    old, new = (
        json.loads((runs / "cpu" / name / "one.claim.json").read_text())["n"]
        for name in ("01_bad", "02_good")
    )
    assert (old, new) == (3, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("time.sleep(60)", "CellTimeoutError: A cell timed out"),
        ("os._exit(1)", "DeadKernelError: Kernel died"),
    ],
)
def test_a_kernel_that_hangs_or_dies_is_named(root, make_notebook, monkeypatch, source, message):
    path = make_notebook("01", ["import os, time", source])
    monkeypatch.setitem(runner.CELL_TIMEOUT, "cpu", 2)
    start = time.perf_counter()
    assert message in runner.execute(path, {}, "cpu", root / "runs").error
    assert time.perf_counter() - start < 40


def test_a_run_that_ends_early_keeps_what_was_done_and_leaves_no_kernel(root):
    """By Ctrl-C in a terminal, which all processes of the run get."""
    wait = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))"
    wait += "\nif N == 2: time.sleep(60)"
    write_notebook(root, "01_done", [claim("01_done")])
    write_notebook(root, "02_cut", [claim("02_cut"), wait])
    command = [sys.executable, "-m", "steerkit", "run"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (pid := root / "notebooks" / "pid").exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "steerkit run: interrupted" and "Traceback" not in error
    assert not Path("/proc", pid.read_text()).exists()
    runs = root / "runs" / "cpu"
    assert sorted(path.name for path in runs.iterdir()) == ["01_done", "01_done.ipynb"]
    assert json.loads((runs / "01_done" / "one.claim.json").read_text())["holds"]
    nbformat.validate(nbformat.read(runs / "01_done.ipynb", as_version=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "07"], "starts with '07'; there are ['01_good', '02_plain']"),
        (
            ["-p", "TEXT", "x"],
            "01_good has no parameter TEXT; its cell tagged `parameters` has ['PROFILE'",
        ),
        (["-p", "N", "many"], "-p N many: expected int, like 2"),
        (["-p", "BOOK", "book.txt"], "-p BOOK book.txt: no such file or folder"),
        (["--model", "/nowhere"], "/nowhere: no such directory, and no embedded model"),
        (["--out", "notebooks/01_good.ipynb"], "notebooks/01_good.ipynb"),
        (["--store", "-p", "N", "3"], "--store commits a profile's default run"),
        (["--only", "02"], "02_plain has no parameter PROFILE; its cell tagged"),
    ],
)
def test_wrong_requests_run_nothing(root, make_notebook, capsys, arguments, message):
    parameters = f'{PARAMETERS}\nMODEL: str = "tiny"  # whose\nBOOK: str = ""  # a file'
    make_notebook("01_good", [claim("01_good")], parameters=parameters)
    make_notebook("02_plain", [], parameters="")
    if "--only" not in arguments:
        arguments += ["--only", "01"]
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (root / "runs").exists()


def test_parameters_keep_their_type_and_defaults_are_not_injected(root, make_notebook):
    parameters = (
        'PROFILE: str = "cpu"  # which\nMODEL: str = "tiny"  # what\nTEXT: str = ""  # a file\n'
        "RATE: float = 0.5  # how fast\nFAST: bool = False  # or not"
    )
    path = make_notebook("01", [], parameters=parameters)
    text = root / "book.txt"
    text.touch()
    extra = [("TEXT", "book.txt"), ("RATE", "2"), ("FAST", "true")]
    values = runner.overrides(path, "cpu", "org/name", extra)
    assert values == {"MODEL": "org/name", "TEXT": str(text), "RATE": 2.0, "FAST": True}
    assert runner.overrides(path, "cpu", "tiny", [("RATE", "0.5")]) == {}


def test_store_refuses_a_notebook_that_was_edited_meanwhile(root, make_notebook):
    path = make_notebook("01", ["1"])
    executed = path.rename(root / "executed.ipynb")
    make_notebook("01", ["2"])
    outcome = runner.Outcome("01", None, executed, root)
    with pytest.raises(ValueError, match="edited while it ran"):
        runner.store(outcome, path, root / "figures")


def test_notebooks_are_copied_once_and_the_copies_are_the_ones_that_run(root, monkeypatch, capsys):
    assert runner.find_notebooks(["00"])[0].parent == NOTEBOOKS
    assert cli.main(["notebooks", "course"]) == 0
    copies = sorted((root / "course").glob("*.ipynb"))
    assert [json.loads(path.read_text()) for path in copies] == [
        json.loads(path.read_text().replace("](../", "]("))
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ]
    copies[1].write_text(worked_on := copies[1].read_text().replace("1", "2", 1))
    assert cli.main(["notebooks", "course"]) == 2
    assert f"course/{copies[1].name} exists and differs" in capsys.readouterr().err
    assert copies[1].read_text() == worked_on
    monkeypatch.chdir(root / "course")
    assert runner.find_notebooks() == copies
