"""Build the web site: notebooks as they are stored, glossary, teacher's page, coverage, reference.

    python docs/site/build.py [DIR]      (or: make site; needs the extra `site`)

DIR (default: runs/site) is replaced when the new site is complete. Nothing is executed.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = {  # chapter -> pages
    "Around the notebooks": [
        "docs/glossary",
        "docs/teaching",
        "docs/support",
        "benchmarks/results",
    ],
    "The package": ["docs/architecture", "CONTRIBUTING", "CHANGELOG"],
}
FOLDED = {  # tag of a cell -> what stands in its place until one clicks
    "install": "Installation",
    "setup": "Set-up: no need to read",
    "parameters": "Parameters",
    "exercise": "A solution and its check",
}
ROOMS = {
    "core": "Core: models, text, spans, constraints, results",
    "attention": "Attention: read, edit and map it",
    "steering": "Steering: PASTA, other methods, head search",
    "streaming": "Streaming: sinks, windows, losses",
    "gatt": "Ghost Attention",
    "tiny": "The tiny world",
    "viz": "Figures",
    "lab": "Notebooks, exercises, the command",
}


def write_sources(source: Path) -> None:
    """All pages of the site, as in the repository, with a table of contents."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    index = shutil.copy(ROOT / "README.md", source / "index.md")
    for folder, pages in (("docs", "*.md"), ("benchmarks", "*.md"), ("notebooks", "[0-9]*.ipynb")):
        (source / folder).mkdir()
        for path in (ROOT / folder).glob(pages):
            shutil.copy(path, source / folder)
    shutil.copytree(ROOT / "notebooks" / "img", source / "notebooks" / "img")
    (source / "figures" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "figures" / "cpu" / "overview.png", source / "figures" / "cpu")
    for card in (ROOT / "data").glob("*/README.md"):
        (source / "data" / card.parent.name).mkdir(parents=True)
        shutil.copy(card, source / "data" / card.parent.name)
    shutil.copy(HERE / "conf.py", source)
    (source / "_static").mkdir()
    for name in ("site.css", "favicon.svg"):
        shutil.copy(HERE / name, source / "_static")
    _draw(source / "docs" / "architecture.md")
    notebooks = sorted((source / "notebooks").glob("[0-9]*.ipynb"))
    for path in notebooks:
        _fold(path)
    reference = [_reference(room, title, source) for room, title in ROOMS.items()]
    cards = sorted(f"data/{path.parent.name}/README" for path in source.glob("data/*/README.md"))
    chapters = {"Notebooks": [f"notebooks/{path.stem}" for path in notebooks], **PAGES}
    chapters |= {"Reference": reference, "The embedded models": cards}
    with index.open("a", encoding="utf-8") as page:
        for chapter, pages in chapters.items():
            lines = "\n".join(pages)
            page.write(f"\n```{{toctree}}\n:hidden:\n:caption: {chapter}\n\n{lines}\n```\n")


def _draw(page: Path) -> None:
    """Mermaid blocks as pictures: the script that a browser needs for them lies elsewhere."""
    sys.path.insert(0, str(HERE))
    import flowchart

    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```mermaid\n.+?```", text, re.DOTALL)):
        drawing = page.with_name(f"flowchart{number}.svg")
        title = "The rooms of the package" if number == 0 else "The way a batch takes"
        drawing.write_text(flowchart.svg(block, title), encoding="utf-8")
        text = text.replace(block, f"![{title}: boxes and arrows]({drawing.name})")
    page.write_text(text, encoding="utf-8")


def _fold(path: Path) -> None:
    """Fold set-up and solutions away."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for tag in FOLDED.keys() & set(cell.metadata.get("tags", [])):
            cell.metadata["tags"] = ["hide-input"]
            cell.metadata["mystnb"] = {"code_prompt_show": FOLDED[tag]}
    nbformat.write(notebook, path)


def _reference(room: str, title: str, source: Path) -> str:
    """A page of one room's modules; its place without the suffix."""
    folder = ROOT / "steerkit" / (room if room != "core" else "")
    modules = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    prefix = "steerkit." if room == "core" else f"steerkit.{room}."
    parts = [
        f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {prefix}{name}\n   :members:\n```"
        for name in modules
    ]
    path = source / "reference" / f"{room}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join([f"# {title}", *parts]) + "\n", encoding="utf-8")
    return f"reference/{room}"


def build(out: Path) -> int:
    """Sphinx's exit code; `out` is replaced if it is 0."""
    try:
        import myst_nb  # noqa: F401
        import sphinx_book_theme  # noqa: F401
        from sphinx.cmd.build import main
    except ImportError as error:
        print(f"{error}: pip install -c constraints.txt -e '.[site]'", file=sys.stderr)
        return 2
    os.environ["NO_COLOR"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        source, html = Path(folder) / "source", Path(folder) / "html"
        source.mkdir()
        write_sources(source)
        if code := main(["-q", "-b", "html", "-d", f"{folder}/trees", str(source), str(html)]):
            return code
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(html, out)
    print(out / "index.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(build(Path(*sys.argv[1:2] or [ROOT / "runs" / "site"])))
