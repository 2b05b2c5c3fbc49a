"""The page of shaded tokens: inert, escaped, small, repeatable; the numbers are those given."""

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_rgb
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import Message
from steerkit.spans import Turn, find_turns
from steerkit.viz.html import _SHADES, attention_page, token_texts

TEXTS = ["Say", " <b>", ' "no" & go', "\n", "<script>alert(1)</script>"]
VALUES = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.123456])


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text of tokens by hover text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_token_carries_its_number_and_text() -> None:
    page = Page(attention_page(TEXTS, VALUES, title="shares"))
    titles = [a["title"] for tag, a in page.elements if tag == "i"][-len(TEXTS) :]
    assert [float(t or "") for t in titles] == pytest.approx(VALUES.tolist(), rel=0.05)
    text = "".join(page.words)
    for piece in ("Say", " <b>", ' "no" & go', "↵", "<script>alert(1)</script>"):
        assert piece in text


def test_nothing_in_it_can_run_or_load() -> None:
    source = attention_page([*TEXTS, "javascript:x", "</div>"], [*VALUES, 0, 0], title="<script>")
    page = Page(source)
    assert {tag for tag, _ in page.elements} == {"div", "p", "b", "small", "i", "br"}
    assert {name for _, a in page.elements for name in a} == {"style", "title"}
    assert "url(" not in source and "http" not in source
    assert source.count("</div>") == 1


def test_darker_is_more_and_the_scale_is_given() -> None:
    def shade(value: float, top: float) -> str:
        (_, attributes) = Page(attention_page(["x"], [value], title="t", top=top)).elements[-1]
        return (attributes.get("style") or "background:#fff").split(";")[0].split(":")[1]

    grey = [
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(s), strict=True))
        for s in _SHADES
    ]
    assert all(a > b + 0.05 for a, b in pairwise(grey))
    wanted = {0: 0, 0.06: 1, 0.4: 4, 0.8: 8, 5: 8}  # the nearest shade
    assert [shade(x, 0.8) for x in wanted] == [_SHADES[i] for i in wanted.values()]
    assert "0.8" in "".join(Page(attention_page(["x"], [0.1], title="t", top=0.8)).words)


def test_the_largest_value_is_the_darkest_and_nothing_is_white() -> None:
    page = Page(attention_page(["a", "b"], [0.1, 0.2], title="t"))
    last = [a.get("style") or "" for tag, a in page.elements if tag == "i"][-2:]
    assert _SHADES[8] in last[1] and _SHADES[4] in last[0]
    nothing = Page(attention_page(["a"], [0.0], title="t")).elements[-1]
    assert nothing == ("i", {"title": "0"})


def test_letters_have_the_colour_that_can_be_read() -> None:
    def light(colour: str) -> float:  # relative luminance, as WCAG 2 defines it
        parts = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    page = Page(attention_page(["x"] * 9, torch.arange(9) / 8, title="t"))
    styles = [a.get("style") or "" for tag, a in page.elements if tag == "i"][-9:]
    for shade, style in zip(_SHADES, styles, strict=True):
        letters = 1.0 if "color:#fff" in style.replace("background:#fff", "") else 0.0
        low, high = sorted((light(shade), letters))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (shade, style)


def test_a_token_keeps_its_space_where_a_tokenizer_strips_it() -> None:
    class Stripping:  # a row alone loses its leading space, as with SentencePiece
        def batch_decode(self, rows: list[list[int]], **_: bool) -> list[str]:
            pieces = ["Hello", " you", "r", " ok"]
            return ["".join(pieces[i] for i in row).lstrip() for row in rows]

    assert token_texts(Stripping(), [0, 1, 2, 3]) == ["Hello", " you", "r", " ok"]


def test_messages_are_paragraphs_with_turn_and_role() -> None:
    parts = [Turn(1, "<u>", 0, 2), Turn(1, "assistant", 2, 5)]
    source = attention_page(TEXTS, VALUES, parts, title="t")
    names = re.findall(r"<small>(.*?)</small>", source)
    assert names == ["1 &lt;u&gt;", "1 assistant"]
    first, second = source.split("<p>")[2:]
    assert html.escape(TEXTS[1], quote=False) in first and "↵" in second


def test_equal_inputs_are_equal_bytes_and_4000_tokens_stay_below_300_kb() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [[" attention", ' "quoted"', " a<b", "."][i % 4] for i in range(4000)]
    values = torch.rand(4000, generator=generator)
    parts = [Turn(n // 2 + 1, "user", 20 * n, 20 * n + 20) for n in range(200)]
    one, two = (attention_page(texts, values, parts, title="t") for _ in range(2))
    assert one == two
    assert len(one.encode()) <= 300_000


def test_token_texts_put_the_dialogue_together_again(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = tiny[1]
    said = [Message("user", "Where does Ada live, and why?"), Message("assistant", "In Lima <ok>.")]
    ids, _ = find_turns(tokenizer, said)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == ids.shape[1]
    assert "".join(texts) == tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_page([], [], title="t"), "no tokens"),
        (lambda: attention_page(TEXTS, [0.1], title="t"), "1 values for 5 tokens"),
        (lambda: attention_page(["x"], [float("nan")], title="t"), "finite"),
        (lambda: attention_page(["x"], [-1.0], title="t"), "0 or more"),
        (
            lambda: attention_page(TEXTS, VALUES, [Turn(1, "user", 0, 4)], title="t"),
            "4 tokens, text of 5",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
