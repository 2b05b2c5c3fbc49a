"""Figures: accessible, repeatable, closed; helpers draw the numbers they are given."""

import html
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from steerkit import plots

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
        plots.use_style()
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


def test_loss_curve_reads_the_training_log() -> None:
    fig, ax = plt.subplots()
    plots.loss_curve(ax, [{"step": 50, "loss": 3.0}, {"step": 100, "loss": 2.0}])
    assert ax.lines[0].get_xydata().tolist() == [[50.0, 3.0], [100.0, 2.0]]
    plt.close(fig)


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
