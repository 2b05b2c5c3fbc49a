"""Figures: accessible, repeatable, closed; helpers draw the numbers they are given."""

import html
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from steerkit.spans import Turn
from steerkit.statistics import bootstrap
from steerkit.viz import plots

TEXTS = {"caption": "Loss <falls>; a rise would refute it.", "alt": 'A line "falls" from 2 to 1.'}


def draw() -> plt.Figure:
    fig, ax = plt.subplots()
    plots.curves(ax, [0, 1], {"loss": [2.0, 1.0]}, xlabel="step", ylabel="loss (nats)")
    return fig


def test_show_writes_picture_and_sidecar_and_closes(tmp_path: Path) -> None:
    plots.show(draw(), "loss", out=tmp_path, **TEXTS, values={"loss": np.array([2.0, 1.0])})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    sidecar = json.loads((tmp_path / "loss.json").read_text())
    assert sidecar == {"figure": "loss", **TEXTS, "values": {"loss": [2.0, 1.0]}}
    assert plt.get_fignums() == []


def test_equal_figures_are_equal_bytes_without_date_or_version(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.show(draw(), name, out=tmp_path, **TEXTS, values={})
    one, two = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "b"))
    assert one == two
    assert b"tEXt" not in one and b"Software" not in one


def test_show_displays_alt_text_caption_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(plots, "get_ipython", object)
    monkeypatch.setattr(plots, "display", shown.append)
    plots.show(draw(), "loss", out=tmp_path, **TEXTS, values={})
    (page,) = (item.data for item in shown)
    assert f'<img alt="{html.escape(TEXTS["alt"])}" src="data:image/png;base64,' in page
    assert f"<figcaption>{html.escape(TEXTS['caption'])}</figcaption>" in page


@pytest.mark.parametrize("missing", ["caption", "alt"])
def test_a_figure_without_words_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"empty {missing}"):
        plots.show(draw(), "loss", out=tmp_path, **(TEXTS | {missing: " "}), values={})
    plt.close("all")


def test_a_figure_cannot_leave_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        plots.show(draw(), "../loss", out=tmp_path, **TEXTS, values={})
    plt.close("all")


def test_style_repeats_colour_as_dash_and_marker_and_keeps_grey_apart() -> None:
    def luminance(colour: str) -> float:
        return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    with plt.rc_context():
        plt.style.use("steerkit.viz.steerkit")
        cycle = list(plt.rcParams["axes.prop_cycle"])
    for key in ("color", "linestyle", "marker"):
        assert len({str(entry[key]) for entry in cycle}) == len(cycle)
    greys = [luminance(entry["color"]) for entry in cycle]
    assert all(abs(a - b) > 0.1 for a, b in itertools.pairwise(greys))


