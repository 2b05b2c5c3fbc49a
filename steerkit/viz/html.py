"""A page of a dialogue with its tokens shaded by the attention they get: HTML without scripts.

Everything is inline (no script, no style sheet, no network), so that it is shown where active
content is stripped, and equal inputs are equal bytes.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steerkit.models import Tokenizer
from steerkit.spans import Turn

# From white to dark blue in equal steps of lightness, RGB: darker is more, in grey as well.
_SHADES = ["fff", "e3eef7", "c6dcee", "a4c8e3", "7fb2d6", "559ac8", "2f7fb5", "0a619c", "04406b"]
_FIRST_WHITE = 7  # from this shade on white letters have the better contrast


def token_texts(tokenizer: Tokenizer, ids: Any) -> list[str]:
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
    texts: Sequence[str], values: Any, turns: Sequence[Turn] = (), *, title: str
) -> str:
    """HTML: one paragraph per message, tokens shaded by values (T,), with the number on hover.

    `texts` (T,) are the tokens, `title` says what is shown; the largest value is the darkest. About
    60 bytes and the text for each token.
    """
    v = torch.as_tensor(values).flatten().tolist()
    if min(v) < 0:  # it would be shaded like a large one
        raise ValueError(f"a value of {min(v)}: expected 0 or more")
    turns = turns or [Turn(0, "", 0, len(texts))]
    if (end := turns[-1].end) != len(texts):
        raise ValueError(f"turns of {end} tokens, a text of {len(texts)}: not the same text")
    top = max(v) or 1.0
    tokens = [_token(text, value, top) for text, value in zip(texts, v, strict=True)]
    steps = range(len(_SHADES))
    legend = "".join(_token("\u00a0\u00a0", n * top / steps[-1], top) for n in steps)
    page = f"<p><b>{html.escape(title)}</b> 0 {legend} {top:.2g}</p>"
    for turn in turns:
        name = html.escape(f"{turn.number} {turn.role}") if turn.role else ""
        page += f"<p><small>{name}</small> {''.join(tokens[turn.start : turn.end])}</p>\n"
    return f'<div style="background:#fff;color:#000;line-height:1.6">{page}</div>'


def cache_page(texts: Sequence[str], kept: Sequence[int], sinks: int) -> str:
    """HTML of a text behind a bounded cache: evicted tokens struck out, kept ones with their slot.

    `texts` (T,) were read so far; `kept` are the numbers of those in the cache, by slot, of which
    the first `sinks` are shaded green.
    """
    slot_of = {token: slot for slot, token in enumerate(kept)}

    def token(number: int, text: str) -> str:
        words = html.escape(text, quote=False).replace("\n", "↵")
        if number not in slot_of:
            return f'<s style="color:#767676">{words}</s>'
        shade = "b9e6d6" if slot_of[number] < sinks else "c6dcee"
        return f'<b style="background:#{shade}">{words}<sub>{slot_of[number]}</sub></b>&thinsp;'

    page = "".join(token(number, text) for number, text in enumerate(texts))
    counts = f"{len(texts)} tokens read, {len(kept)} kept, {len(texts) - len(kept)} evicted"
    return f'<div style="background:#fff;color:#000;line-height:2"><p>{page}</p>{counts}</div>'


def mask_page(tokenizer: Tokenizer, row: Mapping[str, Sequence[int]]) -> str:
    """HTML of one tokenised training row: tokens that carry loss (label not -100) are dark."""
    carries_loss = [float(label != -100) for label in row["labels"]]
    texts = token_texts(tokenizer, row["input_ids"])
    return attention_page(texts, carries_loss, title="which tokens carry loss: 0 no, 1 yes")


def _token(text: str, value: float, top: float) -> str:
    shade = round(min(value / top, 1) * (len(_SHADES) - 1))
    letters = ";color:#fff" if shade >= _FIRST_WHITE else ""
    style = f' style="background:#{_SHADES[shade]}{letters}"' if shade else ""
    words = html.escape(text, quote=False).replace("\n", "↵<br>")
    return f'<i title="{value:.2g}"{style}>{words}</i>'
