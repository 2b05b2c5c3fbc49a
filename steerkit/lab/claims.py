"""The claims that a run has left on disk, as one table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WIDTHS = {"holds": 5, "notebook": 8, "claim": 44, "ours": 21, "paper": 18}  # 100 with the gaps


def read_claims(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every claim in `folders`, one folder for each notebook, whose name is added to each claim."""
    return [
        {"notebook": folder.name} | json.loads(file.read_text(encoding="utf-8"))
        for folder in folders
        for file in sorted(folder.glob("*.claim.json"))
    ]


def claims_table(claims: Iterable[dict[str, Any]]) -> str:
    """One line for each claim, at most 100 columns: what is too long is cut."""
    lines = [_line(WIDTHS)]
    for claim in claims:
        holds = "yes" if claim["holds"] else "NO"
        paper = claim["paper"] or {}
        numbers = _short(claim["ours"]), _short(paper.get("values", paper.get("value", "-")))
        lines.append(_line([holds, claim["notebook"].partition("_")[0], claim["claim"], *numbers]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    cut = [
        text if len(text) <= width else text[: width - 1] + "…"
        for text, width in zip(cells, WIDTHS.values(), strict=True)
    ]
    return " ".join(map(str.ljust, cut, WIDTHS.values())).rstrip()


def _short(value: Any) -> str:
    """Numbers to four significant digits, side by side."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(_short(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