def test_heat_map_blanks_the_future_and_keeps_zeros_of_the_past() -> None:
    fig, ax = plt.subplots()
    plots.heat_map(ax, np.array([[1.0, 0.0], [0.0, 1.0]]), labels=["a", "b"])
    drawn = ax.images[0].get_array()
    assert drawn.mask.tolist() == [[False, True], [False, False]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    plt.close(fig)


def test_heat_map_hides_nothing_of_a_map_that_is_not_causal() -> None:
    fig, ax = plt.subplots()
    plots.heat_map(ax, np.full((2, 3), 0.5))
    assert not np.ma.is_masked(ax.images[0].get_array())
    plt.close(fig)


def test_heat_map_of_the_last_queries_labels_them_as_the_last_tokens() -> None:
    fig, ax = plt.subplots()
    plots.heat_map(ax, np.full((1, 3), 1 / 3), labels=["a", "b", "c"], bar=None)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c"]
    plt.close(fig)


def test_head_grid_writes_each_number_at_its_layer_and_head() -> None:
    fig, ax = plt.subplots()
    plots.head_grid(ax, [[0.0, 0.25, 1.0]], bar="weight on token 0")
    assert {t.get_position(): t.get_text() for t in ax.texts} == {
        (0, 0): "0.00",
        (1, 0): "0.25",
        (2, 0): "1.00",
    }
    plt.close(fig)


def test_numbers_in_cells_are_white_on_dark_and_black_on_light() -> None:
    fig, ax = plt.subplots()
    plots.head_grid(ax, [[0.0, 0.2, 0.8, 1.0]], bar="x", vmax=1)
    for text in ax.texts:
        cell = ax.images[0].to_rgba(float(text.get_text()))[:3]
        grey, letters = (
            np.dot(c, (0.2126, 0.7152, 0.0722)) for c in (cell, to_rgb(text.get_color()))
        )
        assert abs(grey - letters) > 0.5
    plt.close(fig)


def test_head_grids_with_one_vmax_have_comparable_colours() -> None:
    fig, axes = plt.subplots(1, 2)
    for ax, values in zip(axes, ([[0.2, 0.3]], [[0.3, 0.9]]), strict=True):
        plots.head_grid(ax, values, bar="weight on token 0", vmax=1)
    images = [ax.images[0] for ax in axes]
    assert images[0].to_rgba(0.3) == images[1].to_rgba(0.3)
    assert axes[0].texts[1].get_color() == axes[1].texts[0].get_color()
    plt.close(fig)


def test_curves_draw_lines_bands_scales_and_legend() -> None:
    fig, ax = plt.subplots()
    ys = {"window": [1.0, 9.0], "streaming": [1.0, 1.1]}
    bands = {"window": ([0.5, 8.0], [1.5, 10.0])}
    plots.curves(ax, [10, 100], ys, xlabel="tokens", ylabel="nats", bands=bands, logx=True)
    assert [line.get_ydata().tolist() for line in ax.lines] == list(ys.values())
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"
    assert len(ax.collections) == 1
    assert ax.collections[0].get_paths()[0].get_extents().ymax == 10.0
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(ys)
    plt.close(fig)


def test_what_is_grey_stands_behind_and_is_still_named() -> None:
    fig, ax = plt.subplots()
    ys = {"ours": [1.0, 2.0], "paper": [2.0, 1.0]}
    plots.curves(ax, [0, 1], ys, xlabel="x", ylabel="y", grey=["paper"])
    ours, paper = ax.lines
    assert paper.get_color() == "0.6" and ours.get_color() != "0.6"
    assert paper.get_zorder() < ours.get_zorder()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ours", "paper"]
    plt.close(fig)


def test_loss_panels_draw_means_of_what_was_computed_between_the_edges() -> None:
    fig, axes = plt.subplots(1, 2)
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0, 9.0])
    every_second = torch.tensor([torch.nan, 2.0, torch.nan, 5.0, torch.nan])
    streams = {"a": {"all": losses, "some": every_second}, "b": {"all": losses, "some": losses}}
    drawn = plots.loss_panels(axes, streams, edges=[1, 2, 4], trained=2)
    assert drawn["position"] == [2**0.5, 8**0.5]
    assert drawn["a"] == {"all": [2.0, 4.0], "some": [2.0, 5.0]}
    assert [line.get_ydata().tolist() for line in axes[0].lines[:2]] == list(drawn["a"].values())
    assert set(axes[1].lines[-1].get_xdata()) == {2} and axes[1].get_title() == "b"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["all", "some"]
    assert axes[0].get_xscale() == "log" and axes[0].get_legend() is None
    plt.close(fig)


