"""Figures: accessible, repeatable, closed; helpers draw the numbers they are given."""

import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.pyplot import Axes

from steerkit.spans import Turn
from steerkit.statistics import bootstrap
from steerkit.viz import plots

TEXTS = {"caption": "Loss <falls>; a rise would refute it.", "alt": 'A line "falls" from 2 to 1.'}
TALK = [Turn(n // 2 + 1, ("user", "assistant")[n % 2], 10 * n, 10 * n + 10) for n in range(6)]


@pytest.fixture
def ax() -> Iterator[Axes]:
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def luminance(colour: Any) -> float:
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def words(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def draw() -> plt.Figure:
    fig, ax = plt.subplots()
    plots.curves(ax, [0, 1], {"loss": [2.0, 1.0]}, xlabel="step", ylabel="loss (nats)")
    return fig


# Figures that leave the notebook


def test_show_writes_displays_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    displayed: list[Any] = []
    monkeypatch.setattr(plots, "get_ipython", object)
    monkeypatch.setattr(plots, "display", displayed.append)
    for name in ("one", "two"):
        plots.show(draw(), name, out=tmp_path, **TEXTS, values={"loss": np.array([2.0, 1.0])})
    assert plt.get_fignums() == []
    one, two = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert one == two and one.startswith(b"\x89PNG")
    assert b"tEXt" not in one and b"Software" not in one  # no date, no version
    record = json.loads((tmp_path / "one.json").read_text())
    assert record == {"figure": "one", **TEXTS, "values": {"loss": [2.0, 1.0]}}
    page = displayed[0].data
    assert f'<img alt="{html.escape(TEXTS["alt"])}" src="data:image/png;base64,' in page
    assert f"<figcaption>{html.escape(TEXTS['caption'])}</figcaption>" in page
    # Sharp on a projector: more pixels than the width at which it is shown.
    pixels, shown = int.from_bytes(one[16:20]), re.search(r'style="width:(\d+)px', page)
    assert 1.4 < pixels / int(shown[1]) < 1.5


def test_a_picture_for_a_widget_is_repeatable_described_and_closed() -> None:
    one, two = (plots.picture(draw(), **TEXTS) for _ in range(2))
    assert one == two and "data:image/webp;base64," in one
    assert f'alt="{html.escape(TEXTS["alt"])}"' in one
    assert plt.get_fignums() == []


def test_style_repeats_colour_as_dash_and_marker_and_keeps_grey_apart() -> None:
    with plt.style.context("steerkit.viz.steerkit"):
        cycle = list(plt.rcParams["axes.prop_cycle"])
    for key in ("color", "linestyle", "marker"):
        assert len({str(entry[key]) for entry in cycle}) == len(cycle) == len(plots.COLOURS)
    greys = [luminance(entry["color"]) for entry in cycle]
    assert all(abs(a - b) > 0.1 for a, b in itertools.pairwise(greys))


# Maps and grids


@pytest.mark.parametrize(
    ("weights", "hidden", "rows"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [[False, True], [False, False]], ["a", "b"]),
        ([[0.5, 0.5, 0.0]], [[False, False, False]], ["c"]),  # the last query of three
        (np.full((2, 3), 0.5), [[False] * 3] * 2, ["b", "c"]),  # not causal: nothing is hidden
    ],
)
def test_heat_map_blanks_only_what_a_causal_query_cannot_see(
    ax: Axes, weights: Any, hidden: list, rows: list[str]
) -> None:
    plots.heat_map(ax, weights, labels=["a", "b", "c"], bar=None)
    assert np.ma.getmaskarray(ax.images[0].get_array()).tolist() == hidden
    assert words(ax.get_yticklabels()) == rows


def test_numbers_stand_in_the_cells_that_a_query_can_see(ax: Axes) -> None:
    plots.heat_map(ax, [[1.0, 0.0], [0.25, 0.75]], numbers=True)
    assert words(ax.texts) == ["1.00", "", "0.25", "0.75"]


def test_differences_are_centred_and_less_is_marked_for_grey(ax: Axes) -> None:
    plots.difference_map(ax, [[0.5, 0.0], [-0.2, -0.01]])
    image = ax.images[0]
    assert image.get_clim() == (-0.5, 0.5)
    assert min(image.to_rgba(0.0)[:3]) > 0.95
    assert ax.collections[0].get_offsets().tolist() == [[0.0, 1.0]]  # column 0, row 1
    plots.difference_map(ax, np.zeros((2, 2)))
    assert ax.images[1].get_clim() == (-1, 1)  # no difference at all is white, too


def test_turns_are_marked_where_their_tokens_stand(ax: Axes) -> None:
    plots.mark_turns(plots.heat_map(ax, np.ones((12, 12)), bar=None), TALK)  # 5 tokens a bin
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [-0.5, 3.5, 7.5]
    assert words(ax.get_xticklabels()) == words(ax.get_yticklabels()) == ["1", "2", "3"]
    assert all(line.get_visible() for line in ax.get_xgridlines() + ax.get_ygridlines())


def test_head_grid_writes_each_number_at_its_head_and_frames_the_marked(ax: Axes) -> None:
    plots.head_grid(ax, [[0.1, 0.2, 0.8, 1.0]], bar="x", vmax=1, marked=[(0, 2)])
    numbers = {(0, 0): "0.10", (1, 0): "0.20", (2, 0): "0.80", (3, 0): "1.00"}
    assert {t.get_position(): t.get_text() for t in ax.texts} == numbers
    for text in ax.texts:  # letters stand out from their cell in grey, too
        cell = ax.images[0].to_rgba(float(text.get_text()))[:3]
        assert abs(luminance(cell) - luminance(text.get_color())) > 0.5
    assert ax.images[0].get_clim() == (0, 1)  # so several grids compare
    (frame,) = ax.patches
    assert frame.get_xy() == (1.5, -0.5)


def test_a_table_of_numbers_names_rows_and_columns_and_leaves_missing_cells_blank(ax: Axes) -> None:
    plots.number_grid(ax, [[0.5, float("nan")]], rows=["emoji"], columns=["own", "other"])
    assert [t.get_text() for t in ax.texts] == ["0.50", ""]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["emoji"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["own", "other"]


def test_signed_grids_are_white_at_zero_and_legible_at_both_ends(ax: Axes) -> None:
    values = [[-0.1, 0.0, 0.1, float("nan")]]
    plots.head_grid(ax, values, bar=None, vmax=0.1, signed=True)
    image = ax.images[0]
    assert image.get_clim() == (-0.1, 0.1) and min(image.to_rgba(0.0)[:3]) > 0.95
    assert words(ax.texts) == ["-0.10", "0.00", "0.10", ""]
    for text in ax.texts[:3]:
        cell = image.to_rgba(float(text.get_text()))[:3]
        assert abs(luminance(cell) - luminance(text.get_color())) > 0.5
    counts = plots.number_grid(ax.figure.add_subplot(), [[3, 10]], form=".0f")
    assert words(counts.texts) == ["3", "10"]


# Curves and points


def test_curves_draw_lines_bands_scales_and_legend(ax: Axes) -> None:
    ys = {"window": [1.0, 9.0], "paper": [1.0, 1.1]}
    bands = {"window": ([0.5, 8.0], [1.5, 10.0])}
    axis = {"xlabel": "tokens", "ylabel": "nats", "xscale": "log"}
    plots.curves(ax, [10, 100], ys, bands=bands, grey=["paper"], **axis)
    assert [line.get_ydata().tolist() for line in ax.lines] == list(ys.values())
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "linear", "tokens")
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().ymax == 10.0
    assert words(ax.get_legend().get_texts()) == list(ys)
    ours, paper = ax.lines
    assert paper.get_color() == "0.6" and ours.get_color() != "0.6"
    assert paper.get_zorder() < ours.get_zorder() and ours.get_markevery() == 1


def test_turn_curves_are_means_with_bootstrap_bands(ax: Axes) -> None:
    values = np.random.default_rng(0).random((20, 3))
    drawn = plots.turn_curves(ax, {"base": values}, ylabel="share")
    mean, low, high = bootstrap(torch.tensor(values))
    assert ax.lines[0].get_xydata().tolist() == [[n + 1, m] for n, m in enumerate(mean.tolist())]
    box = ax.collections[0].get_paths()[0].get_extents()
    assert (box.ymin, box.ymax) == (low.min().item(), high.max().item())
    assert all(torch.equal(a, b) for a, b in zip(drawn["base"], (mean, low, high), strict=True))


def test_labels_at_the_ends_stand_at_their_lines_and_never_on_each_other(ax: Axes) -> None:
    ys = {"low": [5.0, 1.0], "twin": [2.0, 1.0], "high": [3.0, 100.0], "short": [10.0, np.nan]}
    plots.curves(ax, [0, 1], ys, yscale="log", ylim=(1, 100), xlim=(0, 1))
    plots.label_ends(ax, gap=0.1)
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights == pytest.approx({"low": 0, "twin": 0.1, "short": 0.5, "high": 1}, abs=1e-9)
    lines = [ax.lines[n] for n in (0, 1, 3, 2)]
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in lines]
    assert ax.get_legend() is None

    _, free = plt.subplots()  # limits that nobody set
    plots.label_ends(plots.curves(free, [0, 1], {"one": [5.0, 4.0], "two": [5.0, 3.0]}))
    assert [text.get_text() for text in free.texts] == ["two", "one"]
    assert 0 < free.texts[0].get_position()[1] < free.texts[1].get_position()[1] < 1
    plt.close("all")


def test_ablation_draws_each_interval_and_the_reference(ax: Axes) -> None:
    rows = {"plain": (0.9, 0.8, 1.0), "blind": (0.2, 0.1, 0.4)}
    looks = {"blind": {"color": "0.5", "markerfacecolor": "white"}}
    plots.ablation(ax, rows, xlabel="adherence", reference="plain", looks=looks)
    assert [line.get_color() for line in ax.lines[:2]] == [plots.COLOURS[0], "0.5"]
    lines = [line.get_xydata().tolist() for line in ax.lines[:2]]
    assert lines == [[[0.8, 0], [0.9, 0], [1.0, 0]], [[0.1, 1], [0.2, 1], [0.4, 1]]]
    assert set(ax.lines[2].get_xdata()) == {0.9}
    assert words(ax.get_yticklabels()) == list(rows) and words(ax.texts) == ["0.90", "0.20"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first at the top


def test_dots_stand_in_the_row_of_their_setting(ax: Axes) -> None:
    table = {"ours": {"window": 3.0, "dense": 5.0}, "paper": {"dense": 4.0, "window": 2.0}}
    plots.dots(ax, table, xlabel="perplexity", grey=["paper"])
    ax.figure.canvas.draw()
    rows = words(ax.get_yticklabels())
    points = [{rows[int(y)]: x for x, y in line.get_xydata()} for line in ax.lines]
    assert points == [{"window": 3.0, "dense": 5.0}, {"window": 2.0, "dense": 4.0}]
    assert [line.get_color() for line in ax.lines] == [plots.COLOURS[0], "0.6"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and rows[0] == "window"
    assert words(ax.get_legend().get_texts()) == ["ours", "paper"]
