"""Primitives of a drawing: a canvas to put boxes, tokens, arrows and words on, and its SVG text.

Lengths are pixels of a drawing 960 wide, y grows downwards. Equal calls give equal bytes. Text that
is too small for a projector, wider than its box or off the canvas is an error, not a surprise.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import rc_params_from_file
from matplotlib.colors import to_hex, to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

_STYLE = Path(__file__).parents[2] / "steerkit" / "viz" / "steerkit.mplstyle"
_CYCLE = rc_params_from_file(_STYLE, use_default_template=False)["axes.prop_cycle"].by_key()
BLUE, ORANGE, GREEN, BLACK, SKY, RED, PINK = (to_hex(colour) for colour in _CYCLE["color"])
GREY, PALE, WHITE = "#707070", "#d0d0d0", "#ffffff"
SMALLEST = 16  # pixels: what can be read from the last row
LINE = 1.25  # height of a line of text, in font sizes


def tint(colour: str, strength: float = 0.18) -> str:
    """`colour` mixed with white; strength 1 is the colour itself, 0 is white."""
    return to_hex([1 - strength * (1 - part) for part in to_rgb(colour)])


def text_width(words: str, size: float, *, bold: bool = False, mono: bool = False) -> float:
    """Width of one line in pixels, in DejaVu, the widest of the fonts that a browser may take."""
    family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
    font = FontProperties(family=family, weight="bold" if bold else "normal")
    # A path leaves spaces at the end out.
    return TextPath((0, 0), words.replace(" ", "n"), size=size, prop=font).get_extents().x1


class Canvas:
    """A white drawing; `title` names it and `desc` says all that it shows, for who cannot see."""

    def __init__(self, height: int, *, title: str, desc: str, width: int = 960) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" '
            'font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(desc)}</desc>",
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>',
        ]

    def svg(self) -> str:
        """The whole drawing."""
        return "\n".join([*self._parts, "</svg>", ""])

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 18,
        colour: str = BLACK,
        anchor: str = "middle",
        bold: bool = False,
        italic: bool = False,
        mono: bool = False,
        room: float | None = None,
        halo: bool = False,
    ) -> None:
        """Lines of `words` around the height y; x is their `anchor`: start, middle or end.

        `room` is the width that they must fit into, by default what the canvas has. A `halo` of
        white sets them off a line below them.
        """
        if size < SMALLEST:
            raise ValueError(f"{words!r}: size {size}, smallest {SMALLEST}")
        lines = words.split("\n")
        needed = max(text_width(line, size, bold=bold, mono=mono) for line in lines)
        sides = {"start": self.width - x, "middle": 2 * min(x, self.width - x), "end": x}
        available = min(sides[anchor], math.inf if room is None else room)
        if needed > available:
            raise ValueError(f"{words!r} needs {needed:.0f} pixels and has {available:.0f}")
        top, bottom = y - LINE * size * len(lines) / 2, y + LINE * size * len(lines) / 2
        if not 0 <= top < bottom <= self.height:
            raise ValueError(f"{words!r} reaches from {top:.0f} to {bottom:.0f} of {self.height}")
        style = ' font-weight="bold"' * bold + ' font-style="italic"' * italic
        style += ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace"' * mono
        style += f' stroke="{WHITE}" stroke-width="8" paint-order="stroke"' * halo
        for number, line in enumerate(lines):
            baseline = top + LINE * size * (number + 0.5) + 0.35 * size
            self._add(
                f'<text x="{x:g}" y="{baseline:.1f}" font-size="{size}" text-anchor="{anchor}" '
                f'fill="{colour}" xml:space="preserve"{style}>{escape(line)}</text>'
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        *,
        colour: str = BLUE,
        fill: str | None = None,
        size: int = 18,
        bold: bool = False,
        mono: bool = False,
        dashed: bool = False,
        ink: str = BLACK,
    ) -> None:
        """A rounded box from its upper left corner, `words` in its middle; `fill`: a light tint."""
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill or tint(colour)}" stroke="{colour}" stroke-width="2"{_dash(dashed)}/>'
        )
        if words:
            middle = (x + width / 2, y + height / 2)
            font = {"size": size, "bold": bold, "mono": mono, "colour": ink}
            self.text(*middle, words, room=width - 6, **font)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = BLACK,
        width: float = 2,
        dashed: bool = False,
    ) -> None:
        """A line through `points`, (x, y) each."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._add(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{_dash(dashed)}/>'
        )

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        words: str = "",
        *,
        colour: str = BLACK,
        width: float = 2,
        bend: float = 0,
        dashed: bool = False,
        size: int = 16,
    ) -> None:
        """An arrow, `words` at its middle; `bend` pixels to the left of its way (right: negative).

        A `width` may say how much flows.
        """
        (x1, y1), (x2, y2) = start, end
        length = math.dist(start, end)
        side = ((y2 - y1) / length, (x1 - x2) / length)
        bow = ((x1 + x2) / 2 + 2 * bend * side[0], (y1 + y2) / 2 + 2 * bend * side[1])
        # The head points where the curve arrives; the line ends inside it.
        reach = math.dist(bow, end)
        along = ((x2 - bow[0]) / reach, (y2 - bow[1]) / reach)
        head, half = 8 + 2 * width, 3 + 1.2 * width
        neck = (x2 - head * along[0], y2 - head * along[1])
        left = (neck[0] - half * along[1], neck[1] + half * along[0])
        right = (neck[0] + half * along[1], neck[1] - half * along[0])
        self._add(
            f'<path d="M {x1:g} {y1:g} Q {bow[0]:.1f} {bow[1]:.1f} {neck[0]:.1f} {neck[1]:.1f}" '
            f'fill="none" stroke="{colour}" stroke-width="{width:g}"{_dash(dashed)}/>'
        )
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, left, right))
        self._add(f'<polygon points="{corners}" fill="{colour}"/>')
        if words:
            middle = ((x1 + x2) / 2 + bend * side[0], (y1 + y2) / 2 + bend * side[1])
            self.text(*middle, words, size=size, colour=colour, halo=True)

    def tokens(
        self,
        x: float,
        y: float,
        words: Sequence[str],
        *,
        width: float = 84,
        height: float = 40,
        gap: float = 6,
        colours: Mapping[int, str] | None = None,
        faded: Collection[int] = (),
        size: int = 16,
        mono: bool = False,
    ) -> list[float]:
        """A row of token boxes from the upper left corner; returns the x of each one's middle.

        `colours` {index: colour} sets some apart from grey; `faded` ones are dashed, as if gone.
        """
        middles = []
        for index, word in enumerate(words):
            left = x + index * (width + gap)
            gone = index in faded
            colour = PALE if gone else (colours or {}).get(index, GREY)
            look = {"colour": colour, "dashed": gone, "ink": GREY if gone else BLACK}
            fill = WHITE if gone else None
            self.box(left, y, width, height, word, size=size, mono=mono, fill=fill, **look)
            middles.append(left + width / 2)
        return middles

    def bracket(
        self,
        x1: float,
        x2: float,
        y: float,
        words: str,
        *,
        below: bool = True,
        colour: str = BLACK,
        size: int = 16,
    ) -> None:
        """A bracket from x1 to x2 at the height y, `words` below (or above) it."""
        way = 1 if below else -1
        self.line([(x1, y), (x1, y + 8 * way), (x2, y + 8 * way), (x2, y)], colour=colour)
        lines = words.count("\n") + 1
        middle = y + way * (12 + LINE * size * lines / 2)
        self.text((x1 + x2) / 2, middle, words, colour=colour, size=size)

    def legend(self, x: float, y: float, entries: Mapping[str, str], *, size: int = 16) -> None:
        """{words: colour} in a row that begins at x, squares and words around the height y."""
        for words, colour in entries.items():
            self.box(x, y - 9, 18, 18, colour=colour)
            self.text(x + 26, y, words, size=size, anchor="start")
            x += 26 + text_width(words, size) + 28

    def _add(self, part: str) -> None:
        self._parts.append(part)


def _dash(dashed: bool) -> str:
    return ' stroke-dasharray="6 5"' if dashed else ""
