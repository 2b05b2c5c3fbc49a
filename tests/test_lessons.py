"""Each notebook is a lesson: head, drawing, play, equation, predictions, a core to write, foot.

`python tests/test_lessons.py 04` prints what is missing in one.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat import NotebookNode

from steerkit.files import ROOT
from steerkit.lab.exercises import ANSWER, QUESTION

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
GLOSSARY = ROOT / "docs" / "glossary.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
LONG_NUMBER = re.compile(r"\d\.\d{7,}")
MANNERISMS = re.compile(
    r"the like of|asks the slopes|by its face|need not do worse|quiet by other means"
    r"|what it is worse by|\bdear(?:er|est)?\b",
    re.IGNORECASE,
)
WITHOUT_WORDS = {"setup", "parameters", "install", "exercise", "injected-parameters"}
RATED = "(5 minutes, difficulty 1 of 3, importance 3 of 3)"
LONGEST = 10  # lines of a function: what is longer belongs in the package


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "docs" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSTALL, DRAWINGS = script("install_cell.py"), script("drawings/make.py")


def faults(path: Path, notebook: NotebookNode | None = None) -> list[str]:
    """What a lesson lacks, a line each."""
    notebook = notebook or nbformat.read(path, as_version=4)
    parts = (head, order, exercises, foot, words_before_code, links, code, outputs)
    return [fault for part in parts for fault in part(path, notebook.cells)]


def head(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    first, second = (cell.source if cell.cell_type == "markdown" else "" for cell in cells[:2])
    if not (re.match(r"# \S", first) and "**Claim.**" in first):
        yield "cell 0: expected `# Title`, a paragraph, `**Claim.**`"
    goals = re.search(
        r"\*\*After this notebook you can\*\*(.*?)\*\*You need\*\*", second, re.DOTALL
    )
    if not goals or len(re.findall(r"^[-*] ", goals[1], re.MULTILINE)) != 3:
        yield "cell 1: expected `**After this notebook you can**`, three bullets, `**You need**`"
    if not re.search(r"\*\*Time:\*\* reading \d+ minutes, running \d+, exercises \d+\.", second):
        yield "cell 1: expected `**Time:** reading N minutes, running N, exercises N.`"
    if not re.search(r"\*\*Papers:\*\*.*\]\(https://arxiv\.org/abs/\d{4}\.\d{5}", second):
        yield "cell 1: expected `**Papers:**` with links to arXiv"
    if "[Glossary](../docs/glossary.md)" not in second:
        yield "cell 1: expected `[Glossary](../docs/glossary.md)`"
    place = [p.name for p in NOTEBOOKS].index(path.name)
    for word, step in (("Previous", -1), ("Next", 1)):
        there = 0 <= place + step < len(NOTEBOOKS)
        wanted = [NOTEBOOKS[place + step].name] if there else []
        if re.findall(rf"\*\*{word}:\*\* \[[^]]+\]\(([^)]+)\)", second) != wanted:
            yield f"cell 1: expected `**{word}:**` to link to {wanted or 'nothing'}"
    picture = re.search(r"!\[([^]]*)\]\(img/(\d\d)\.svg\)", second)
    if not picture or picture[2] != path.name[:2] or len(picture[1]) < 60:
        yield f"cell 1: expected `![what it shows, 60 letters or more](img/{path.name[:2]}.svg)`"


def order(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    code = [cell for cell in cells if cell.cell_type == "code"]
    tags = [set(cell.metadata.get("tags", [])) for cell in code]
    if tags[0] != {"install"} or code[0].source != INSTALL.source():
        yield "the first code cell does not install the kit: python docs/install_cell.py"
    if "setup" not in tags[1] or "parameters" not in tags[2]:
        yield "expected the next code cells to be tagged `setup` and `parameters`"
    for cell in code:
        if "setup" in cell.metadata.get("tags", []):
            if not cell.source.startswith("# Set-up: no need to read."):
                yield f"set-up {cell.source[:30]!r}: expected `# Set-up: no need to read.`"
            if not cell.metadata.get("jupyter", {}).get("source_hidden"):
                yield f"set-up {cell.source[:30]!r}: not collapsed"
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.+)", text, re.MULTILINE)
    if not headings or not headings[0].startswith("Play"):
        yield "expected the first heading to be `## Play`"
    if not re.search(r"\$\$.+?\$\$", text, re.DOTALL):
        yield "no equation `$$...$$`"
    if (n := text.count("**Predict, then run.**")) < 3:
        yield f"{n} of three `**Predict, then run.**`"
    if "**Discuss.**" not in text:
        yield "no `**Discuss.**`"
    if found := MANNERISMS.findall(text):
        yield f"plainer words for {found}"


def exercises(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    tagged = [n for n, cell in enumerate(cells) if "exercise" in cell.metadata.get("tags", [])]
    if len(tagged) < 4:
        yield f"{len(tagged)} exercises: expected the core and three more"
    for n in tagged:
        if not (asked := QUESTION.search(cells[n - 1].source)) or "importance" not in asked[0]:
            yield f"cell {n - 1}: expected `**1 {RATED}.** ... *Hint: ...*`"
    core = [
        n for n, c in enumerate(cells) if re.search(r"^## You write it: ", c.source, re.MULTILINE)
    ]
    if not core or not tagged or tagged[0] < core[0]:
        yield "expected `## You write it: ...` above the first exercise"
    elif not len(cells) / 6 < tagged[0] < len(cells) * 2 / 3:
        yield f"the core exercise is cell {tagged[0]} of {len(cells)}: expected in the middle"
    elif not re.search(r"^    compare\(\w+, ", cells[tagged[0]].source, re.MULTILINE):
        yield "the core exercise is not checked by `compare`"


def foot(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    titles = (
        "You write it", "Your turn", "Three things to take away", "If you had only five minutes",
        "What we did not show", "Further reading",
    )  # fmt: skip
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    places = [text.find(f"\n## {title}") for title in titles]
    if missing := [t for t, place in zip(titles, places, strict=True) if place < 0]:
        yield f"no heading {missing}"
        return
    if places[2:] != sorted(places[2:]):
        yield f"expected this order of headings: {titles[2:]}"
    three, reading = (text[places[n] + 4 :].partition("\n## ")[0] for n in (2, 5))
    if len(re.findall(r"^(?:[-*]|\d\.) ", three, re.MULTILINE)) != 3:
        yield "expected three things to take away"
    if "](http" not in reading:
        yield "no link in `## Further reading`"
    turn = next(
        n for n, c in enumerate(cells) if re.search(r"^## Your turn", c.source, re.MULTILINE)
    )
    if not any(cell.cell_type == "code" for cell in cells[turn : turn + 3]):
        yield "no cell to edit in `## Your turn`"


def words_before_code(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    for before, cell in pairwise(cells):
        if cell.cell_type == "code" and not WITHOUT_WORDS & set(cell.metadata.get("tags", [])):
            last = before.source.strip().rpartition("\n")[2]
            if before.cell_type != "markdown" or last.startswith("#"):
                yield f"no sentence before {cell.source[:60]!r}"


def links(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    targets = [link for link in LINK.findall(text) if not link.startswith(("http", "#"))]
    known = anchors()
    for target in targets:
        file, _, anchor = target.partition("#")
        if not (path.parent / file).exists():
            yield f"broken link {target}"
        elif anchor and file.endswith("glossary.md") and anchor not in known:
            yield f"the glossary has no {anchor!r}"
    if sum("glossary.md#" in target for target in targets) < 4:
        yield "expected links to the words of the glossary"


def anchors() -> set[str]:
    """Of the glossary's headings, as GitHub, VS Code and the site make them."""
    words = re.findall(r"^#+ (.+)", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", word.lower()).replace(" ", "-") for word in words}


def code(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "setup" in tags or "install" in tags:
            continue
        answer = ANSWER.fullmatch(cell.source) if "exercise" in tags else None
        source = answer["given"] + answer["check"] if answer else cell.source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                yield f"class {node.name}: belongs in the package"
            elif isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
                yield f"{node.name}: longer than {LONGEST} lines"
            elif is_comprehension(node) and any(
                is_comprehension(inner) for inner in ast.walk(node) if inner is not node
            ):
                yield f"a comprehension in a comprehension: {ast.unparse(node)[:60]}"


def is_comprehension(node: ast.AST) -> bool:
    return isinstance(node, (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp))


def outputs(path: Path, cells: list[NotebookNode]) -> Iterator[str]:
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = [output.get("text", ""), data.get("text/html", data.get("text/plain", ""))]
            for text in shown:
                if raw := LONG_NUMBER.findall(re.sub(r"<[^>]*>", "", text)):
                    yield f"a raw number {raw[0]}... below {cell.source[:40]!r}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_lesson(path):
    assert faults(path) == []


# Drawings

SVG = "{http://www.w3.org/2000/svg}"


def test_drawings_are_what_their_scripts_draw_and_can_be_read():
    drawn = DRAWINGS.drawings()
    stored = {path: path.read_text(encoding="utf-8") for path in sorted(drawn) if path.exists()}
    assert stored == drawn
    assert {path.name[:2] for path in NOTEBOOKS} == {path.stem for path in drawn}
    for text in drawn.values():
        root = ElementTree.fromstring(text)
        assert root.get("width") == "960" and root.find(f"{SVG}rect").get("fill") == "#ffffff"
        assert len(root.find(f"{SVG}title").text) > 10 and len(root.find(f"{SVG}desc").text) > 60
        sizes = [float(line.get("font-size")) for line in root.iter(f"{SVG}text")]
        assert sizes and min(sizes) >= 16


# The checks themselves, on a lesson that lacks nothing until a test spoils it.

LESSON = [
    "# Sinks\n\nWhy does it look there?\n\n**Claim.** 1 of 2 (paper: 1).",
    "**After this notebook you can**\n- a\n- b\n- c\n\n**You need** softmax.\n\n"
    "**Time:** reading 5 minutes, running 1, exercises 30.\n\n"
    "**Papers:** [StreamingLLM](https://arxiv.org/abs/2309.17453), section 3\n\n"
    "NEIGHBOURS [Glossary](../docs/glossary.md)\n\n"
    f"![{'a drawing of tokens and arrows between them ' * 2}](img/00.svg)",
    ("install", INSTALL.source()),
    ("setup", "# Set-up: no need to read.\nimport math"),
    ("parameters", 'PROFILE: str = "cpu"  # smoke, cpu or gpu'),
    "## Play\n\nMove it. [sink](../docs/glossary.md#sink) [head](../docs/glossary.md#head) "
    "[window](../docs/glossary.md#window) [evict](../docs/glossary.md#evict)",
    "print('play')",
    "$$a = b$$\n\n**Predict, then run.** A?",
    "print(1)",
    "**Predict, then run.** B? **Discuss.** C?",
    "print(2)",
    f"## You write it: twice\n\n**1 {RATED}.** X *Hint: y.*",
    ("exercise", "# Solution\ndef f(x):\n    1\nwith exercise(1, f):\n    compare(f, g, (1,))"),
    *[
        part
        for n in (2, 3, 4)
        for part in (
            f"**{n} {RATED}.** X *Hint: y.*",
            ("exercise", f"# Solution\nx = {n}\nwith exercise({n}, x):\n    assert x == N"),
        )
    ],
    "**Predict, then run.** D?\n\n## Your turn\n\nChange the text.",
    "text = 'mine'",
    "## Three things to take away\n\n1. a\n2. b\n3. c\n\n## If you had only five minutes\n\nRead."
    "\n\n## What we did not show\n\nAll.\n\n## Further reading\n\n- [x](https://arxiv.org)",
]  # fmt: skip


@pytest.fixture
def lesson() -> NotebookNode:
    new = nbformat.v4
    following = f"**Next:** [01]({NOTEBOOKS[1].name}) ·"
    notebook = new.new_notebook()
    for part in LESSON:
        if isinstance(part, tuple):
            cell = new.new_code_cell(part[1], metadata={"tags": [part[0]]})
        elif part.startswith(("print", "text")):
            cell = new.new_code_cell(part)
        else:
            cell = new.new_markdown_cell(part.replace("NEIGHBOURS", following))
        notebook.cells.append(cell)
    notebook.cells[3].metadata["jupyter"] = {"source_hidden": True}
    return notebook


SPOILS = {  # what is cut out, and what is said then
    "steerkit[notebooks]": "does not install",
    "**Claim.**": "Claim",
    "- c\n": "three bullets",
    "**Time:**": "Time",
    "https://arxiv.org/abs/2309.17453": "Papers",
    "**Next:**": "Next",
    "img/00.svg": "img/00.svg",
    "# Set-up: no need to read.\n": "no need to read",
    "## Play": "## Play",
    "Move it.": "",
    "$$a = b$$": "equation",
    "**Predict, then run.** A?": "2 of three",
    "**Discuss.**": "Discuss",
    "## You write it: ": "You write it",
    ", difficulty 1 of 3, importance 3 of 3": "importance",
    "compare(f, g, (1,))": "compare",
    "## Your turn": "Your turn",
    "3. c": "three things",
    "## Further reading": "Further reading",
    "[x](https://arxiv.org)": "no link in",
}


@pytest.mark.parametrize(("cut", "told"), SPOILS.items(), ids=SPOILS)
def test_each_missing_part_is_named(lesson, cut, told):
    path = NOTEBOOKS[0]
    broken = {"broken link img/00.svg"} if not (path.parent / "img" / "00.svg").exists() else set()
    assert set(faults(path, lesson)) == broken
    spoiled = deepcopy(lesson)
    for cell in spoiled.cells:
        cell.source = cell.source.replace(cut, "pass" if cut.startswith("compare") else "")
    found = set(faults(path, spoiled)) - broken
    assert any(told in line for line in found) if told else not found


ADDED = {  # a cell at the end, and what is said of it
    "x + 1": "no sentence before 'x + 1'",
    "class Cache:\n    pass": "class Cache",
    "def f():\n" + "    x = 1\n" * 10: "longer than",
    "[[y for y in x] for x in z]": "a comprehension in",
}


@pytest.mark.parametrize(("source", "told"), ADDED.items(), ids=ADDED)
def test_code_that_no_learner_should_read_is_named(lesson, source, told):
    lesson.cells += [nbformat.v4.new_code_cell(text) for text in ("x = 1", source)]
    assert any(told in line for line in faults(NOTEBOOKS[0], lesson))


def test_raw_numbers_mannerisms_and_broken_links_are_named(lesson):
    lesson.cells[6].outputs = [nbformat.v4.new_output("stream", text="0.4000000059604645")]
    lesson.cells[5].source += " The like of it. [a](nowhere.md) [b](../docs/glossary.md#nowhere)"
    found = "\n".join(faults(NOTEBOOKS[0], lesson))
    for told in ("a raw number", "plainer words", "broken link nowhere.md", "no 'nowhere'"):
        assert told in found


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if path.name.startswith(tuple(sys.argv[1:])):
            print(path.name, *faults(path), sep="\n  ")
