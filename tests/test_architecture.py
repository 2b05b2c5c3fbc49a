"""The drawing in docs/architecture.md is the package: its modules, its imports, no cycle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from steerkit.files import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = {p.stem: p for p in (ROOT / "steerkit").glob("*.py") if not p.stem.startswith("__")}
PARTS = {
    part: modules.split() for part, modules in re.findall(r'(\w+)\["<b>.+?</b><br>(.+?)"\]', PAGE)
}
ARROWS = {(a, b) for a, b in re.findall(r"^ *(\w+) --> (\w+)$", PAGE, re.MULTILINE)}
PART_OF = {module: part for part, modules in PARTS.items() for module in modules}


def imports(path: Path) -> set[str]:
    """Modules of the package that come with importing this one (not those of its functions)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            first, _, rest = node.module.partition(".")
            names = [rest] if rest else [alias.name for alias in node.names]
            found |= {name for name in names if first == "steerkit" and name in FILES}
        elif isinstance(node, ast.Import):
            names = [alias.name.partition("steerkit.")[2] for alias in node.names]
            found |= {name for name in names if name in FILES}
    return found


IMPORTS = {name: imports(path) for name, path in FILES.items()}
BETWEEN = {
    (PART_OF[a], PART_OF[b])
    for a, found in IMPORTS.items()
    for b in found
    if a in PART_OF and b in PART_OF and PART_OF[a] != PART_OF[b]
}


def below(part: str, arrows: set[tuple[str, str]]) -> set[str]:
    """All parts that arrows lead to from `part`."""
    found: set[str] = set()
    todo = [part]
    while todo:
        now = todo.pop()
        new = {b for a, b in arrows if a == now} - found
        found, todo = found | new, [*todo, *new]
    return found


def test_each_module_is_drawn_once() -> None:
    drawn = [module for modules in PARTS.values() for module in modules]
    assert sorted(drawn) == sorted(FILES)


def test_each_import_follows_the_arrows() -> None:
    stray = {(a, b) for a, b in BETWEEN if b not in below(a, ARROWS)}
    assert stray == set()


def test_each_arrow_is_an_import_and_none_is_superfluous() -> None:
    assert ARROWS <= BETWEEN
    spare = {(a, b) for a, b in ARROWS if b in below(a, ARROWS - {(a, b)})}
    assert spare == set()


@pytest.mark.parametrize("graph", ["modules", "parts"])
def test_no_import_goes_in_circles(graph: str) -> None:
    parts = {p: {b for a, b in ARROWS if a == p} for p in PARTS}
    try:
        TopologicalSorter(IMPORTS if graph == "modules" else parts).prepare()
    except CycleError as error:
        pytest.fail(f"{' -> '.join(error.args[1])}")


def test_the_table_explains_every_part() -> None:
    titles = re.findall(r'\["<b>(.+?)</b>', PAGE)
    assert sorted(re.findall(r"^\| ([A-Z][^|]+?) \|", PAGE, re.MULTILINE)) == sorted(titles)


def test_imports_are_read_as_python_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import steerkit.chat, os\nfrom steerkit import plots, load\n"
        "from steerkit.tiny.world import ask\ndef f():\n    from steerkit.lab import cli\n"
    )
    assert imports(path) == {"chat", "plots", "world"}
