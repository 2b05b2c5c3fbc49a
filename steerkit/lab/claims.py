"""The claims that a run has left on disk, as one table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

WIDTH = 100  # columns of a terminal, and of a page


def read_claims(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every claim in `folders`, one for each notebook; `notebook` and `name` are added to each."""
    return [
        {"notebook": folder.name, "name": file.name.removesuffix(".claim.json")}
        | json.loads(file.read_text(encoding="utf-8"))
        for folder in folders
        for file in sorted(folder.glob("*.claim.json"))
    ]


def claims_table(claims: Iterable[dict[str, Any]]) -> Table:
    """One line for each claim: holds?, notebook, claim, ours, paper; what is too long is cut."""
    table = Table(box=SIMPLE_HEAD, width=WIDTH, padding=(0, 1, 0, 0))
    widths = {"holds": 5, "notebook": 8, "claim": None, "ours": 22, "paper": 18}
    for column, width in widths.items():
        table.add_column(column, width=width, no_wrap=True, overflow="ellipsis")
    for claim in claims:
        paper = claim["paper"] or {}
        number = claim["notebook"].partition("_")[0]
        numbers = _short(claim["ours"]), _short(paper.get("values", paper.get("value", "-")))
        table.add_row("yes" if claim["holds"] else "NO", number, escape(claim["claim"]), *numbers)
    return table


def _short(value: Any) -> str:
    """Numbers to four significant digits, side by side."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(_short(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
