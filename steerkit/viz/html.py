"""A page of a dialogue with its tokens shaded by the attention they get: HTML without scripts.

Everything is inline (no script, no style sheet, no network), so that it is shown where active
content is stripped, and equal inputs are equal bytes.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steerkit.spans import Turn

# From white to dark blue in equal steps of lightness: darker is more, in grey as well.
_SHADES = (
    *("#fff", "#e3eef7", "#c6dcee", "#a4c8e3", "#7fb2d6"),
    *("#559ac8", "#2f7fb5", "#0a619c", "#04406b"),
)
_FIRST_WHITE = 7  # from this shade on white letters have the better contrast


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """What each token of ids (T,) or (1,T) adds to the text, its leading space included."""
    row = torch.as_tensor(ids).flatten().tolist()
    keep = {"clean_up_tokenization_spaces": False}
    alone = tokenizer.batch_decode([[i] for i in row], **keep)
    pairs = tokenizer.batch_decode([row[t - 1 : t + 1] for t in range(1, len(row))], **keep)
    # A pair shows the space between; where a character spans tokens, the token alone must do.
    joined = [
        pair[len(before) :] if pair.startswith(before) and pair != before else text
        for pair, before, text in zip(pairs, alone, alone[1:], strict=False)
    ]
    return [*alone[:1], *joined]


def attention_page(
    texts: Sequence[str],
    values: Any,
    turns: Sequence[Turn] = (),
    *,
    title: str,
    top: float | None = None,
) -> str:
    """HTML: one paragraph per message, tokens shaded by values (T,), with the number on hover.

    `texts` (T,) are the tokens, `title` says what is shown, `top` is the darkest shade's value (by
    default the largest one). About 60 bytes and the text for each token.
    """
    v = [float(x) for x in torch.as_tensor(values).flatten().tolist()]
    if not texts or len(v) != len(texts):
        raise ValueError(f"{len(v)} values for {len(texts)} tokens: expected one each, 1 or more")
    if not all(0 <= x < float("inf") for x in v):
        raise ValueError(f"values from {min(v)} to {max(v)}: expected finite numbers, 0 or more")
    top = top or max(v) or 1.0
    parts = turns or [Turn(0, "", 0, len(texts))]
    if (end := parts[-1].end) != len(texts):
        raise ValueError(f"turns of {end} tokens, a text of {len(texts)}: not the same text")
    body = "".join(_message(part, texts, v, top) for part in parts)
    head = f"<p><b>{html.escape(title)}</b> {_legend(top)}</p>"
    return f'<div style="background:#fff;color:#000;line-height:1.6">{head}{body}</div>'


def mask_page(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Sequence[int]]) -> str:
    """HTML of one tokenised training row: tokens that carry loss (label not -100) are dark."""
    carries_loss = [float(label != -100) for label in row["labels"]]
    texts = token_texts(tokenizer, row["input_ids"])
    return attention_page(texts, carries_loss, title="which tokens carry loss: 0 no, 1 yes", top=1)


def _message(part: Turn, texts: Sequence[str], values: Sequence[float], top: float) -> str:
    tokens = "".join(_token(texts[t], values[t], top) for t in range(part.start, part.end))
    name = f"{part.number} {part.role}" if part.role else ""
    return f"<p><small>{html.escape(name)}</small> {tokens}</p>\n"


def _token(text: str, value: float, top: float) -> str:
    shade = round(min(value / top, 1) * (len(_SHADES) - 1))
    style = f' style="background:{_SHADES[shade]}"' if shade else ""
    if shade >= _FIRST_WHITE:
        style = style[:-1] + ';color:#fff"'
    words = html.escape(text, quote=False).replace("\n", "↵<br>")
    return f'<i title="{value:.2g}"{style}>{words}</i>'


def _legend(top: float) -> str:
    """The shades, lightest first, between 0 and `top`."""
    steps = [n * top / (len(_SHADES) - 1) for n in range(len(_SHADES))]
    return f"0 {''.join(_token('  ', x, top) for x in steps)} {top:.2g}"
