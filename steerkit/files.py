"""Where data, models and notebooks lie, and files written in one step.

In a clone the folders data/ and notebooks/ stand beside the package; in a wheel they are inside it.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the clone, where there is one
INSTALLED = (PACKAGE / "data").is_dir()  # from a wheel
DATA = (PACKAGE if INSTALLED else ROOT) / "data"
NOTEBOOKS = (PACKAGE if INSTALLED else ROOT) / "notebooks"


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names it if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, or damaged ({error}): make it again") from error


def embedded() -> list[str]:
    """Names of the models and adapters that come with steerkit."""
    return sorted(path.parent.name for path in DATA.glob("*/*.safetensors"))


def source_of(name: str | os.PathLike) -> str:
    """The path of an embedded model; a directory or a hub id as it is. ValueError for neither."""
    source = str(DATA / name) if name in embedded() else str(name)
    # The hub would take a minute to say that it knows no such id.
    no_id = source.startswith(("tiny", ".", "~", os.sep)) or source.count("/") > 1
    if no_id and not Path(source).is_dir():
        raise ValueError(f"{name}: no such directory, and no embedded model: {embedded()}")
    return source


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
