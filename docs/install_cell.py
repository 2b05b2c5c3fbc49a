"""Put the first code cell into every notebook: it installs the kit where that is missing.

python docs/install_cell.py      (after a change of `Repository` in pyproject.toml)
"""

import sys
import tomllib
import uuid
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
TAG = "install"
CELL = """# Installs the kit where it is missing, as in Colab and Kaggle; elsewhere it does nothing.
import importlib.util
import subprocess
import sys

KIT = "steerkit[notebooks] @ git+{address}"
if importlib.util.find_spec("steerkit") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", KIT], check=True)"""


def source() -> str:
    """The cell's text, with the repository's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return CELL.format(address=project["urls"]["Repository"])


def put(path: Path) -> None:
    """Make it the first code cell of a notebook; cells of this tag are replaced."""
    notebook = nbformat.read(path, as_version=4)
    old = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    if [cell.source for cell in old] == [source()]:
        return
    notebook.cells = [cell for cell in notebook.cells if cell not in old]
    first = next(n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    metadata = {"tags": [TAG], "jupyter": {"source_hidden": True}}
    identity = old[0].id if old else uuid.uuid4().hex[:8]
    cell = nbformat.v4.new_code_cell(source(), metadata=metadata, id=identity)
    notebook.cells.insert(first, cell)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        if path.name.startswith(tuple(sys.argv[1:] or [""])):
            put(path)
            print(path.name)
