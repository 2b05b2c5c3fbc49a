"""The command `steerkit`: run the notebooks, say what this machine can do."""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from steerkit.files import ROOT, data_file
from steerkit.results import claims_table, collect, versions

if TYPE_CHECKING:
    from steerkit.lab.runner import Outcome
    from steerkit.steering.head_search import HeadTable
    from steerkit.steering.pasta import Head

GIB = 2**30
EXAMPLES = """examples:
  steerkit run                                  every notebook on the embedded model
  steerkit run --profile smoke                  the same code at small n, about a minute each
  steerkit run --only 04 -p TEXT book.txt       one notebook, on a text of your own
  steerkit run --profile gpu --model DIR_OR_ID  a real checkpoint on a CUDA GPU
  steerkit student --out workshop               copies for students, and the answer key
  steerkit check workshop/student/*.ipynb       which exercises of students' copies are right
  steerkit profile-heads --model DIR_OR_ID --tasks json biasbios --out heads.json
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
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    check.add_argument("--profile", default="smoke", choices=("smoke", "cpu", "gpu"))
    check.add_argument("--timeout", type=int, metavar="S", help="seconds per cell")
    heads = commands.add_parser("profile-heads", help="search the heads that PASTA steers")
    heads.set_defaults(command=_profile_heads)
    _profile_options(heads.add_argument)
    doctor = commands.add_parser("doctor", help="versions, device, memory, what profiles can do")
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--model", metavar="ID_OR_DIR", help="say what memory this one needs, too")
    return parser


def _profile_options(add: Callable[..., Any]) -> None:
    add("--model", default="tiny", metavar="ID_OR_DIR", help="default: the embedded chat model")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="json pronouns ...")
    add("--out", type=Path, required=True, metavar="FILE", help='gets {"layer": [heads]}')
    add("--size", type=int, default=4, help="how many heads to choose (default 4)")
    add("-n", type=int, default=200, help="prompts per task (default 200)")
    add("--alpha", type=float, default=0.01, help="weight outside the span (default 0.01)")
    add("--seed", type=int, default=0, help="of the drawn prompts")
    add("--data", nargs=2, action="append", default=[], metavar=("TASK", "FILE"), help="real data")
    add("--batch", type=int, default=16, help="prompts at a time, halved when memory runs out")
    add("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def _run(args: argparse.Namespace, root: Path, console: Console) -> int:
    try:
        from steerkit.lab import overview, runner
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
    if picture := overview.draw(figures / args.profile):
        console.print(f"the results in one picture: {picture}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _plans(args: argparse.Namespace, root: Path) -> dict[Path, dict[str, Any]]:
    """Notebook -> values to inject; everything that can be wrong is found before the first runs."""
    from steerkit.lab import runner

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
        text = f"FAILED {outcome.notebook}, {outcome.error}"
        text += f"\n  kept: {outcome.executed}" if outcome.executed.exists() else ""
        console.print(text, style="red", markup=False, soft_wrap=True)


def _student(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit.lab import exercises as student
    from steerkit.lab import runner

    for path in student.write_copies(runner.find(root / "notebooks", args.only), args.out):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return 0


def _check(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit.lab import exercises as student
    from steerkit.lab import runner

    options = {
        "profile": args.profile,
        "timeout": args.timeout or runner.CELL_TIMEOUT[args.profile],
    }
    states = []
    for path in args.notebooks:
        console.print(str(path), style="bold", markup=False, highlight=False, soft_wrap=True)
        for verdict in student.grade(path, **options):
            states.append(verdict.state)
            line = f"  Exercise {verdict.number}: {verdict.state}"
            style = "green" if verdict.state == student.RIGHT else "red"
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    return 0 if set(states) == {student.RIGHT} else 1


def _profile_heads(args: argparse.Namespace, root: Path, console: Console) -> int:
    """One resumable table per task beside --out; the heads that are good for all tasks in it."""
    from steerkit.models import load
    from steerkit.steering import head_search as search
    from steerkit.steering.tasks import prompts
    from steerkit.tiny.tasks import load_task, task_of

    data = dict(args.data)
    if stray := set(data) - set(args.tasks):
        raise ValueError(f"--data {sorted(stray)[0]}: not among --tasks {' '.join(args.tasks)}")
    drawn = {"seed": args.seed, "split": "profile"}
    examples = {
        name: load_task(name, data[name], n=args.n)[1]
        if name in data
        else task_of(name).examples(args.n, **drawn)
        for name in dict.fromkeys(args.tasks)
    }
    console.quiet = os.environ.get("RANK", "0") != "0"  # one of several processes speaks
    if args.device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model, tokenizer = load(args.model, device=args.device)
    tables = {}
    for name, some in examples.items():
        console.print(f"{name}: {len(some)} prompts, every head", highlight=False)
        file = args.out.with_name(f"{args.out.name}.{name}.table")
        options = {"alpha": args.alpha, "batch": args.batch, "resume": file}
        tables[name] = search.score_heads(model, prompts(tokenizer, some), **options)
    chosen, k = search.common(list(tables.values()), args.size)
    search.write_heads(args.out, chosen)
    console.print(_head_table(tables, chosen))
    n = len(next(iter(tables.values())).ranked())
    chance = search.chance_overlap(n, k, len(tables))
    line = f"{len(chosen)} heads of the top {k} of each task (by chance {chance:.1f}): {args.out}"
    console.print(line, highlight=False, soft_wrap=True)
    return 0


def _head_table(tables: Mapping[str, "HeadTable"], chosen: Sequence["Head"]) -> Table:
    table = Table("head", *tables, title="Gain over no steering (nats per answer token)")
    for head in chosen:
        table.add_row(str(head), *(f"{t.gain[head].item():+.3f}" for t in tables.values()))
    return table


def _doctor(args: argparse.Namespace, root: Path, console: Console) -> int:
    from steerkit.lab.runner import machine

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
    console.print(_needs(args.model))
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
    return f"yes; {free / GIB:.0f} of {total / GIB:.0f} GiB free"


def _needs(model: str | None) -> Table:
    """Memory by model size, beside what the GPU has free."""
    from steerkit.lab.memory import need, qwen
    from steerkit.models import config_of

    configs = {f"Qwen2.5-{size}": qwen(size) for size in ("0.5B", "1.5B", "7B")}
    configs |= {model: config_of(model)} if model else {}
    title = "GiB for 64 prompts of 2,048 tokens in bfloat16: computed, not measured"
    table = Table("model", "parameters", "weights", "cache", "workspace", "total", title=title)
    free = torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else None
    for name, config in configs.items():
        want = need(config)
        fits = "" if free is None else " (fits)" if want.total < free else " (does not fit)"
        parts = (f"{gib:.1f}" for gib in (want.weights, want.cache, want.workspace))
        table.add_row(name, f"{want.billions:.1f} B", *parts, f"{want.total:.1f}{fits}")
    return table
