"""Figures: arrays and Axes in, Axes out; `show` puts one on disk and, with alt text, on screen."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerkit.results import write_bytes, write_json

# Okabe and Ito's palette for all kinds of colour vision, ordered so that neighbours also differ in
# grey; line style and marker repeat what colour says.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#56B4E9", "#D55E00", "#CC79A7")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    png = _png(fig)
    plt.close(fig)
    write_bytes(Path(out) / f"{name}.png", png)
    sidecar = {"figure": name, "caption": caption, "alt": alt, "values": values}
    write_json(Path(out) / f"{name}.json", sidecar)
    if get_ipython() is not None:  # outside a notebook the files are the result
        display(HTML(_figure_html(png, caption, alt)))


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
    ax.set(xlabel="key position", ylabel="query position")
    ax.grid(False)
    if labels is not None:
        ax.set_xticks(range(k), labels[:k], rotation=60, ha="right")
        ax.set_yticks(range(q), labels[k - q : k])
    if bar is not None:
        ax.figure.colorbar(image, ax=ax, label=bar, shrink=0.85)
    return ax


def head_grid(
    ax: Axes, values: Any, *, bar: str, form: str = "{:.2f}", vmax: float | None = None
) -> Axes:
    """One cell per head with its number written in it: values (L, H), layer 0 at the top.

    With `vmax` colours run from 0 to it, so that several grids compare.
    """
    v = np.asarray(values, dtype=float)
    if v.ndim != 2:
        raise ValueError(f"values of shape {v.shape}: expected (L, H)")
    vmin = None if vmax is None else 0
    image = ax.imshow(v, aspect="auto", interpolation="nearest", vmin=vmin, vmax=vmax)
    for (layer, head), x in np.ndenumerate(v):
        dark = image.norm(x) < 0.5
        colour = "white" if dark else "black"
        ax.text(head, layer, form.format(x), ha="center", va="center", color=colour, size=9)
    ax.set(xlabel="head", ylabel="layer", xticks=range(v.shape[1]), yticks=range(v.shape[0]))
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label=bar)
    return ax


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
) -> Axes:
    """One line per entry of `ys`, each (N,) over x (N,); `bands`: (low, high) by the same names.

    Units belong in the labels. With more than 40 points the markers thin out to about 12.
    """
    x = np.asarray(x)
    for name, y in ys.items():
        y = np.asarray(y, dtype=float)
        if y.shape != x.shape:
            raise ValueError(f"curve {name!r} has shape {y.shape}, x has {x.shape}")
        (line,) = ax.plot(x, y, label=name, markevery=1 if len(x) <= 40 else len(x) // 12)
        if bands and name in bands:
            low, high = (np.asarray(b, dtype=float) for b in bands[name])
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_xscale("log" if logx else "linear")
    ax.set_yscale("log" if logy else "linear")
    ax.legend()
    return ax


def loss_curve(ax: Axes, log: Sequence[Mapping[str, float]], *, label: str = "training") -> Axes:
    """The rows that `fit` returns ("step", "loss") as one curve, loss in nats per token."""
    steps = [row["step"] for row in log]
    losses = {label: [row["loss"] for row in log]}
    return curves(ax, steps, losses, xlabel="training step", ylabel="loss (nats per token)")


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figure_html(png: bytes, caption: str, alt: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = f'<img alt="{html.escape(alt)}" src="{source}" style="max-width:100%">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
