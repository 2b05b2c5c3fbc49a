"""The package stands in rooms: docs/architecture.md draws them, and imports follow the arrows."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from steerkit.files import NOTEBOOKS, ROOT

PACKAGE = ROOT / "steerkit"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
}
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
LARGEST = 4_400  # lines of code: small enough to read in a day, with room for one more method


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, those inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES}


def room(module: str) -> str:
    """steerkit.chat -> core, steerkit.lab.cli -> lab."""
    return module.split(".")[1] if module.count(".") == 2 else "core"


IMPORTS = {name: imports(path) for name, path in FILES.items()}
ARROWS = {
    (room(a), room(b)) for a, modules in IMPORTS.items() for b in modules if room(a) != room(b)
}


def test_the_drawing_has_every_room_and_every_arrow():
    """Arrows to core are left out of the drawing: every room may import core."""
    drawing = re.search(r"```mermaid\n(.+?)```", PAGE, re.DOTALL)[1]
    drawn = set(re.findall(r"^ *(\w+) --> (\w+)$", drawing, re.MULTILINE))
    assert drawn == {(a, b) for a, b in ARROWS if b != "core"}
    rooms = {path.name for path in ROOMS} | {"core"}
    assert set(re.findall(r'^ *(\w+)\["', drawing, re.MULTILINE)) == rooms
    assert set(re.findall(r"^\| `(\w+)/?` \|", PAGE, re.MULTILINE)) == rooms


def test_methods_stand_on_core_and_attention_alone():
    below = {a: {b for c, b in ARROWS if c == a} for a, _ in ARROWS}
    assert not below.get("core", set())
    assert below["attention"] <= {"core"}
    for method in ("streaming", "steering", "gatt"):
        assert below[method] <= {"core", "attention"}
    assert below["lab"] <= {"core"}
    assert not {a for a, b in ARROWS if b in ("lab", "viz")}


@pytest.mark.parametrize("graph", ["modules", "rooms"])
def test_no_import_goes_in_circles(graph):
    rooms = {a: {b for c, b in ARROWS if c == a} for a, _ in ARROWS}
    try:
        TopologicalSorter(IMPORTS if graph == "modules" else rooms).prepare()
    except CycleError as error:
        pytest.fail(f"{' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_a_room_opens_with_what_it_is_for_its_paper_and_where_to_begin(path):
    (docstring,) = ast.parse((path / "__init__.py").read_text()).body  # and re-exports nothing
    _, paper, begin = [line for line in docstring.value.value.splitlines() if line.strip()]
    assert re.search(r"arXiv[: ]\d{4}\.\d{5}|No paper|arXiv \d{4}", paper)
    begin = re.match(r"Begin with `(\w+\.py)`", begin)
    assert (path / begin[1]).exists()


def test_nothing_in_the_package_knows_a_notebook():
    names = [path.stem for path in NOTEBOOKS.glob("*.ipynb")]
    known = re.compile("|".join([*names, r"[Nn]otebooks? 0\d"]))
    assert len(names) >= 6
    assert {str(path): known.findall(path.read_text()) for path in PACKAGE.rglob("*.py")} == {
        str(path): [] for path in PACKAGE.rglob("*.py")
    }


def lines_of_code(source: str) -> int:
    """Blank lines, comments and docstrings are free."""
    free = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            free |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(re.match(r"\s*[^\s#]", line)) and n not in free for n, line in lines)


def test_the_package_stays_small():
    assert lines_of_code('"""Doc.\n\nMore."""\n\n# why\nx = 1  # unit\n') == 1
    assert sum(lines_of_code(path.read_text()) for path in PACKAGE.rglob("*.py")) <= LARGEST
