"""The command `steerkit`: run notebooks, copy them, make and check a class's copies."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from steerkit.results import versions

PROFILES = ("smoke", "cpu", "gpu")
EXAMPLES = """examples:
  steerkit run                                  every notebook on the embedded models
  steerkit run --profile smoke                  the same code at small n, about a minute each
  steerkit run --only 04 -p TEXT book.txt       one notebook, on a text of your own
  steerkit run --profile gpu --model DIR_OR_ID  a real checkpoint on a CUDA GPU
  steerkit notebooks course                     copies of the notebooks, to work in
  steerkit student workshop                     copies without solutions, and the answer key
  steerkit check workshop/student/*.ipynb       which exercises of students' copies are right
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a notebook failed or an exercise is open, 2 a wrong request."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args, Console(highlight=False, markup=False, soft_wrap=True))
    except (ValueError, OSError, ImportError) as error:
        hint = "; pip install 'steerkit[notebooks]'" if isinstance(error, ImportError) else ""
        print(f"steerkit {args.name}: {error}{hint}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerkit",
        description="Notebooks that reproduce results about steering a model's attention.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=str(versions()))
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute notebooks, end with one table of claims")
    run.set_defaults(command=_run)
    run.add_argument("--profile", default="cpu", choices=PROFILES, help="how much (default: cpu)")
    run.add_argument("--model", metavar="ID_OR_DIR", help="default: the embedded models")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument(
        "--out", type=Path, default=Path("runs"), help="what it writes (default: runs)"
    )
    run.add_argument("--figures", help=argparse.SUPPRESS)
    run.add_argument("--store", action="store_true", help="authors: commit outputs and figures/")

    notebooks = commands.add_parser("notebooks", help="copy the notebooks into a folder")
    notebooks.set_defaults(command=_notebooks)

    student = commands.add_parser("student", help="write student copies and an answer key")
    student.set_defaults(command=_student)
    for copies in (notebooks, student):
        copies.add_argument("folder", type=Path)
    for some in (run, student):
        some.add_argument("--only", nargs="+", default=(), metavar="NAME", help="by prefix: 04")

    check = commands.add_parser("check", help="say which exercises of a student's copy are right")
    check.set_defaults(command=_check)
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    check.add_argument("--profile", default="smoke", choices=PROFILES)
    for executing in (run, check):
        executing.add_argument("--timeout", type=int, metavar="S", help="seconds per cell")
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    from steerkit.lab import claims, runner

    paths = runner.find_notebooks(args.only)
    chosen = {"profile": args.profile, "model": args.model, "extra": args.p}
    # Whatever can be wrong with the request is found before the first notebook runs.
    values = {path: runner.overrides(path, **chosen) for path in paths}
    if args.store and (args.model or args.p):
        raise ValueError("--store commits a profile's default run: not with --model or -p")
    timeout = args.timeout or runner.CELL_TIMEOUT[args.profile]
    outcomes = []
    for position, path in enumerate(paths, start=1):
        console.print(f"{position}/{len(paths)} {path.stem} ({args.profile})", style="bold")
        options = {"profile": args.profile, "out": args.out, "timeout": timeout}
        outcome = runner.execute(path, values[path], **options)
        outcomes.append(outcome)
        if outcome.error is None:
            console.print(f"  done in {outcome.seconds:.0f} s", style="green")
            if args.store:
                figures = path.parent.parent / "figures" / args.profile
                runner.store(outcome, path, figures / path.stem)
    console.print(claims.claims_table(claims.read_claims(o.results for o in outcomes)))
    console.print(f"details, figures and executed notebooks: {args.out / args.profile}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        console.print(f"FAILED {outcome.notebook}, {outcome.error}", style="red")
        console.print(f"  as far as it came: {outcome.executed}")
    return 1 if failed else 0


def _notebooks(args: argparse.Namespace, console: Console) -> int:
    from steerkit.lab import runner

    for path in runner.copy_notebooks(args.folder):
        console.print(str(path))
    return 0


def _student(args: argparse.Namespace, console: Console) -> int:
    from steerkit.lab import exercises, runner

    for path in exercises.write_copies(runner.find_notebooks(args.only), args.folder):
        console.print(str(path))
    return 0


def _check(args: argparse.Namespace, console: Console) -> int:
    from steerkit.lab import exercises, runner

    timeout = args.timeout or runner.CELL_TIMEOUT[args.profile]
    all_right = True
    for path in args.notebooks:
        console.print(str(path), style="bold")
        states = exercises.grade(path, profile=args.profile, timeout=timeout)
        for number, state in enumerate(states, start=1):
            right = state == exercises.RIGHT
            console.print(f"  Exercise {number}: {state}", style="green" if right else "red")
            all_right = all_right and right
    return 0 if all_right else 1
