"""Figures: arrays and Axes in, Axes out; `show` puts one on disk and, with alt text, on screen."""

import base64
import html
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from steerkit.files import write_bytes, write_json
from steerkit.spans import Turn
from steerkit.statistics import bootstrap

# Okabe and Ito's palette for all kinds of colour vision, ordered so that neighbours also differ in
# grey; line style and marker repeat what colour says.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#56B4E9", "#D55E00", "#CC79A7")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING = LinearSegmentedColormap.from_list(
    "steerkit", ["#8C3A00", "#D55E00", "#FFFFFF", "#0072B2", "#003A5C"], N=255
)
DPI = 110


def use_style() -> None:
    """Set matplotlib's defaults for the session: readable on a projector and in grey."""
    cycle = cycler(color=COLOURS) + cycler(linestyle=DASHES) + cycler(marker=MARKERS)
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycle,
            "axes.grid": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
            "image.cmap": "cividis",
            "figure.figsize": (7.0, 3.8),
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "legend.frameon": False,
            "lines.markersize": 5,
            "lines.linewidth": 1.8,
        }
    )


def show(fig: Figure, name: str, *, out: Path, caption: str, alt: str, values: dict) -> None:
    """Write out/<name>.png and .json (values, caption, alt), display the picture, close `fig`.

    `alt` says what a reader who cannot see would need; `caption` what would refute the claim. Both
    are required. The PNG carries no date and no version: equal figures are equal bytes.
    """
    for label, text in (("caption", caption), ("alt", alt)):
        if not text.strip():
            raise ValueError(f"figure {name!r} has an empty {label}: say in words what it shows")
    if not name or Path(name).name != name:
        raise ValueError(f"name={name!r}: expected a plain file name without folders")
    png = _image(fig, "png", metadata={"Software": None})
    write_bytes(Path(out) / f"{name}.png", png)
    sidecar = {"figure": name, "caption": caption, "alt": alt, "values": values}
    write_json(Path(out) / f"{name}.json", sidecar)
    if get_ipython() is not None:  # outside a notebook the files are the result
        display(HTML(_figure_html("png", png, caption, alt)))


def heat_map(
    ax: Axes,
    weights: Any,
    *,
    labels: Sequence[str] | None = None,
    vmax: float | None = None,
    bar: str | None = "attention weight",
) -> Axes:
    """Attention weights (Q, K), queries down, keys across; `labels` names the tokens; `bar` is the
    colour bar's title, None leaves it out. What a causal query cannot see is drawn blank."""
    w = np.asarray(weights, dtype=float)
    if w.ndim != 2:
        raise ValueError(f"weights of shape {w.shape}: expected (Q, K), one head at a time")
    q, k = w.shape
    unseen = np.triu(np.ones((q, k), dtype=bool), 1 + k - q) & (w == 0)
    image = ax.imshow(np.ma.array(w, mask=unseen), vmin=0, vmax=vmax, interpolation="nearest")
    if labels is not None:
        ax.set_xticks(range(k), labels[:k], rotation=60, ha="right")
        ax.set_yticks(range(q), labels[k - q : k])
    return _finished(ax, image, bar)


def difference_map(
    ax: Axes,
    difference: Any,
    *,
    vmax: float | None = None,
    bar: str | None = "difference of attention weights",
) -> Axes:
    """After minus before, (Q, K): blue for more, orange with dots for less, white for 0.

    Colours run from -vmax to vmax, by default the largest change.
    """
    d = np.asarray(difference, dtype=float)
    if d.ndim != 2:
        raise ValueError(f"difference of shape {d.shape}: expected (Q, K), one head at a time")
    vmax = vmax or float(np.abs(d).max()) or 1.0
    image = ax.imshow(d, vmin=-vmax, vmax=vmax, cmap=DIVERGING, interpolation="nearest")
    row, column = np.nonzero(d < -vmax / 10)
    ax.scatter(column, row, s=0.15 * (150 / len(d)) ** 2, color="black", linewidths=0)
    return _finished(ax, image, bar)


