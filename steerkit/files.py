"""Where the data lie, and files written in one step."""

import json
import math
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the clone: the kit is installed editable
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"


def data_file(name: str) -> Path:
    """Path of `name` in the clone's data/ folder; FileNotFoundError if the clone is not there."""
    path = ROOT / "data" / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: steerkit runs from a clone of its repository; install it there "
            "with `pip install -e .` (or `make run`), not as a wheel"
        )
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader, or a kill, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Like `write_bytes`, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Like `write_text`; tensors and arrays become lists, non-finite numbers "inf", "-inf", "nan"
    (JSON has no word for them; `float("inf")` reads them back)."""
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
