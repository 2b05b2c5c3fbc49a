"""What every benchmark shares: a row, and how a script prints its rows and writes them."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.files import write_json

HERE = Path(__file__).resolve().parent


class Row(NamedTuple):
    """One measured ratio: `what` is its name in the table, `form` prints `value`."""

    what: str
    value: float
    form: str = "{:.1f}x"
    goal: str = ""
    how: str = ""  # the times behind the ratio


def run(measure: Callable[[bool], Iterator[Row]], about: str) -> None:
    """A script's command line: its rows as they come, one thread; --quick, --json FILE."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, only to try it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="gets the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for what, value, form, goal, how in measure(options.quick):
        shown = form.format(value)
        rows.append({"what": what, "value": value, "shown": shown, "goal": goal, "how": how})
        print(f"{what:<64} {shown:>8}  {goal:<9} {how}".rstrip(), flush=True)
    if options.json:
        write_json(options.json, rows)
