"""Explorers: debounced, never drawn twice at once, errors shown, static where nobody can move."""

import asyncio
import html
import threading
import time
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.attention.maps import span_share
from steerkit.chat import Message
from steerkit.spans import encode, find_turns, read_marks
from steerkit.steering.pasta import emphasise
from steerkit.viz import widgets
from steerkit.viz.widgets import (
    Explorer,
    explore_attention,
    explore_steering,
    explore_streaming,
)

TALK = [
    Message("user", "Language: French. Where does Ivan Garner live?"),
    Message("assistant", "Ivan Garner vit à Lima."),
    Message("user", "What is the job of Ivan Garner?"),
    Message("assistant", "Ivan Garner works as a <pilot>."),
]
Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Mime bundles that explorers display, as in a notebook that no front end is attached to."""
    bundles: list[dict[str, Any]] = []
    monkeypatch.setattr(widgets, "get_ipython", object)
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: bundles.append(bundle))
    for name in ("JPY_SESSION_NAME", "COLAB_JUPYTER_IP"):
        monkeypatch.delenv(name, raising=False)
    return bundles


class Drawing:
    """A draw function that notes its calls, and how many of them run at once."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.at_once = self.most = 0
        self.during = lambda: None

    def __call__(self, x: int) -> str:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.seen.append(x)
        self.during()
        self.at_once -= 1
        return f"drawn {x}"


def slider() -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(0, min=0, max=100)


def test_many_moves_are_one_drawing_of_the_last() -> None:
    drawing = Drawing()
    explorer = Explorer(drawing, {"x": slider()}, delay=0.05)

    async def move() -> None:
        for x in range(1, 6):
            explorer.controls["x"].value = x
            await asyncio.sleep(0)
        assert drawing.seen == []  # not while the hand still moves
        while not drawing.seen:
            await asyncio.sleep(0.01)

    asyncio.run(move())
    assert drawing.seen == [5] and explorer.page.value == "drawn 5"


def test_a_change_during_a_drawing_is_drawn_after_it() -> None:
    drawing = Drawing()
    explorer = Explorer(drawing, {"x": slider()})

    def nudge() -> None:
        explorer.controls["x"].value = min(3, drawing.seen[-1] + 1)  # outside a loop: at once

    drawing.during = nudge
    explorer.refresh()
    assert drawing.seen == [0, 1, 2, 3] and drawing.most == 1
    assert explorer.page.value == "drawn 3"


