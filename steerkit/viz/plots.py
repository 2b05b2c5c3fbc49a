"""Figures: arrays and Axes in, Axes out; `show` writes one and displays it with its alt text.

`plt.style.use("steerkit.viz.steerkit")` sets the style. Axes: L layers, H query heads, Q/K
query/key positions, T tokens.
"""

import base64
import html
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.pyplot import Axes, Figure, Rectangle

from steerkit.files import write_bytes, write_json
from steerkit.results import refuse_folders
from steerkit.spans import Turn
from steerkit.statistics import bootstrap

with plt.style.context("steerkit.viz.steerkit"):
    _CYCLE = plt.rcParams["axes.prop_cycle"].by_key()
COLOURS, MARKERS = _CYCLE["color"], _CYCLE["marker"]
SCREEN_DPI, PROJECTOR_DPI = 110, 160  # a stored figure is sharp on a projector, and no larger


# Figures that leave the notebook


def show(fig: Figure, name: str, *, out: Path, caption: str, alt: str, values: dict) -> None:
    """Write out/<name>.png and .json (values, caption, alt), display the picture, close `fig`.

    `alt` says what a reader who cannot see would need; `caption` what would refute the claim. Both
    are required. The PNG carries no date and no version: equal figures are equal bytes.
    """
    if not (caption.strip() and alt.strip()):
        raise ValueError(f"figure {name!r} has an empty caption or alt: say in words what it shows")
    refuse_folders(name)
    width = round(SCREEN_DPI * fig.get_figwidth())
    png = _image(fig, "png", dpi=PROJECTOR_DPI, metadata={"Software": None})
    write_bytes(Path(out) / f"{name}.png", png)
    record = {"figure": name, "caption": caption, "alt": alt, "values": values}
    write_json(Path(out) / f"{name}.json", record)
    if get_ipython() is not None:  # outside a notebook the files are the result
        display(HTML(_figure_html("png", png, caption, alt, f"width:{width}px;")))


def picture(fig: Figure, *, caption: str, alt: str) -> str:
    """The figure as HTML with the picture in it, for a widget; closes `fig`, writes nothing."""
    # Lossless WebP has a third of a PNG's bytes, and a widget sends a picture at each move.
    image = _image(fig, "webp", dpi=SCREEN_DPI, pil_kwargs={"lossless": True})
    return _figure_html("webp", image, caption, alt)


def _image(fig: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, **options)
    plt.close(fig)
    return buffer.getvalue()


def _figure_html(kind: str, image: bytes, caption: str, alt: str, style: str = "") -> str:
    source = f"data:image/{kind};base64," + base64.b64encode(image).decode()
    image = f'<img alt="{html.escape(alt)}" src="{source}" style="{style}max-width:100%">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


# Attention maps


def heat_map(
    ax: Axes,
    weights: Any,
    *,
    labels: Sequence[str] | None = None,
    vmax: float | None = None,
    bar: str | None = "attention weight",
    numbers: bool = False,
) -> Axes:
    """Attention weights (Q, K), queries down, keys across; `labels` names the tokens.

    `bar` is the colour bar's title; None leaves it out. What a causal query cannot see is blank.
    With `numbers` each weight is written in its cell.
    """
    w = np.asarray(weights, dtype=float)
    q, k = w.shape
    unseen = np.triu(np.ones((q, k), dtype=bool), 1 + k - q) & (w == 0)
    _draw(ax, np.ma.array(w, mask=unseen), "query position", "key position", bar, vmin=0, vmax=vmax)
    if numbers:
        _write(ax, lambda *at: "" if unseen[at] else f"{w[at]:.2f}")
    if labels is not None:
        ax.set_xticks(range(k), labels[:k], rotation=60, ha="right")
        ax.set_yticks(range(q), labels[k - q : k])
    return ax