def test_dots_stand_in_the_row_of_their_setting() -> None:
    fig, ax = plt.subplots()
    table = {"ours": {"window": 3.0, "dense": 5.0}, "paper": {"dense": 4.0, "window": 2.0}}
    plots.dots(ax, table, xlabel="perplexity", grey=["paper"])
    fig.canvas.draw()
    rows = [t.get_text() for t in ax.get_yticklabels()]
    found = [{rows[int(y)]: x for x, y in line.get_xydata()} for line in ax.lines]
    assert found == [{"window": 3.0, "dense": 5.0}, {"window": 2.0, "dense": 4.0}]
    assert [line.get_color() for line in ax.lines] == [plots.COLOURS[0], "0.6"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and rows[0] == "window"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ours", "paper"]
    plt.close(fig)


def test_long_curves_thin_out_their_markers() -> None:
    fig, ax = plt.subplots()
    for n, every in ((40, 1), (120, 10)):
        plots.curves(ax, range(n), {"x": range(n)}, xlabel="x", ylabel="y", logy=True)
        assert ax.lines[-1].get_markevery() == every
    assert ax.get_yscale() == "log"
    plt.close(fig)


TALK = [Turn(n // 2 + 1, ("user", "assistant")[n % 2], 10 * n, 10 * n + 10) for n in range(6)]


def test_dialogue_map_draws_turns_where_their_tokens_stand() -> None:
    fig, ax = plt.subplots()
    plots.dialogue_map(ax, np.tril(np.ones((12, 12))), TALK, bar=None)  # 60 tokens, 5 a bin
    upright = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert sorted(upright) == [-0.5, 3.5, 7.5]
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [1.5, 5.5, 9.5]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "3"]
    plt.close(fig)


def test_maps_share_a_scale_and_name_it() -> None:
    for draw, clim in ((plots.heat_map, (0, 0.5)), (plots.difference_map, (-0.5, 0.5))):
        fig, ax = plt.subplots()
        weights = np.tril(np.full((12, 12), 0.25))
        plots.dialogue_map(ax, weights, TALK, draw=draw, vmax=0.5, bar="weight")
        assert ax.images[0].get_clim() == clim
        assert [other.get_ylabel() for other in fig.axes] == ["turn of the query", "weight"]
        plt.close(fig)


@pytest.mark.parametrize(("turns", "lines", "ticks"), [(12, 12, 12), (30, 30, 10), (60, 12, 12)])
def test_many_turns_are_numbered_and_ruled_sparsely(turns: int, lines: int, ticks: int) -> None:
    fig, ax = plt.subplots()
    talk = [Turn(n + 1, "user", 4 * n, 4 * n + 4) for n in range(turns)]
    plots.dialogue_map(ax, np.tril(np.ones((60, 60))), talk, bar=None)
    assert len(ax.lines) == 2 * lines and len(ax.get_xticks()) == ticks
    plt.close(fig)


def test_text_strip_stands_beside_its_rows() -> None:
    fig, ax = plt.subplots()
    rows = [f"row {n} costs $5" for n in range(12)]
    plots.dialogue_map(ax, np.tril(np.ones((12, 12))), TALK, texts=rows, bar=None)
    fig.canvas.draw()  # a dollar is no formula
    assert [(t.xy[1], t.get_text().replace("\\", "")) for t in ax.texts] == list(enumerate(rows))
    plt.close(fig)


def test_binned_text_holds_each_token_once_in_the_bins_of_the_map() -> None:
    tokens = [f" t{n}" for n in range(10)]
    rows = plots.binned_text(tokens, 4)
    wanted = [" ".join(f"t{n}" for n in range(10) if n * 4 // 10 == b) for b in range(4)]
    assert rows == wanted
    assert plots.binned_text(["a" * 50], 1, width=10) == ["a" * 9 + "…"]


def test_differences_are_centred_and_less_is_marked_for_grey() -> None:
    fig, ax = plt.subplots()
    plots.difference_map(ax, [[0.5, 0.0], [-0.2, -0.01]])
    image = ax.images[0]
    assert image.get_clim() == (-0.5, 0.5)
    assert image.to_rgba(0.0)[:3] == (1.0, 1.0, 1.0)
    assert ax.collections[0].get_offsets().tolist() == [[0.0, 1.0]]  # column 0, row 1
    plt.close(fig)


def test_a_difference_of_nothing_is_white() -> None:
    fig, ax = plt.subplots()
    plots.dialogue_map(ax, np.zeros((2, 2)), TALK, draw=plots.difference_map)
    assert ax.images[0].get_clim() == (-1, 1)
    plt.close(fig)


def test_head_grid_frames_the_marked_heads() -> None:
    fig, ax = plt.subplots()
    plots.head_grid(ax, np.zeros((2, 3)), bar="x", marked=[(1, 2)])
    (frame,) = ax.patches
    assert frame.get_xy() == (1.5, 0.5)
    plt.close(fig)


def test_head_overlap_counts_and_gives_chance() -> None:
    fig, ax = plt.subplots()
    plots.head_overlap(ax, {"a": [(0, 0), (0, 1)], "b": [[0, 1], [2, 2], [3, 3]]}, heads=12)
    texts = {t.get_position(): t.get_text() for t in ax.texts}
    assert texts == {(0, 0): "2", (1, 1): "3", (1, 0): "1\n(0.5)", (0, 1): "1\n(0.5)"}
    assert ax.images[0].get_array().tolist() == [[1, 0.5], [0.5, 1]]
    plt.close(fig)


def test_ablation_draws_each_interval_and_the_reference() -> None:
    fig, ax = plt.subplots()
    rows = {"plain": (0.9, 0.8, 1.0), "blind": (0.2, 0.1, 0.4)}
    plots.ablation(ax, rows, xlabel="adherence", reference="plain")
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert lines[:4] == [[[0.8, 0], [1.0, 0]], [[0.9, 0]], [[0.1, 1], [0.4, 1]], [[0.2, 1]]]
    assert set(ax.lines[4].get_xdata()) == {0.9}
    assert [t.get_text() for t in ax.get_yticklabels()] == list(rows)
    assert [t.get_text() for t in ax.texts] == ["0.90", "0.20"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first at the top
    plt.close(fig)


def test_turn_curves_are_means_with_bootstrap_bands() -> None:
    values = np.random.default_rng(0).random((20, 3))
    fig, ax = plt.subplots()
    drawn = plots.turn_curves(ax, {"base": values}, ylabel="share")
    mean, low, high = bootstrap(torch.tensor(values))
    assert ax.lines[0].get_xydata().tolist() == [[n + 1, m] for n, m in enumerate(mean.tolist())]
    box = ax.collections[0].get_paths()[0].get_extents()
    assert (box.ymin, box.ymax) == (low.min().item(), high.max().item())
    assert all(torch.equal(a, b) for a, b in zip(drawn["base"], (mean, low, high), strict=True))
    plt.close(fig)


def test_a_picture_for_a_widget_is_repeatable_described_and_closed() -> None:
    one, two = (plots.picture(draw(), **TEXTS) for _ in range(2))
    assert one == two and "data:image/webp;base64," in one
    assert f'alt="{html.escape(TEXTS["alt"])}"' in one
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ax: plots.dialogue_map(ax, np.zeros(3), TALK), r"\(3,\).*\(bins, bins\)"),
        (lambda ax: plots.difference_map(ax, np.zeros(3)), r"\(3,\).*\(Q, K\)"),
        (lambda ax: plots.head_overlap(ax, {"a": [(0, 0)], "b": []}, heads=4), "'b' has no head"),
        (lambda ax: plots.ablation(ax, {"a": (0.5, 0.6, 0.7)}, xlabel="x"), "'a': expected low"),
        (lambda ax: plots.heat_map(ax, np.zeros((2, 2, 2))), r"\(2, 2, 2\).*\(Q, K\)"),
        (lambda ax: plots.head_grid(ax, [1.0], bar="x"), r"\(1,\).*\(L, H\)"),
        (
            lambda ax: plots.curves(ax, [1, 2], {"y": [1.0]}, xlabel="x", ylabel="y"),
            r"'y' has shape \(1,\), x has \(2,\)",
        ),
    ],
)
def test_wrong_shapes_are_named(call: Any, message: str) -> None:
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match=message):
        call(ax)
    plt.close(fig)