def test_two_threads_never_draw_at_once_and_the_last_values_stand() -> None:
    drawing = Drawing()
    explorer = Explorer(drawing, {"x": slider()})
    drawing.during = lambda: time.sleep(0.01)

    def move(start: int) -> None:
        for x in range(start, start + 5):
            explorer.controls["x"].value = x

    threads = [threading.Thread(target=move, args=(start,)) for start in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawing.most == 1
    assert explorer.page.value == f"drawn {explorer.controls['x'].value}"


def test_an_error_is_shown_escaped_and_gone_with_the_next_drawing() -> None:
    def draw(x: int) -> str:
        if x == 1:
            raise ValueError("x=1: <b>expected</b> another")
        return "fine"

    explorer = Explorer(draw, {"x": slider()})
    explorer.controls["x"].value = 1
    assert "ValueError: x=1: &lt;b&gt;expected" in explorer.page.value
    assert 'role="alert"' in explorer.page.value
    explorer.controls["x"].value = 2
    assert explorer.page.value == "fine"


def test_an_error_leaves_no_figure_open() -> None:
    def draw(x: int) -> str:
        plt.figure()
        raise ValueError("late")

    Explorer(draw, {"x": slider()}).refresh()
    assert plt.get_fignums() == []


def test_headless_it_is_drawn_once_and_the_page_stands_alone(shown: list[dict[str, Any]]) -> None:
    drawing = Drawing()
    Explorer(drawing, {"x": slider()})._ipython_display_()
    assert drawing.seen == [0]
    assert shown == [{"text/plain": "an explorer, not live", "text/html": "drawn 0"}]


@pytest.mark.parametrize("how", ["asked for", "JupyterLab"])
def test_live_the_controls_come_first_and_the_page_for_others(
    shown: list[dict[str, Any]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "JupyterLab":
        monkeypatch.setenv("JPY_SESSION_NAME", "/a/notebook.ipynb")
    explorer = Explorer(Drawing(), {"x": slider()}, live=True if how == "asked for" else None)
    explorer.show()
    (bundle,) = shown
    assert bundle[VIEW]["model_id"] == explorer.box.model_id
    assert bundle["text/html"] == "drawn 0"


def test_without_a_notebook_there_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="no notebook to show this in"):
        Explorer(Drawing(), {"x": slider()}).show()


def test_attention_explorer_draws_map_and_tokens_and_follows_its_controls(
    tiny: Tiny, shown: list[dict[str, Any]]
) -> None:
    explorer = explore_attention(*tiny, TALK, bins=12)
    explorer.show()
    first = shown[0]["text/html"]
    assert "data:image/webp;base64," in first and "<pilot>" not in first
    assert "from the reply of turn 2" in first
    again = explore_attention(*tiny, TALK, bins=12)
    again.refresh()
    assert again.page.value == first  # equal bytes
    pages = {first}
    for name, value in {"layer": "1", "head": "2", "turn": 1, "reduce": "mean", "skip": 3}.items():
        explorer.controls[name].value = value
        assert "alert" not in explorer.page.value
        pages.add(explorer.page.value)
    assert len(pages) == 6


def test_attention_explorer_asks_for_what_its_controls_say(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, drawn = [], []
    for name, found in {"attention_map": torch.zeros(12, 12), "received": torch.ones(99)}.items():
        monkeypatch.setattr(widgets, name, lambda *a, f=found, **k: asked.append((a[2:], k)) or f)
    monkeypatch.setattr(
        widgets, "attention_page", lambda texts, v, *_, title: f"{v.sum():.0f} {title}"
    )
    monkeypatch.setattr(widgets, "picture", lambda fig, **_: drawn.append(fig) or "")
    talk = [*TALK[:2], Message("user", "Hm."), Message("user", "Who?"), TALK[3]]
    explorer = explore_attention(*tiny, talk, bins=12)
    for name, value in {"layer": "1", "head": "2", "reduce": "mean", "skip": 3}.items():
        explorer.controls[name].value = value
    explorer.controls["turn"].value = 2  # without a reply: the nearest is that of turn 1
    (_, map_of), ((queries,), page_of) = asked[-2:]
    shared = {"reduce": "mean", "heads": [(1, 2)]}
    assert map_of == {"bins": 12, "skip": 3, **shared} and page_of == shared
    assert explorer.page.value.startswith("96 ") and "reply of turn 1" in explorer.page.value
    ids, parts = find_turns(tiny[1], talk)
    assert queries == (parts[1].start, parts[1].end)
    (frame,) = drawn[-1].axes[0].patches
    rows = [row * 12 / ids.shape[1] - 0.5 for row in queries]
    assert [frame.get_y(), frame.get_y() + frame.get_height()] == pytest.approx(rows)
    plt.close("all")


def test_steering_explorer_shows_both_replies_and_the_share_it_raised(tiny: Tiny) -> None:
    model, tokenizer = tiny
    text = "**Language: French.** Hobby: chess. Where does Ivan Garner live?"
    sets = {"all": [(layer, h) for layer in range(6) for h in range(6)], "one": [(3, 0)]}
    explorer = explore_steering(model, tokenizer, text, sets)
    explorer.refresh()
    messages, spans = read_marks(tokenizer, [Message("user", text)])
    inputs, spans = encode(tokenizer, [messages], [spans])
    share = span_share(model, inputs["input_ids"], spans[0])[..., -1].mean().item()
    out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    page = explorer.page.value
    assert f"<td>{html.escape(reply)}</td>" in page and f"<td>{share:.3f} of attention" in page
    steered = float(page.split(" of attention")[1].rsplit(">", 1)[1])
    assert steered > share + 0.2
    with emphasise(model, spans, sets["one"], alpha=0.1):
        (one,) = span_share(model, inputs["input_ids"], spans[0])[3, 0, -1:].tolist()
    explorer.controls["alpha"].value = 0.1
    explorer.controls["heads"].value = "one"
    assert f"<td>{one:.3f} of attention" in explorer.page.value
    explorer.controls["heads"].value = "all"
    explorer.controls["alpha"].value = 1  # the identity
    same = explorer.page.value
    assert same.count(f"{share:.3f} of attention") == 2 and same.count(html.escape(reply)) == 2
    explorer.controls["prompt"].value = "nothing marked"
    assert "ValueError: no marks" in explorer.page.value


def test_streaming_explorer_draws_each_setting(tiny: Tiny) -> None:
    ids = torch.randint(8, 500, (1, 121), generator=torch.Generator().manual_seed(0))
    explorer = explore_streaming(tiny[0], ids, sinks=2, window=200)
    explorer.refresh()
    assert "alert" not in explorer.page.value
    whole, dense = explorer.page.value.split("window of 200: ")[1].split(", cache ")
    assert whole.split()[1] == dense.split()[0]  # a window longer than the text is dense
    explorer.controls["window"].value = 8
    assert "window of 8" in explorer.page.value


def test_replies_are_escaped() -> None:
    assert "<td>&lt;b&gt;</td>" in widgets._side_by_side({"plain": ("<b>", 0.5)})


def test_streaming_explorer_measures_dense_once_and_the_cache_each_time(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    losses = lambda *_, **options: asked.append(options) or torch.zeros(1, 120)  # noqa: E731
    monkeypatch.setattr(widgets, "token_losses", losses)
    explorer = explore_streaming(tiny[0], torch.zeros(1, 121, dtype=torch.long))
    explorer.controls["sinks"].value = 1
    explorer.controls["window"].value = 9
    assert asked == [{}, {"sinks": 1, "window": 64}, {"sinks": 1, "window": 9}]


def test_bad_input_is_one_clear_error(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="no reply to look from"):
        explore_attention(*tiny, TALK[:1])
    with pytest.raises(ValueError, match="no heads"):
        explore_steering(*tiny, "**x** y", {"empty": []})
    with pytest.raises(ValueError, match=r"\(1, 79\).*80 tokens"):
        explore_streaming(tiny[0], torch.zeros(1, 79, dtype=torch.long))