def difference_map(ax: Axes, difference: Any, *, vmax: float | None = None) -> Axes:
    """Weights after minus before, (Q, K): blue for more, red with dots for less, white for 0.

    Colours run from -vmax to vmax, by default the largest change.
    """
    d = np.asarray(difference, dtype=float)
    vmax = vmax or float(np.abs(d).max()) or 1.0
    colours = {"vmin": -vmax, "vmax": vmax, "cmap": "RdBu"}
    _draw(ax, d, "query position", "key position", "difference", **colours)
    row, column = np.nonzero(d < -vmax / 10)
    ax.scatter(column, row, s=0.15 * (150 / len(d)) ** 2, color="black", linewidths=0)
    return ax


def mark_turns(ax: Axes, turns: Sequence[Turn]) -> Axes:
    """Mark a dialogue's turns on its map (bins, bins): lines where they begin, and their numbers.

    `ax` holds what `heat_map` or `difference_map` drew.
    """
    bins = len(ax.images[0].get_array())
    starts = {turn.number: turn.start * bins / turns[-1].end - 0.5 for turn in reversed(turns)}
    numbered = sorted(starts)[:: -(-len(starts) // 12)]  # of many turns about a dozen
    lines = [starts[number] for number in numbered]
    ax.set_xticks(lines, numbered)
    ax.set_yticks(lines, numbered)
    ax.grid(color="0.5", linewidth=0.5, alpha=1)
    ax.set(xlabel="turn of the key", ylabel="turn of the query")
    return ax


# Heads


def head_grid(
    ax: Axes,
    values: Any,
    *,
    bar: str | None,
    vmax: float | None = None,
    signed: bool = False,
    marked: Iterable[tuple[int, int]] = (),
) -> Axes:
    """One cell per head with its number written in it: values (L, H), layer 0 at the top.

    With `vmax` colours run from 0 (or, if `signed`, from -vmax) to it, so that several grids
    compare. `marked` heads, as (layer, head), are framed.
    """
    grid = number_grid(ax, values, bar=bar, vmax=vmax, signed=signed)
    grid.set(xlabel="head", ylabel="layer")
    for layer, head in marked:
        corner = (head - 0.5, layer - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS[5], linewidth=2.5))
    return ax


def number_grid(
    ax: Axes,
    values: Any,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    bar: str | None = None,
    vmax: float | None = None,
    signed: bool = False,
    form: str = ".2f",
) -> Axes:
    """A table (rows, columns) with each number written in its coloured cell; NaN stays blank.

    Colours run from 0 to `vmax`; if `signed`, from -vmax in red through white to blue.
    """
    v = np.asarray(values, dtype=float)
    scale = {"vmin": None if vmax is None else 0, "vmax": vmax}
    if signed:
        scale |= {"vmin": -vmax, "cmap": "RdBu"}
    _draw(ax, v, "", "", bar, aspect="auto", **scale)
    _write(ax, lambda *at: "" if np.isnan(v[at]) else format(v[at], form))
    ax.set_xticks(range(v.shape[1]), columns)
    ax.set_yticks(range(v.shape[0]), rows)
    return ax


def _draw(ax: Axes, matrix: Any, ylabel: str, xlabel: str, bar: str | None, **options: Any) -> None:
    """What all matrices share: an image without a grid, and a colour bar unless `bar` is None."""
    image = ax.imshow(matrix, interpolation="nearest", **options)
    ax.grid(False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if bar is not None:
        ax.figure.colorbar(image, ax=ax, label=bar, shrink=0.85)


def _write(ax: Axes, text: Callable[[int, int], str]) -> None:
    """`text(row, column)` into each cell of the image, white where the cell is dark."""
    image = ax.images[0]
    for (row, column), value in np.ndenumerate(image.get_array()):
        light = np.dot(image.to_rgba(value)[:3], (0.3, 0.6, 0.1))
        colour = "white" if light < 0.5 else "black"
        ax.text(column, row, text(row, column), ha="center", va="center", color=colour, size=9)


# Curves and points


def curves(
    ax: Axes,
    x: Any,
    ys: Mapping[str, Any],
    *,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    grey: Collection[str] = (),
    **axis: Any,
) -> Axes:
    """One line per entry of `ys`, each (N,) over x (N,); `bands`: (low, high) by the same names.

    `axis` is what `ax.set` takes: xlabel and ylabel, with units, xscale="log" and so on. With more
    than 40 points the markers thin out to about 12. Curves listed in `grey` (for example the
    paper's) are drawn in the background.
    """
    x = np.asarray(x)
    for name, y in ys.items():
        back = {"color": "0.6", "linewidth": 1, "zorder": 1} if name in grey else {}
        every = 1 if len(x) <= 40 else len(x) // 12
        (line,) = ax.plot(x, np.asarray(y, dtype=float), label=name, markevery=every, **back)
        if bands and name in bands:
            low, high = (np.asarray(b, dtype=float) for b in bands[name])
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(**axis)
    ax.legend()
    return ax


def turn_curves(
    ax: Axes, values: Mapping[str, Any], *, ylabel: str
) -> dict[str, tuple[Any, Any, Any]]:
    """Means over dialogues by turn, values (dialogues, turns), with 95 % bootstrap bands.

    Returns (mean, low, high) by name, (turns,) each: what was drawn.
    """
    drawn = {name: bootstrap(torch.as_tensor(v)) for name, v in values.items()}
    means = {name: mean for name, (mean, _, _) in drawn.items()}
    bands = {name: (low, high) for name, (_, low, high) in drawn.items()}
    turns = 1 + np.arange(len(next(iter(means.values()))))
    curves(ax, turns, means, bands=bands, xlabel="turn of the reply", ylabel=ylabel)
    ax.locator_params(axis="x", integer=True)
    return drawn


def label_ends(ax: Axes, *, gap: float = 0.07) -> Axes:
    """Write each line's name at its right end in its colour, instead of a legend.

    Call it last. Names that would overlap stand `gap` apart (a share of the axes' height).
    """
    if ax.get_legend() is not None:
        ax.get_legend().remove()
    ax.get_ylim()  # the limits are found when they are asked for
    to_axes, ends = ax.transScale + ax.transLimits, []
    for line in (line for line in ax.lines if not line.get_label().startswith("_")):
        x, y = line.get_data()
        last = np.flatnonzero(np.isfinite(y))[-1]
        ends.append((to_axes.transform((x[last], y[last]))[1], line))
    height = -gap
    for wanted, line in sorted(ends, key=lambda end: end[0]):
        height = max(wanted, height + gap)
        name, colour = line.get_label(), line.get_color()
        ax.text(1.02, height, name, color=colour, va="center", transform=ax.transAxes)
    return ax


def ablation(
    ax: Axes,
    rows: Mapping[str, tuple[float, ...]],
    *,
    xlabel: str,
    reference: str | None = None,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
) -> Axes:
    """One row per condition: (mean, low, high) as dot and interval, the first one at the top.

    A thin line goes down from the condition `reference`, which the others are compared with.
    `looks` gives conditions a colour, a marker and so on, for example one for each group.
    """
    for y, (name, (mean, low, high)) in enumerate(rows.items()):
        dot = {"color": COLOURS[y % len(COLOURS)], "marker": MARKERS[y % len(MARKERS)]}
        dot |= (looks or {}).get(name, {})
        ax.plot([low, mean, high], [y] * 3, linestyle="-", markevery=[1], markersize=8, **dot)
        above = {"textcoords": "offset points", "ha": "center", "size": 9}
        ax.annotate(f"{mean:.2f}", (mean, y), (0, 7), **above)
    if reference is not None:
        ax.axvline(rows[reference][0], color="0.6", linewidth=1, linestyle=":", marker="", zorder=0)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    return ax


def dots(
    ax: Axes, table: Mapping[str, Mapping[str, float]], *, xlabel: str, grey: Collection[str] = ()
) -> Axes:
    """One row per setting, the first at the top, and one marker per column {title: {setting: x}}.

    Columns listed in `grey` (for example the paper's) are drawn in grey.
    """
    for n, (title, column) in enumerate(table.items()):
        colour = "0.6" if title in grey else COLOURS[n % len(COLOURS)]
        marker = {"marker": MARKERS[n % len(MARKERS)], "markersize": 8, "linestyle": ""}
        ax.plot(list(column.values()), list(column), color=colour, label=title, **marker)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    if len(table) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax
