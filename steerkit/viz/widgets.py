"""Three explorers on ipywidgets: controls above, one page below that is drawn again when they move.

Where no front end can show controls (a headless run, a reader on a code host) the page drawn with
the defaults stands alone.
"""

import html
import os
import threading
from asyncio import TimerHandle, get_running_loop
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from IPython.display import display
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.attention.maps import attention_map, attention_received, span_share
from steerkit.chat import Message
from steerkit.spans import encode, find_turns, read_marks
from steerkit.steering.pasta import emphasise
from steerkit.streaming.losses import token_losses
from steerkit.viz.html import attention_page, token_texts
from steerkit.viz.plots import COLOURS, binned_text, curves, dialogue_map, picture

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase


class Explorer:
    """Named controls and a page that `draw(**values)` makes of them, as HTML.

    A change draws `delay` seconds after the last one, never while a drawing runs: what changed
    meanwhile is drawn after it. An error stands in the page until the next drawing. As the value of
    a notebook's cell it shows itself, controls included where a front end can move them (`live`
    None looks for one).
    """

    def __init__(
        self,
        draw: Callable[..., str],
        controls: Mapping[str, ipywidgets.Widget],
        *,
        delay: float = 0.3,
        live: bool | None = None,
    ) -> None:
        self.draw, self.controls, self.delay, self.live = draw, dict(controls), delay, live
        self.page = ipywidgets.HTML()
        self.box = ipywidgets.VBox([*self.controls.values(), self.page])
        self.timer: TimerHandle | None = None
        self.again, self.running = False, threading.Lock()
        for control in self.controls.values():
            control.observe(self._changed, "value")

    def _changed(self, _: object) -> None:
        try:
            loop = get_running_loop()
        except RuntimeError:  # outside a kernel nothing else waits: draw now
            self.refresh()
            return
        if self.timer is not None:
            self.timer.cancel()
        self.timer = loop.call_later(self.delay, self.refresh)

    def refresh(self) -> None:
        """Draw with the controls' values; again if they change while it draws."""
        self.again = True
        while self.again and self.running.acquire(blocking=False):
            try:
                self.again = False
                self.page.value = self._drawn()
            finally:
                self.running.release()

    def _drawn(self) -> str:
        try:
            return self.draw(**{name: c.value for name, c in self.controls.items()})
        except Exception as error:
            plt.close("all")
            said = f"{type(error).__name__}: {error}"
            return f'<p role="alert" style="color:#8C3A00"><b>{html.escape(said)}</b></p>'

    def show(self) -> None:
        """Draw once and display, if not live the page alone, for no reader could move controls.

        The page is also stored beside the controls, for readers without a kernel.
        """
        if get_ipython() is None:
            raise ValueError(
                "no notebook to show this in: call it in Jupyter, or use steerkit.attention.maps and "
                "steerkit.viz.plots in a script"
            )
        self.refresh()
        live = _front_end() if self.live is None else self.live
        bundle = self.box._repr_mimebundle_() if live else {"text/plain": "an explorer, not live"}
        display(bundle | {"text/html": self.page.value}, raw=True)

    _ipython_display_ = show


def _front_end() -> bool:
    """Was this kernel started by JupyterLab or Notebook, VS Code or Colab, and not by a runner?"""
    shell = get_ipython()
    named = {"__vsc_ipynb_file__", "__session__"} & set(getattr(shell, "user_ns", {}))
    return bool(named) or bool({"JPY_SESSION_NAME", "COLAB_JUPYTER_IP"} & set(os.environ))


# Attention


def explore_attention(
    model: Model,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    bins: int = 48,
    live: bool | None = None,
) -> Explorer:
    """Heat map of a dialogue, and its tokens shaded by what they get from one reply.

    Controls: layer, head, the reply's turn, maximum or mean, and how many first tokens to leave
    out.
    """
    ids, parts = find_turns(tokenizer, messages)
    replies = {t.number: (t.start, t.end) for t in parts if t.role == "assistant"}
    if not replies:
        raise ValueError("no assistant message: there is no reply to look from")
    texts, bins = token_texts(tokenizer, ids), min(bins, ids.shape[1])
    config = model.config.get_text_config()

    def draw(layer: str, head: str, turn: int, reduce: str, skip: int) -> str:
        where = _heads(config, layer, head)
        turn = min(replies, key=lambda n: abs(n - turn))  # a message may be without reply
        queries = replies[turn]
        found = attention_map(model, ids, bins=bins, reduce=reduce, skip=skip, heads=where)
        fig, ax = plt.subplots(figsize=(8.5, 6.2))
        dialogue_map(ax, found, parts, texts=binned_text(texts, bins))
        low, high = (row * bins / len(texts) - 0.5 for row in queries)
        ax.axhspan(low, high, fill=False, edgecolor=COLOURS[5], linewidth=1.5)
        kind = "Largest" if reduce == "max" else "Mean"
        of = f"{kind} weights of layer {layer}, head {head}"
        alt = f"Heat map of {len(texts)} tokens in {bins} bins, the reply of turn {turn} framed."
        weights = attention_received(model, ids, queries, reduce=reduce, heads=where)
        weights[:skip] = 0
        page = attention_page(texts, weights, parts, title=f"{of}, from the reply of turn {turn}")
        return picture(fig, caption=f"{of}; framed: the reply of turn {turn}.", alt=alt) + page

    last = max(replies)
    controls = {
        "layer": _choice("layer", ["all", *map(str, range(config.num_hidden_layers))]),
        "head": _choice("head", ["all", *map(str, range(config.num_attention_heads))]),
        "turn": _slider("turn", last, min(replies), last),
        "reduce": _choice("reduce", ["max", "mean"]),
        "skip": _slider("skip first", 1, 0, min(16, ids.shape[1] - 1)),
    }
    return Explorer(draw, controls, live=live)


def _heads(config: Any, layer: str, head: str) -> list[tuple[int, int]]:
    layers = range(config.num_hidden_layers) if layer == "all" else [int(layer)]
    heads = range(config.num_attention_heads) if head == "all" else [int(head)]
    return [(at, h) for at in layers for h in heads]


# Steering


def explore_steering(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    head_sets: Mapping[str, Iterable[tuple[int, int]]],
    *,
    max_new_tokens: int = 48,
    live: bool | None = None,
) -> Explorer:
    """Plain and steered replies to one user message, side by side.

    Controls: the message with **marks** around what to emphasise, alpha, and one of the named
    `head_sets`. Under each reply stands the share of attention that the marked words get when it
    begins, mean over the chosen heads.
    """
    sets = {name: [tuple(head) for head in heads] for name, heads in head_sets.items()}
    if not sets or not all(sets.values()):
        raise ValueError("no heads to steer: give at least one named set with a head in it")

    def draw(prompt: str, alpha: float, heads: str) -> str:
        messages, spans = read_marks(tokenizer, [Message("user", prompt)])
        inputs, spans = encode(tokenizer, [messages], [spans])
        inputs = inputs.to(model.device)

        def say() -> tuple[str, float]:
            share = span_share(model, inputs["input_ids"], spans[0])[..., -1]  # (L,H)
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = tokenizer.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            return text, torch.stack([share[head] for head in sets[heads]]).mean().item()

        plain = say()
        with emphasise(model, spans, sets[heads], alpha=alpha):
            steered = say()
        return _side_by_side({"plain": plain, f"steered, alpha {alpha:.3g}": steered})

    wide = ipywidgets.Layout(width="95%", height="5em")
    controls = {
        "prompt": ipywidgets.Textarea(prompt, description="message", layout=wide),
        "alpha": ipywidgets.FloatLogSlider(
            0.01, min=-4, max=0, step=0.25, description="alpha", continuous_update=False
        ),
        "heads": _choice("heads", list(sets)),
    }
    return Explorer(draw, controls, live=live)


def _side_by_side(replies: Mapping[str, tuple[str, float]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in replies)
    said = "".join(f"<td>{html.escape(text)}</td>" for text, _ in replies.values())
    shares = "".join(f"<td>{share:.3f} of attention</td>" for _, share in replies.values())
    return f"<table><tr>{head}</tr><tr>{said}</tr><tr>{shares}</tr></table>"


# Streaming


def explore_streaming(
    model: Model, ids: Tensor, *, sinks: int = 4, window: int = 64, live: bool | None = None
) -> Explorer:
    """Loss along a stream, ids (1,T), for a cache of sinks and a window; dense beside it.

    Controls: sinks and window. The curves are running means over T / 40 tokens.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 80:
        raise ValueError(f"ids of shape {tuple(ids.shape)}: expected (1, T) with 80 tokens or more")
    step = (ids.shape[1] - 1) // 40
    at = (torch.arange(40) + 0.5) * step
    dense: list[Tensor] = []  # the same for all settings, so made once

    def mean(losses: Tensor) -> Tensor:
        return losses[0, : 40 * step].unflatten(0, (40, step)).mean(1)

    def draw(sinks: int, window: int) -> str:
        if not dense:
            dense.append(mean(token_losses(model, ids)))
        cached = mean(token_losses(model, ids, sinks=sinks, window=window))
        fig, ax = plt.subplots()
        lines = {"dense": dense[0], f"cache {sinks}+{window}": cached}
        curves(
            ax, at, lines, xlabel="position in the stream (tokens)", ylabel="loss (nats per token)"
        )
        nats = f"dense {dense[0].mean():.3f}, cache {cached.mean():.3f} nats per token"
        alt = f"Loss by position in the stream: {nats} on average."
        return picture(
            fig, caption=f"Cache of {sinks} sinks and a window of {window}: {nats}.", alt=alt
        )

    controls = {
        "sinks": _slider("sinks", sinks, 0, 16),
        "window": _slider("window", window, 8, max(window, 256)),
    }
    return Explorer(draw, controls, live=live)


# Controls


def _choice(name: str, options: Sequence[str]) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, description=name)


def _slider(name: str, value: int, low: int, high: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(value, min=low, max=high, description=name)
