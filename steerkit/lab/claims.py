"""The claims that a run has left on disk, as one table."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steerkit.files import read_json

LINE = "{:5} {:8} {:44.44} {:21.21} {:18.18}"  # 100 columns: what is too long is cut


def read_claims(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every claim in `folders`, one folder for each notebook, whose name is added to each claim."""
    return [
        {"notebook": folder.name} | read_json(file)
        for folder in folders
        for file in sorted(folder.glob("*.claim.json"))
    ]


def claims_table(claims: Iterable[dict[str, Any]]) -> str:
    """One line for each claim, at most 100 columns."""
    lines = [LINE.format("holds", "notebook", "claim", "ours", "paper")]
    for claim in claims:
        holds, number = "yes" if claim["holds"] else "NO", claim["notebook"].partition("_")[0]
        paper = claim["paper"] or {}
        published = paper.get("values", paper.get("value", "-"))
        ours = _short(claim["ours"])
        lines.append(LINE.format(holds, number, claim["claim"], ours, _short(published)))
    return "\n".join(map(str.rstrip, lines))


def _short(value: Any) -> str:
    """Numbers to four significant digits, side by side."""
    if isinstance(value, dict):
        return _short(list(value.values()))
    if isinstance(value, list):
        return " ".join(_short(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
