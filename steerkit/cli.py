"""The command `steerkit`: run the notebooks, say what this machine can do."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from steerkit.results import ROOT, claims_table, collect, data_file, versions

if TYPE_CHECKING:
    from steerkit.runner import Outcome

GIB = 2**30
EXAMPLES = """examples:
  steerkit run                                  every notebook on the embedded model
  steerkit run --profile smoke                  the same code at small n, about a minute each
  steerkit run --only 04 -p TEXT book.txt       one notebook, on a text of your own
  steerkit run --profile gpu --model DIR_OR_ID  a real checkpoint on a CUDA GPU
  steerkit student --out workshop               copies for students, and the answer key
  steerkit check workshop/student/04*.ipynb     which exercises of a student's copy are right
  steerkit doctor                               versions, device, memory, what each profile can do
"""


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Exit code: 0 done, 1 a notebook failed or something is missing, 2 a wrong request."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args, root, Console())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"steerkit {args.name}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerkit",
        description="Notebooks that reproduce results about steering a model's attention.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=versions()["steerkit"])
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="execute notebooks, end with one table of claims")
    run.set_defaults(command=_run)
    add = run.add_argument
    add("--profile", default="cpu", choices=("smoke", "cpu", "gpu"), help="how much (default cpu)")
    add("--only", nargs="+", default=(), metavar="NAME", help="notebooks by prefix: 04")
    add("--model", metavar="ID_OR_DIR", help="hub id or folder; default: the embedded model")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    add("--out", type=Path, help="executed notebooks (default runs/<profile>/)")
    add("--figures", type=Path, help="figures and claims (default figures/, in <profile>/<name>/)")
    add("--timeout", type=int, metavar="S", help="seconds per cell (default by profile)")
    add("--save", action="store_true", help="authors: store the outputs in the notebooks")
    student = commands.add_parser("student", help="write student copies and an answer key")
    student.set_defaults(command=_student)
    student.add_argument("--out", type=Path, required=True, help="gets student/ and answers/")
    student.add_argument("--only", nargs="+", default=(), metavar="NAME", help="by prefix: 04")
    check = commands.add_parser("check", help="say which exercises of a student's copy are right")
    check.set_defaults(command=_check)
    check.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    check.add_argument("--profile", default="smoke", choices=("smoke", "cpu", "gpu"))
    check.add_argument("--timeout", type=int, metavar="S", help="seconds per cell")
    doctor = commands.add_parser("doctor", help="versions, device, memory, what profiles can do")
    doctor.set_defaults(command=_doctor)
    return parser


def _run(args: argparse.Namespace, root: Path, console: Console) -> int:
    try:
        from steerkit import runner
    except ImportError as error:
        raise RuntimeError(f"{error}; install with `pip install -e .[notebooks]`") from error
    plans = _plans(args, root)
    out = args.out or root / "runs" / args.profile
    figures = args.figures or root / "figures"
    timeout = args.timeout or runner.CELL_TIMEOUT[args.profile]
    options = {"profile": args.profile, "out": out, "figures": figures, "timeout": timeout}
    start, outcomes = time.time(), []
    with runner.exclusive(out, figures / args.profile):
        for path, values in plans.items():
            position = f"{len(outcomes) + 1}/{len(plans)}"
            console.print(f"{position} {path.stem} ({args.profile})", style="bold", highlight=False)
            outcomes.append(runner.execute(path, values, **options))
            _report(outcomes[-1], console)
            if args.save and outcomes[-1].error is None:
                runner.store(outcomes[-1].executed, path)
    console.print(claims_table(collect(figures, args.profile, since=start)))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        _report(outcome, console)
    return 1 if failed else 0


def _plans(args: argparse.Namespace, root: Path) -> dict[Path, dict[str, Any]]:
    """Notebook -> values to inject; everything that can be wrong is found before the first runs."""
    from steerkit import runner

    if args.timeout is not None and args.timeout < 1:
        raise ValueError(f"--timeout {args.timeout}: expected at least 1 second")
    notebooks = runner.find(root / "notebooks", args.only)
    wanted = {"profile": args.profile, "model": args.model, "extra": dict(args.p)}
    plans = {path: runner.overrides(path, **wanted) for path in notebooks}
    if args.model and not any("MODEL" in runner.parameters(path) for path in notebooks):
        raise ValueError("--model: none of the chosen notebooks has a parameter MODEL")
    if args.save and (any(plans.values()) or args.figures):
        raise ValueError("--save stores the default run: not with other parameters or figures")
    return plans


def _report(outcome: "Outcome", console: Console) -> None:
    if outcome.error is None:
        console.print(f"  done in {outcome.seconds:.0f} s", style="green")
    else:
        text = f"FAILED {outcome.notebook}, {outcome.error}\n  kept: {outcome.executed}"
        console.print(text, style="red", markup=False, soft_wrap=True)


def _student(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit import runner, student

    for path in student.write_copies(runner.find(root / "notebooks", args.only), args.out):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return 0


def _check(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit import runner, student

    timeout = args.timeout or runner.CELL_TIMEOUT[args.profile]
    verdicts = student.grade(args.notebook, profile=args.profile, timeout=timeout)
    for verdict in verdicts:
        line = f"Exercise {verdict.number}: {verdict.state}"
        style = "green" if verdict.state == student.RIGHT else "red"
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(verdict.state == student.RIGHT for verdict in verdicts) else 1


def _doctor(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit.runner import machine

    here, missing = machine(), _missing(root)
    table = Table(title="This machine", show_header=False)
    for name, value in {**versions(), **here}.items():
        table.add_row(name, str(value))
    table.add_row("device", "cuda" if torch.cuda.is_available() else "cpu")
    console.print(table)
    profiles = Table("profile", "here", title="Profiles")
    ready = "no: see below" if missing else "yes"
    profiles.add_row("smoke", f"{ready}; small n, about a minute a notebook")
    profiles.add_row("cpu", f"{ready}; the embedded model, at most 5 minutes a notebook on 2 cores")
    profiles.add_row("gpu", _gpu_line())
    console.print(profiles)
    for line in missing:
        console.print(f"missing: {line}", style="red", markup=False, soft_wrap=True)
    return 1 if missing else 0


def _missing(root: Path) -> list[str]:
    wanted = ("papermill", "ipykernel", "matplotlib", "ipywidgets")
    absent = [p for p in wanted if importlib.util.find_spec(p) is None]
    lines = [f"{', '.join(absent)}: `pip install -e .[notebooks]`"] if absent else []
    if not any((root / "notebooks").glob("*.ipynb")):
        lines.append(f"{root / 'notebooks'} holds no notebooks: run from a clone")
    try:
        data_file("tiny")
    except FileNotFoundError as error:
        lines.append(str(error))
    return lines


def _gpu_line() -> str:
    if not torch.cuda.is_available():
        return "no: torch sees no CUDA device"
    free, total = torch.cuda.mem_get_info()
    billions = 0.8 * free / 2e9  # two bytes a parameter, a fifth left for cache and activations
    return (
        f"yes; {free / GIB:.0f} of {total / GIB:.0f} GiB free, a model of up to "
        f"{billions:.1f} B parameters in bfloat16"
    )