def dialogue_map(
    ax: Axes,
    weights: Any,
    turns: Sequence[Turn],
    *,
    draw: Callable[..., Axes] = heat_map,
    texts: Sequence[str] | None = None,
    vmax: float | None = None,
    bar: str | None = "attention weight",
) -> Axes:
    """A binned map (bins, bins) of a dialogue: lines where its turns begin, numbers beside them.

    `draw` is `heat_map`, or `difference_map` for two dialogues' difference. `texts` (bins,), as
    `binned_text` makes them, are written down the left side; give the figure about 0.11 inches of
    height for each.
    """
    w = np.asarray(weights, dtype=float)
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(
            f"map of shape {w.shape}: expected (bins, bins), as attention_map makes it"
        )
    draw(ax, w, vmax=vmax, bar=bar)
    _draw_turns(ax, turns, len(w))
    ax.set(xlabel="turn of the key", ylabel="turn of the query")
    if texts is not None:
        _text_strip(ax, texts, len(w))
    return ax


def _finished(ax: Axes, image: AxesImage, bar: str | None) -> Axes:
    """What all maps share."""
    ax.set(xlabel="key position", ylabel="query position")
    ax.grid(False)
    if bar is not None:
        ax.figure.colorbar(image, ax=ax, label=bar, shrink=0.85)
    return ax


