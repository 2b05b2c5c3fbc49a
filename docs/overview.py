"""The four results in one picture, drawn from what the notebooks have stored."""

import json
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
CAPTION = (
    "The figures of notebooks 01 to 04 in short. Bands and bars are 95 % intervals; those of the "
    "random heads reach from the lowest to the highest draw."
)
ALT = (
    "Four panels. Adherence by turn, and the largest attention weight on the instruction by turn: "
    "base and GAtt. Strict successes on four tasks: best prompt, random heads, searched heads. "
    "Loss by position: dense, window, re-computation, StreamingLLM."
)


def draw(figures: Path) -> Path | None:
    """Write overview.png and .json into `figures`, a profile's folder; None if a result is missing.

    Works on what the notebooks have stored, whichever run it comes from.
    """
    panels = {
        "01_gatt_training/arms": _adherence,
        "02_attention_heatmaps/by_turn": _weight,
        "03_pasta_head_search/main_table": _tasks,
        "04_streaming_llm/figure3": _losses,
    }
    files = [figures / f"{name}.json" for name in panels]
    if not all(file.exists() for file in files):
        return None
    with plt.rc_context():
        plt.style.use("steerkit.viz.steerkit")
        fig, axes = plt.subplots(2, 2, figsize=(11, 7.4))
        drawn = {
            name: panels[name](ax, json.loads(file.read_text(encoding="utf-8"))["values"])
            for ax, file, name in zip(axes.flat, files, panels, strict=True)
        }
        plots.show(fig, "overview", out=figures, caption=CAPTION, alt=ALT, values=drawn)
    return figures / "overview.png"


def _adherence(ax: Axes, values: dict[str, Any]) -> dict[str, Any]:
    ax.set_title("GAtt: an instruction given in turn 1")
    return _by_turn(ax, values["seen"], "share of replies that obey")


def _weight(ax: Axes, values: dict[str, Any]) -> dict[str, Any]:
    ax.set_title("Heat maps: attention on that instruction")
    return _by_turn(ax, values["forgetting"], "largest attention weight")


def _by_turn(ax: Axes, values: dict[str, Any], ylabel: str) -> dict[str, Any]:
    rows = {"base": values["base"], "after GAtt": values["GAtt"]}
    means = {name: row[0] for name, row in rows.items()}
    bands = {name: row[1:] for name, row in rows.items()}
    turns = range(1, len(means["base"]) + 1)
    plots.curves(ax, turns, means, xlabel="turn", ylabel=ylabel, bands=bands)
    ax.set(ylim=(-0.03, 1.05), xticks=[t for t in (1, 5, 10, 15, 20) if t in turns])
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
    ax.set_xticks(places, [SHORT.get(t, t) for t in values])
    ax.set(ylim=(0, 1.18), yticks=np.linspace(0, 1, 6), ylabel="share of strict successes")
    ax.grid(False, axis="x")
    ax.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.2)
    ax.set_title("PASTA: a few steered heads")
    return groups


def _losses(ax: Axes, values: dict[str, Any]) -> dict[str, Any]:
    text = next(key for key in values if key not in ("position", "market", "dialogue"))
    lines = {name: np.array(row, dtype=float) for name, row in values[text].items()}
    x = values["position"]
    plots.curves(
        ax, x, lines, xlabel="position (tokens)", ylabel="loss (nats per token)", xscale="log"
    )
    ax.set_ylim(top=1.25 * np.nanmax(lines["dense"]))
    ax.legend(loc="upper center", ncols=2)
    ax.set_title(f"StreamingLLM: {text} without end")
    return lines | {"position": x}
