"""Write notebooks/img/NN.svg, each from nbNN.py beside this file: `make.py [NN ...]`.

`--check` writes nothing and fails if a stored drawing is not what its script draws.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "notebooks" / "img"


def drawings() -> dict[Path, str]:
    """{notebooks/img/NN.svg: the SVG text that docs/drawings/nbNN.py draws}."""
    sys.path[:0] = [str(HERE)] * (str(HERE) not in sys.path)
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("nb[0-9]*.py"))]
    return {IMAGES / f"{module.__name__[2:]}.svg": module.draw() for module in modules}


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or all equal, 1 a stored drawing differs."""
    wanted = {name for name in arguments if name != "--check"}
    drawn = {path: svg for path, svg in drawings().items() if not wanted or path.stem in wanted}
    if "--check" in arguments:
        old = [p for p, svg in drawn.items() if not p.exists() or p.read_text("utf-8") != svg]
        print(*(f"{path.name} is not what its script draws" for path in old), sep="\n", end="")
        return 1 if old else 0
    IMAGES.mkdir(exist_ok=True)
    for path, svg in drawn.items():
        path.write_text(svg, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
