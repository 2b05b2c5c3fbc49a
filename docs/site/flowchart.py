"""Mermaid flowcharts as drawings of ours, for a site that loads no script from elsewhere.

Reads what docs/architecture.md uses: `name["<b>title</b><br>words"]`, `name["words"]`, `a --> b`.
"""

import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "drawings"))

from canvas import BLUE, GREY, Canvas

GAP, ROW = 24, 128  # pixels between boxes of a row, and from row to row


def svg(chart: str, title: str) -> str:
    """The drawing: who depends on others stands above them, what depends on nothing below."""
    labels = dict(re.findall(r'(\w+)\["(.+?)"\]', chart))
    bare = re.sub(r'\["(.+?)"\]', "", chart)
    arrows = re.findall(r"(\w+) --> (\w+)", bare)
    level = dict.fromkeys(labels, 0)
    for _ in labels:  # the longest way to each
        for a, b in arrows:
            level[b] = max(level[b], level[a] + 1)
    for name in labels.keys() - {b for _, b in arrows}:  # what nothing leads to, near its first use
        level[name] = min((level[b] - 1 for a, b in arrows if a == name), default=0)
    alone = labels.keys() - {name for arrow in arrows for name in arrow}
    bottom = max(level.values()) + 1
    rows = [[n for n in labels if n not in alone and level[n] == row] for row in range(bottom)]
    rows += [[name for name in labels if name in alone]] if alone else []
    desc = "; ".join(f"{a} to {b}" for a, b in arrows)
    canvas = Canvas(ROW * len(rows), title=title, desc=f"Boxes and arrows: {desc}.")
    width = (canvas.width - GAP) / max(map(len, rows)) - GAP
    width = min(width, 340)
    boxes = {}
    for y, row in enumerate(rows):
        left = (canvas.width - len(row) * (width + GAP) + GAP) / 2
        for x, name in enumerate(row):
            boxes[name] = (left + x * (width + GAP), 20 + y * ROW)
    for a, b in arrows:
        (x1, y1), (x2, y2) = boxes[a], boxes[b]
        canvas.arrow((x1 + width / 2, y1 + 84), (x2 + width / 2, y2 - 2), colour=GREY)
    for name, (x, y) in boxes.items():
        bold, _, words = labels[name].removeprefix("<b>").rpartition("</b><br>")
        lines = [
            line for part in words.split("<br>") for line in textwrap.wrap(part, int(width / 10))
        ]
        canvas.box(x, y, width, 84, colour=BLUE)
        middle = x + width / 2
        canvas.text(middle, y + (54 if bold else 42), "\n".join(lines), size=16, room=width)
        if bold:
            canvas.text(middle, y + 44 - 10 * len(lines), bold, size=18, bold=True)
    return canvas.svg()
