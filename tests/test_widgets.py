"""Explorers: drawn once with the defaults, drawn again in place at each change, errors shown."""

import html
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from steerkit.attention.maps import attention_map, attention_received, span_share
from steerkit.chat import Message, prompt_ids, reply
from steerkit.spans import find_span, find_turns
from steerkit.steering.pasta import emphasise
from steerkit.viz import widgets
from steerkit.viz.widgets import chat_box, explore, explore_attention, explore_steering

TALK = [
    Message("user", "Language: French. Where does Ivan Garner live?"),
    Message("assistant", "Ivan Garner vit à Lima."),
    Message("user", "What is the job of Ivan Garner?"),
    Message("assistant", "Ivan Garner works as a <pilot>."),
]
Tiny = tuple[Model, Tokenizer]


class Screen:
    """What a notebook would show: the pages drawn, the last one at the end, and the controls."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.controls: dict[str, Any] = {}

    def display(self, shown: Any, display_id: bool = False) -> "Screen | None":
        if display_id:
            self.update(shown)
            return self
        self.controls = {control.description: control for control in shown.children}
        return None

    def update(self, page: Any) -> None:
        self.pages.append(page.data)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(widgets, "display", screen.display)
    return screen


def test_an_error_is_shown_escaped_closes_its_figure_and_goes_with_the_next_page(
    screen: Screen,
) -> None:
    def draw(x: int) -> str:
        if x == 1:
            plt.figure()
            raise ValueError("x=1: <b>expected</b> another")
        return "fine"

    explore(draw, {"x": ipywidgets.IntSlider(0)})
    assert screen.pages == ["fine"] and screen.controls["x"].continuous_update is False
    screen.controls["x"].value = 1
    assert "ValueError: x=1: &lt;b&gt;expected" in screen.pages[-1]
    assert 'role="alert"' in screen.pages[-1] and plt.get_fignums() == []
    screen.controls["x"].value = 2
    assert screen.pages[-1] == "fine"


def test_chat_box_keeps_a_history_by_model_and_begins_anew_with_another_instruction(
    screen: Screen,
) -> None:
    def echo(talk: list[Message]) -> str:
        return f"{len(talk)}: {talk[0].content} <b>"

    def broken(talk: list[Message]) -> str:
        if "break" in talk[-1].content:
            raise ValueError("no answer")
        return "yes" if len(talk) < 2 else "no"

    models = {"first": echo, "second": broken}
    judge = lambda instruction, text: text == "yes" if instruction == "A." else None  # noqa: E731
    chat_box(models, ["A.", "B."], ["one?", "two?"], judge=judge, beside="<p>card</p>")
    assert "3: A. one? &lt;b&gt;" in screen.pages[-1] and "card" in screen.pages[-1]
    assert screen.pages[-1].count("✓ obeys") == 1 and screen.pages[-1].count("✗ does not") == 3
    box = screen.controls["message"]
    for _ in range(2):  # the same text twice
        box.value = "three?"
    assert screen.pages[-1].count("three?") == 2 and "7: A. one?" in screen.pages[-1]
    box.value = "break"
    assert "no answer" in screen.pages[-1]
    box.value = "four?"
    assert "9: A. one?" in screen.pages[-1] and "break" not in screen.pages[-1]  # none half said
    screen.controls["instruction"].value = "B."
    assert "3: B. one?" in screen.pages[-1] and "three?" not in screen.pages[-1]
    assert "obey" not in screen.pages[-1]


def test_attention_explorer_follows_its_controls(
    tiny: Tiny, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [*TALK[:2], Message("user", "Hm."), Message("user", "Who?"), TALK[3]]
    explore_attention(*tiny, talk, bins=12)
    first = screen.pages[0]
    assert "data:image/webp;base64," in first and "<pilot>" not in first
    assert "from the reply of turn 3" in first
    assert screen.controls["turn"].options == (1, 3)  # turn 2 has no reply

    figures = []
    shaded = lambda texts, values, *_, title: f"{values.tolist()} {title}"  # noqa: E731
    monkeypatch.setattr(widgets, "attention_page", shaded)
    monkeypatch.setattr(widgets, "picture", lambda fig, **_: figures.append(fig) or "")
    changes = {"layer": 1, "head": 2, "reduce": "mean", "skip": 3, "turn": 1}
    for name, value in changes.items():
        screen.controls[name].value = value
    assert len(set(screen.pages)) == 6

    ids, turns = find_turns(tiny[1], talk)
    queries, chosen = (turns[1].start, turns[1].end), {"reduce": "mean", "heads": [(1, 2)]}
    received = attention_received(tiny[0], ids, queries, **chosen)
    received[:3] = 0
    assert f">{received.tolist()} " in screen.pages[-1]
    assert "reply of turn 1" in screen.pages[-1]
    axes = figures[-1].axes[0]
    weights = attention_map(tiny[0], ids, bins=12, skip=3, **chosen)
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().filled(0)).float(), weights)
    (frame,) = axes.patches
    rows = [query * 12 / ids.shape[1] - 0.5 for query in queries]
    assert [frame.get_y(), frame.get_y() + frame.get_height()] == pytest.approx(rows)
    plt.close("all")


def test_steering_explorer_shows_both_replies_and_the_share_it_raised(
    tiny: Tiny, screen: Screen
) -> None:
    model, tokenizer = tiny
    text = "Language: French. Hobby: chess. Where does Ivan Garner live?"
    phrase = "Language: French."
    sets = {"all": [(layer, h) for layer in range(6) for h in range(6)], "one": [(3, 0)]}
    explore_steering(model, tokenizer, text, phrase, sets)
    messages = [Message("user", text)]
    spans = [find_span(tokenizer, messages, phrase)]
    ids = torch.tensor([prompt_ids(tokenizer, messages)])
    (plain,) = reply(model, tokenizer, [messages], max_new_tokens=48)
    share = span_share(model, ids, spans)[..., -1].mean().item()
    page = screen.pages[-1]
    assert f">{html.escape(plain)}</td>" in page and f">{share:.3f} of attention" in page
    steered = float(page.split(" of attention")[1].rsplit(">", 1)[1])
    assert steered > share + 0.2

    with emphasise(model, [spans], sets["one"], alpha=0.1):
        one = span_share(model, ids, spans)[3, 0, -1].item()
    screen.controls["alpha"].value = 0.1
    named, grid = screen.controls["heads"].children
    by_name = {button.description: button for button in (*named.children, *grid.children)}
    drawn = len(screen.pages)
    by_name["one"].click()
    assert f">{one:.3f} of attention" in screen.pages[-1]
    assert len(screen.pages) == drawn + 1  # once for 36 buttons
    by_name["L1H2"].value = True  # clicked
    with emphasise(model, [spans], [(3, 0), (1, 2)], alpha=0.1):
        both = span_share(model, ids, spans)[..., -1]
    assert f">{(both[3, 0] + both[1, 2]) / 2:.3f} of attention" in screen.pages[-1]
    by_name["L3H0"].value = by_name["L1H2"].value = False
    assert "click a head" in screen.pages[-1]
    by_name["all"].click()
    assert all(button.value for button in grid.children)
    screen.controls["alpha"].value = 1  # the identity
    same = screen.pages[-1]
    assert same.count(f"{share:.3f} of attention") == 2 and same.count(html.escape(plain)) == 2

    screen.controls["alpha"].value = 0.1
    by_name["one"].click()
    screen.controls["prompt"].value = "Language: French. [Hobby: chess.] Who is Ivan [Garner]?"
    moved = [Message("user", "Language: French. Hobby: chess. Who is Ivan Garner?")]
    spans = [find_span(tokenizer, moved, text) for text in ("Hobby: chess.", "Garner")]
    ids = torch.tensor([prompt_ids(tokenizer, moved)])
    share = span_share(model, ids, spans)[3, 0, -1].item()
    assert f">{share:.3f} of attention" in screen.pages[-1] and "[" not in screen.pages[-1]
    for wrong, told in (("No mark.", "mark a phrase"), ("[]", "phrase is empty")):
        screen.controls["prompt"].value = wrong
        assert told in screen.pages[-1]


def test_a_dialogue_without_replies_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="no reply to look from"):
        explore_attention(*tiny, TALK[:1])
