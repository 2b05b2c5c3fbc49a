"""The four results in one picture, drawn from what the notebooks have stored."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from steerkit.viz import plots

SHORT = {
    "json": "JSON",
    "pronouns": "Pronouns",
    "biasbios": "BiasBios",
    "counterfact": "CounterFact",
}
LINES = {"re-computation, first token in front": "re-comp. + first"}
CAPTION = (
    "The figures of notebooks 01 to 04 in short. Above, both panels measure the same dialogues, "
    "whose replies ignore the instruction after the first; dotted: GAtt on its own replies. Bands "
    "and bars are 95 % intervals; those of the random heads reach from the lowest to the highest "
    "draw."
)
ALT = (
    "Four panels. By turn, on replies that ignore the instruction: the share of replies that obey, "
    "where the base falls at once, GAtt by turn 8, and GAtt with mixed histories holds; and the "
    "largest attention weight on the instruction, which stays high for both GAtt models. Strict "
    "successes on four tasks: best prompt, random heads, searched heads. Loss by position: dense, "
    "window, re-computation, StreamingLLM."
)
FILES = {
    "own": "01_gatt_training/histories",
    "texts": "02_attention_heatmaps/by_turn",
    "tasks": "03_pasta_head_search/main_table",
    "losses": "04_streaming_llm/figure3",
}


def draw(figures: Path) -> Path | None:
    """Write overview.png and .json into `figures`, a profile's folder; None if a result is missing.

    Works on what the notebooks have stored, whichever run it comes from.
    """
    files = {key: figures / f"{name}.json" for key, name in FILES.items()}
    if not all(file.exists() for file in files.values()):
        return None
    stored = {key: json.loads(file.read_text("utf-8"))["values"] for key, file in files.items()}
    own = {"GAtt, own replies": stored["own"]["own"]["GAtt"]}
    with plt.rc_context():
        plt.style.use("steerkit.viz.steerkit")
        fig, axes = plt.subplots(2, 2, figsize=(13, 7.8))
        drawn = {
            "adherence": _adherence(axes[0, 0], stored["texts"]["forgetting, obeys"], own),
            "weight": _weight(axes[0, 1], stored["texts"]["forgetting"]),
            "tasks": _tasks(axes[1, 0], stored["tasks"]),
            "losses": _losses(axes[1, 1], stored["losses"]),
        }
        plots.show(fig, "overview", out=figures, caption=CAPTION, alt=ALT, values=drawn)
    return figures / "overview.png"


def _adherence(ax: Axes, rows: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    ax.set_title("GAtt: does an instruction of turn 1 last?")
    return _by_turn(ax, rows | own, "share of replies that obey", grey=own)


def _weight(ax: Axes, rows: dict[str, Any]) -> dict[str, Any]:
    ax.set_title("the same text: does it look at the instruction?")
    return _by_turn(ax, rows, "largest attention weight")


def _by_turn(
    ax: Axes, rows: dict[str, Any], ylabel: str, grey: Collection[str] = ()
) -> dict[str, Any]:
    """`rows` {name: (mean, low, high)}, (turns,) each."""
    means = {name: row[0] for name, row in rows.items()}
    bands = {name: row[1:] for name, row in rows.items()}
    turns = range(1, len(means["base"]) + 1)
    plots.curves(ax, turns, means, bands=bands, grey=grey, xlabel="turn", ylabel=ylabel)
    ax.set(ylim=(-0.03, 1.14), xticks=[t for t in (1, 5, 10, 15, 20) if t in turns])
    plots.label_ends(ax)
    return rows


def _tasks(ax: Axes, values: dict[str, Any]) -> dict[str, Any]:
    """Per task the best prompt (what steers no heads), random heads, and the searched ones."""
    prompts = [
        [row[way] for way in row if "heads" not in way and "PASTA" not in way]
        for row in values.values()
    ]
    groups = {
        "best prompt": [max(rows) for rows in prompts],
        "random heads": [row["random heads"] for row in values.values()],
        "searched heads": [row["PASTA, task-specific"] for row in values.values()],
    }
    places = np.arange(len(values))
    for i, (label, rows) in enumerate(groups.items()):
        mean, low, high = np.array(rows).T
        spread = np.maximum(0, [mean - low, high - mean])
        bars = {"color": plots.COLOURS[i], "label": label, "error_kw": {"lw": 1, "capsize": 2}}
        ax.bar(places + 0.27 * (i - 1), mean, 0.25, yerr=spread, **bars)
    ax.set_xticks(places, [SHORT.get(t, t) for t in values], size=10)
    ax.set(ylim=(0, 1.18), yticks=np.linspace(0, 1, 6), ylabel="share of strict successes")
    ax.grid(False, axis="x")
    ax.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1, fontsize=10)
    ax.set_title("PASTA: a few steered heads")
    return groups


def _losses(ax: Axes, values: dict[str, Any]) -> dict[str, Any]:
    """Of the first stream, by position."""
    text = next(key for key, row in values.items() if isinstance(row, dict))
    x = np.array(values["position"], dtype=float)
    curves = {LINES.get(name, name): row for name, row in values[text].items()}
    lines = {name: np.array(row, dtype=float) for name, row in curves.items()}
    axis = {"xlabel": "position (tokens)", "ylabel": "loss (nats per token)"}
    plots.curves(ax, x, lines, xscale="log", **axis)
    plots.label_ends(ax)
    ax.set_title(f"StreamingLLM: {text} without end")
    return lines | {"position": x}