def binned_text(tokens: Sequence[str], bins: int, *, width: int = 30) -> list[str]:
    """What each bin of a map says: tokens (T,) joined, spaces tidied, cut to `width` characters."""
    T = len(tokens)
    edges = [-(-b * T // bins) for b in range(bins + 1)]
    rows = [" ".join("".join(tokens[a:b]).split()) for a, b in pairwise(edges)]
    return [row if len(row) <= width else row[: width - 1] + "…" for row in rows]


def _draw_turns(ax: Axes, turns: Sequence[Turn], bins: int) -> None:
    """Lines and tick numbers for the exchanges of a dialogue of `bins` bins."""
    scale = bins / turns[-1].end
    starts = {t.number: t.start for t in reversed(turns)}
    ends = {t.number: t.end for t in turns}
    shown = sorted(starts)[:: -(-len(starts) // 12)]
    for number in starts if len(starts) <= 30 else shown:
        for line in (ax.axvline, ax.axhline):
            line(starts[number] * scale - 0.5, color="0.5", linewidth=0.5, linestyle="-", marker="")
    middle = [(starts[n] + ends[n]) / 2 * scale - 0.5 for n in shown]
    ax.set_xticks(middle, shown)
    ax.set_yticks(middle, shown)
    ax.tick_params(length=0)


def _text_strip(ax: Axes, texts: Sequence[str], bins: int) -> None:
    if len(texts) != bins:
        raise ValueError(f"{len(texts)} texts for {bins} bins: expected one each")
    for row, text in enumerate(texts):
        ax.annotate(
            text.replace("$", r"\$"), (0, row), (-22, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", fontsize=5.5, family="monospace",
        )  # fmt: skip
    ax.set_ylabel("")


def head_grid(
    ax: Axes,
    values: Any,
    *,
    bar: str,
    form: str = "{:.2f}",
    vmax: float | None = None,
    marked: Iterable[tuple[int, int]] = (),
) -> Axes:
    """One cell per head with its number written in it: values (L, H), layer 0 at the top.

    With `vmax` colours run from 0 to it, so that several grids compare. `marked` heads, as (layer,
    head), are framed.
    """
    v = np.asarray(values, dtype=float)
    if v.ndim != 2:
        raise ValueError(f"values of shape {v.shape}: expected (L, H)")
    vmin = None if vmax is None else 0
    image = ax.imshow(v, aspect="auto", interpolation="nearest", vmin=vmin, vmax=vmax)
    _write(ax, image, lambda layer, h: form.format(v[layer, h]))
    ax.set(xlabel="head", ylabel="layer", xticks=range(v.shape[1]), yticks=range(v.shape[0]))
    ax.grid(False)
    for layer, head in marked:
        place = (head - 0.5, layer - 0.5)
        ax.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=COLOURS[5], linewidth=2.5))
    ax.figure.colorbar(image, ax=ax, label=bar)
    return ax


def head_overlap(ax: Axes, sets: Mapping[str, Iterable[tuple[int, int]]], *, heads: int) -> Axes:
    """How many heads two sets share, and, in brackets, how many would by chance: |A| |B| / heads.

    `heads` is the number of heads of the model. Colour is the shared part of the smaller set.
    """
    names, found = list(sets), [set(map(tuple, s)) for s in sets.values()]
    if not all(found):
        raise ValueError(f"set {names[found.index(set())]!r} has no head: leave it out")
    shared = np.array([[len(a & b) for b in found] for a in found])
    chance = np.array([[len(a) * len(b) / heads for b in found] for a in found])
    part = shared / np.array([[min(len(a), len(b)) for b in found] for a in found])
    image = ax.imshow(part, vmin=0, vmax=1, interpolation="nearest")

    def text(row: int, column: int) -> str:
        by_chance = f"\n({chance[row, column]:.1f})" if row != column else ""
        return f"{shared[row, column]}{by_chance}"

    _write(ax, image, text)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="shared part of the smaller set")
    return ax


def _write(ax: Axes, image: AxesImage, text: Callable[[int, int], str]) -> None:
    """`text(row, column)` into each cell of an image, white where the cell is dark."""
    for (row, column), x in np.ndenumerate(image.get_array()):
        colour = "white" if image.norm(x) < 0.5 else "black"
        words = text(row, column)
        ax.text(column, row, words, ha="center", va="center", color=colour, size=9)


def ablation(
    ax: Axes,
    rows: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str,
    reference: str | None = None,
) -> Axes:
    """One row per condition: (mean, low, high) as dot and interval, the first one at the top.

    A thin line goes down from the condition `reference`, which the others are compared with.
    """
    for y, (mean, low, high) in enumerate(rows.values()):
        if not low <= mean <= high:
            raise ValueError(
                f"{list(rows)[y]!r}: expected low <= mean <= high, got {low, mean, high}"
            )
        colour = COLOURS[y % len(COLOURS)]
        ax.plot([low, high], [y, y], color=colour, linestyle="-", marker="|", markersize=8)
        ax.plot(mean, y, color=colour, marker=MARKERS[y % len(MARKERS)], markersize=8)
        ax.annotate(
            f"{mean:.2f}", (mean, y), (0, 7), textcoords="offset points", ha="center", size=9
        )
    if reference is not None:
        ax.axvline(rows[reference][0], color="0.6", linewidth=1, linestyle=":", marker="", zorder=0)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    return ax


def turn_curves(
    ax: Axes, values: Mapping[str, Any], *, ylabel: str, first: int = 1
) -> dict[str, tuple[Any, Any, Any]]:
    """Means over dialogues by turn, values (dialogues, turns), with 95 % bootstrap bands.

    Returns (mean, low, high) by name, (turns,) each: what was drawn.
    """
    triples = {name: bootstrap(torch.as_tensor(v)) for name, v in values.items()}
    turns = np.arange(len(next(iter(triples.values()))[0])) + first
    means = {name: mean for name, (mean, _, _) in triples.items()}
    bands = {name: (low, high) for name, (_, low, high) in triples.items()}
    curves(ax, turns, means, xlabel="turn of the reply", ylabel=ylabel, bands=bands)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return triples


def curves(
    ax: Axes,
    x: Any,
    ys: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    logx: bool = False,
    logy: bool = False,
    grey: Collection[str] = (),
) -> Axes:
    """One line per entry of `ys`, each (N,) over x (N,); `bands`: (low, high) by the same names.

    Units belong in the labels. With more than 40 points the markers thin out to about 12. Those
    named in `grey` (a paper's) stand back.
    """
    x = np.asarray(x)
    for name, y in ys.items():
        y = np.asarray(y, dtype=float)
        if y.shape != x.shape:
            raise ValueError(f"curve {name!r} has shape {y.shape}, x has {x.shape}")
        back = {"color": "0.6", "linewidth": 1, "zorder": 1} if name in grey else {}
        every = 1 if len(x) <= 40 else len(x) // 12
        (line,) = ax.plot(x, y, label=name, markevery=every, **back)
        if bands and name in bands:
            low, high = (np.asarray(b, dtype=float) for b in bands[name])
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_xscale("log" if logx else "linear")
    ax.set_yscale("log" if logy else "linear")
    ax.legend()
    return ax


def loss_panels(
    axes: Sequence[Axes],
    streams: Mapping[str, Mapping[str, Tensor]],
    *,
    edges: Sequence[int],
    trained: int,
) -> dict[str, Any]:
    """One panel per stream, {title: {setting: losses (T,) in nats}}: means in bins of positions.

    Bins reach from one of `edges` to the next, a line marks the `trained` length, and NaN (a loss
    not computed) is left out. Returns the means drawn and, as "position", the bins' middles.
    """
    drawn: dict[str, Any] = {"position": [(a * b) ** 0.5 for a, b in pairwise(edges)]}
    for ax, (title, rows) in zip(axes, streams.items(), strict=True):
        drawn[title] = {k: [x[a:b].nanmean() for a, b in pairwise(edges)] for k, x in rows.items()}
        labels = {"xlabel": "position (tokens)", "ylabel": "loss (nats per token)"}
        curves(ax, drawn["position"], drawn[title], logx=True, **labels)
        ax.axvline(trained, color="0.4", linewidth=1, linestyle="-", marker="")
        ax.set_title(title)
        ax.get_legend().remove()
    lines = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*lines, loc="outside right center")
    return drawn


def dots(
    ax: Axes, table: Mapping[str, Mapping[str, float]], *, xlabel: str, grey: Collection[str] = ()
) -> Axes:
    """One row per setting, the first at the top, and one marker per column {title: {setting: x}}.

    Columns named in `grey` (a paper's) stand back.
    """
    for n, (title, row) in enumerate(table.items()):
        colour = "0.6" if title in grey else COLOURS[n % len(COLOURS)]
        style = {"linestyle": "", "marker": MARKERS[n % len(MARKERS)], "markersize": 8}
        ax.plot(list(row.values()), list(row), color=colour, label=title, **style)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    if len(table) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def loss_curve(ax: Axes, log: Sequence[Mapping[str, float]], *, label: str = "training") -> Axes:
    """The rows that `fit` returns ("step", "loss") as one curve, loss in nats per token."""
    steps = [row["step"] for row in log]
    losses = {label: [row["loss"] for row in log]}
    return curves(ax, steps, losses, xlabel="training step", ylabel="loss (nats per token)")


def picture(fig: Figure, *, caption: str, alt: str) -> str:
    """The figure as HTML with the picture in it, for a widget; closes `fig`, writes nothing.

    Lossless WebP, a third of a PNG's bytes: a widget sends one at each move.
    """
    image = _image(fig, "webp", pil_kwargs={"lossless": True})
    page = _figure_html("webp", image, caption, alt)
    return page.replace("<img ", '<img class="explored" ', 1)


def _image(fig: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, dpi=DPI, **options)
    plt.close(fig)
    return buffer.getvalue()


def _figure_html(kind: str, image: bytes, caption: str, alt: str) -> str:
    source = f"data:image/{kind};base64," + base64.b64encode(image).decode()
    image = f'<img alt="{html.escape(alt)}" src="{source}" style="max-width:100%">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
