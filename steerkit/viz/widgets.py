"""Explorers: a page drawn with the controls' first values, and the controls below it.

A page on a code host, or a run without a front end, shows what was drawn first. In a live notebook
each move of a control draws the page again, in its place.
"""

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import ipywidgets
import matplotlib.pyplot as plt
import torch
import traitlets
from IPython.display import HTML, display

from steerkit.attention.heads import Head, Heads, heads_by_layer, layer_and_head_counts
from steerkit.attention.maps import attention_map, attention_received, span_share
from steerkit.chat import Message, prompt_ids, reply
from steerkit.models import Model, Tokenizer
from steerkit.spans import find_spans, find_turns
from steerkit.steering.head_search import every_head
from steerkit.steering.pasta import emphasise
from steerkit.viz.html import attention_page, token_texts
from steerkit.viz.plots import COLOURS, heat_map, mark_turns, picture

WIDE = {"width": "40em"}


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table of texts, on the left of their cells (Jupyter puts them on the right)."""
    cell = '<td style="text-align:left">{}</td>'.format
    lines = ("".join(cell(html.escape(text)) for text in row) for row in rows)
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def side_by_side(*parts: str) -> str:
    """HTML of parts beside each other, or below where the page is narrow."""
    columns = "".join(f'<div style="flex:1 1 24em">{part}</div>' for part in parts)
    return f'<div style="display:flex;gap:2em;flex-wrap:wrap">{columns}</div>'


def explore(draw: Callable[..., str], controls: Mapping[str, ipywidgets.Widget]) -> None:
    """Display the HTML of `draw(**values)`, and the controls that have these values by name.

    A change draws the page again. An error then stands in the page until the next drawing.
    """

    def drawn() -> str:
        return draw(**{name: control.value for name, control in controls.items()})

    def redraw(_: object) -> None:
        try:
            page.update(HTML(drawn()))
        except Exception as error:
            plt.close("all")
            words = html.escape(f"{type(error).__name__}: {error}")
            page.update(HTML(f'<p role="alert" style="color:#8C3A00"><b>{words}</b></p>'))

    # One display that is updated, not the Output widget of `interactive_output`, which would draw a
    # second page beside the stored one, and on whose messages nbval fails.
    page = display(HTML(drawn()), display_id=True)
    for name, control in controls.items():
        control.description = name
        control.continuous_update = False  # draw when a slider is let go, not while it moves
        control.observe(redraw, "value")
    display(ipywidgets.VBox(list(controls.values())))


def chat_box(
    models: Mapping[str, Callable[[list[Message]], str]],
    instructions: Sequence[str],
    questions: Sequence[str],
    *,
    judge: Callable[[str, str], bool | None] = lambda instruction, reply: None,
    beside: str = "",
) -> None:
    """Chat with several models at once; each has its own replies as its history.

    `models` are functions (messages) -> reply by name. Another instruction (one of `instructions`,
    or typed) begins anew: it stands in the first message only, and `questions` are asked first.
    `judge(instruction, reply)` gives a tick, a cross, or None. `beside` is HTML to look things up.
    """
    begun: list[str] = []  # the instruction
    turns: list[list[str]] = []  # the user's text, and each model's reply
    marks = {True: "✓ obeys: ", False: "✗ does not obey: ", None: "(not judged) "}

    def send(text: str) -> None:
        replies = []
        for k, answer in enumerate(models.values(), start=1):
            talk = [Message(*m) for t in turns for m in (("user", t[0]), ("assistant", t[k]))]
            replies.append(answer([*talk, Message("user", text)]))
        turns.append([text, *replies])

    def draw(instruction: str, message: str) -> str:
        if begun != [instruction]:
            begun[:] = [instruction]
            turns.clear()
            for text in (f"{instruction} {questions[0]}", *questions[1:]):
                send(text)
        if message.strip():
            send(message)
            controls["message"].value = ""  # the same text can be sent again
        rows = [[text, *(marks[judge(*begun, r)] + r for r in replies)] for text, *replies in turns]
        return side_by_side(text_table([["user", *models], *rows]), beside)

    controls = {
        "instruction": ipywidgets.Combobox(
            value=instructions[0], options=list(instructions), layout=WIDE
        ),
        "message": ipywidgets.Text(placeholder="your next message, then Enter", layout=WIDE),
    }
    explore(draw, controls)


def explore_attention(
    model: Model, tokenizer: Tokenizer, messages: Sequence[Message], *, bins: int = 48
) -> None:
    """Heat map of a dialogue, and its tokens shaded by what they get from one reply.

    Controls: layer, head, the reply's turn, maximum or mean, and how many first tokens to leave
    out.
    """
    ids, turns = find_turns(tokenizer, messages)
    replies = {turn.number: (turn.start, turn.end) for turn in turns if turn.role == "assistant"}
    if not replies:
        raise ValueError("no assistant message: there is no reply to look from")
    texts, bins = token_texts(tokenizer, ids), min(bins, ids.shape[1])
    L, H = layer_and_head_counts(model)

    def draw(layer: int | str, head: int | str, turn: int, reduce: str, skip: int) -> str:
        layers = range(L) if layer == "all" else [layer]
        heads = range(H) if head == "all" else [head]
        chosen = {"reduce": reduce, "heads": [(x, y) for x in layers for y in heads]}
        _, ax = plt.subplots(figsize=(6, 4.8))
        heat_map(ax, attention_map(model, ids, bins=bins, skip=skip, **chosen))
        mark_turns(ax, turns)
        low, high = (query * bins / len(texts) - 0.5 for query in replies[turn])
        ax.axhspan(low, high, fill=False, edgecolor=COLOURS[5], linewidth=1.5)
        title = f"{reduce} weights of layer {layer}, head {head}"
        caption = f"{title}; framed: the reply of turn {turn}."
        alt = f"Heat map of {len(texts)} tokens in {bins} bins, the reply of turn {turn} framed."
        shown = picture(ax.figure, caption=caption, alt=alt)

        received = attention_received(model, ids, replies[turn], **chosen)
        received[:skip] = 0
        title += f", from the reply of turn {turn}"
        return side_by_side(shown, attention_page(texts, received, turns, title=title))

    controls = {
        "layer": ipywidgets.Dropdown(options=["all", *range(L)]),
        "head": ipywidgets.Dropdown(options=["all", *range(H)]),
        "turn": ipywidgets.SelectionSlider(options=list(replies), value=max(replies)),
        "reduce": ipywidgets.Dropdown(options=["max", "mean"]),
        "skip": ipywidgets.IntSlider(1, min=0, max=min(16, ids.shape[1] - 1)),
    }
    explore(draw, controls)


class HeadGrid(ipywidgets.VBox):
    """Heads to click, a row a layer, below a button for each named set; `value`: those chosen."""

    value = traitlets.Tuple()

    def __init__(self, model: Model, sets: Mapping[str, Heads]) -> None:
        size = layer_and_head_counts(model)
        cell = ipywidgets.Layout(width="auto", padding="0")
        self.buttons = {
            h: ipywidgets.ToggleButton(description=str(h), layout=cell) for h in every_head(*size)
        }
        for button in self.buttons.values():
            button.observe(self._read, "value")
        named = [ipywidgets.Button(description=name) for name in sets]
        for button in named:
            button.on_click(lambda button: self.choose(model, sets[button.description]))
        columns = {"grid_template_columns": f"repeat({size[1]}, 4em)"}
        grid = ipywidgets.GridBox(list(self.buttons.values()), layout=columns)
        super().__init__([ipywidgets.HBox(named), grid])
        self.choose(model, next(iter(sets.values())))

    def choose(self, model: Model, heads: Heads) -> None:
        """Press the buttons of these heads, and no other: one change of `value`."""
        chosen = heads_by_layer(model, heads)
        with self.hold_trait_notifications():
            for head, button in self.buttons.items():
                button.value = head.index in chosen.get(head.layer, ())

    def _read(self, _: object) -> None:
        self.value = tuple(head for head, button in self.buttons.items() if button.value)


def explore_steering(
    model: Model, tokenizer: Tokenizer, prompt: str, phrase: str, head_sets: Mapping[str, Heads]
) -> None:
    """Plain and steered replies to one user message, side by side.

    Controls: the message, in which [brackets] mark what is emphasised (at first the `phrase`);
    alpha; and the heads to click, with a button for each of `head_sets`. Under each reply stands
    the share of attention that the marked text gets when the reply begins, mean over the heads.
    """

    def draw(prompt: str, alpha: float, heads: tuple[Head, ...]) -> str:
        messages = [Message("user", re.sub(r"[][]", "", prompt))]
        marked = re.findall(r"\[(.*?)\]", prompt)
        if not (marked and heads):
            raise ValueError("nothing to steer: mark a phrase by [brackets] and click a head")
        spans = [span for text in marked for span in find_spans(tokenizer, messages, text)]
        ids = torch.tensor([prompt_ids(tokenizer, messages)])

        def column(name: str) -> list[str]:
            (words,) = reply(model, tokenizer, [messages])
            by_head = span_share(model, ids, spans)[..., -1]  # (L,H) of the last query
            share = torch.stack([by_head[head] for head in heads]).mean()
            return [name, words, f"{share:.3f} of attention"]

        columns = [column("plain")]
        with emphasise(model, [spans], heads, alpha=alpha):
            columns.append(column(f"steered, alpha {alpha:.3g}"))
        return text_table(zip(*columns, strict=True))

    controls = {
        "prompt": ipywidgets.Textarea(
            prompt.replace(phrase, f"[{phrase}]"), layout={"width": "95%", "height": "5em"}
        ),
        "alpha": ipywidgets.FloatLogSlider(0.01, min=-4, max=0, step=0.25),
        "heads": HeadGrid(model, head_sets),
    }
    explore(draw, controls)
