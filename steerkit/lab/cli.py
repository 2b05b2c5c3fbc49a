"""Run notebooks that reproduce results about steering a model's attention; make a class's copies.

examples:
  steerkit run                                  every notebook on the embedded models
  steerkit run --profile smoke                  the same code at small n, about a minute each
  steerkit run --only 04 -p TEXT book.txt       one notebook, on a text of your own
  steerkit run --profile gpu --model DIR_OR_ID  a real checkpoint on a CUDA GPU
  steerkit notebooks course                     copies of the notebooks, to work in
  steerkit student workshop                     copies without solutions, and the answer key
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steerkit.files import NOTEBOOKS
from steerkit.results import claims_table, read_claims, versions

PROFILES = ("smoke", "cpu", "gpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a failed notebook, 2 a wrong request, 130 Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return COMMANDS[args.name](args)
    except (ValueError, OSError, ImportError) as error:
        hint = "; pip install 'steerkit[notebooks]'" if isinstance(error, ImportError) else ""
        print(f"steerkit {args.name}: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"steerkit {args.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerkit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=str(versions()))
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute notebooks, end with one table of claims")
    run.add_argument("--profile", default="cpu", choices=PROFILES, help="how much (default: cpu)")
    run.add_argument("--model", metavar="ID_OR_DIR", help="default: the embedded models")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--out", type=Path, default=Path("runs"), help="default: runs")
    run.add_argument("--store", action="store_true", help="authors: commit outputs and figures/")

    notebooks = commands.add_parser("notebooks", help="copy the notebooks into a folder")
    student = commands.add_parser("student", help="write student copies and an answer key")
    for command in (notebooks, student):
        command.add_argument("folder", type=Path)
    for command in (run, student):
        command.add_argument("--only", nargs="+", default=(), metavar="NAME", help="by prefix: 04")

    return parser


def _run(args: argparse.Namespace) -> int:
    from steerkit.lab import runner

    paths = runner.find_notebooks(args.only)
    # Whatever can be wrong with the request is found before the first notebook runs.
    if args.store and (args.model or args.p):
        raise ValueError("--store commits a profile's default run: not with --model or -p")
    values = {path: runner.overrides(path, args.profile, args.model, args.p) for path in paths}
    outcomes = []
    for path in paths:
        print(f"{path.stem} ({args.profile})", flush=True)
        outcome = runner.execute(path, values[path], args.profile, args.out)
        outcomes.append(outcome)
        if args.store and outcome.error is None:
            runner.store(outcome, path, path.parent.parent / "figures" / args.profile / path.stem)
    print(claims_table(read_claims(outcome.results for outcome in outcomes)))
    print(f"details, figures and executed notebooks: {args.out / args.profile}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        print(f"FAILED {outcome.notebook}, {outcome.error}; see {outcome.executed}")
    return 1 if failed else 0


def _notebooks(args: argparse.Namespace) -> int:
    from steerkit.lab import exercises, runner

    paths = sorted(NOTEBOOKS.glob(runner.NAMES))
    print(*exercises.copy_notebooks(paths, {args.folder: lambda notebook: notebook}), sep="\n")
    return 0


def _student(args: argparse.Namespace) -> int:
    from steerkit.lab import exercises, runner

    students, answers = args.folder / "student", args.folder / "answers"
    folders = {students: exercises.student_copy, answers: lambda notebook: notebook}
    print(*exercises.copy_notebooks(runner.find_notebooks(args.only), folders), sep="\n")
    return 0


COMMANDS = {"run": _run, "notebooks": _notebooks, "student": _student}
