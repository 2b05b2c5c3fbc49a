"""The page of shaded tokens: inert, escaped, small, repeatable; the numbers are those given."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_rgb
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import Message
from steerkit.spans import Turn, find_turns
from steerkit.streaming.sink_cache import visible
from steerkit.viz.html import _SHADES, attention_page, cache_page, mask_page, token_texts

SHADES = [f"#{shade}" for shade in _SHADES]
TEXTS = ["Say", " <b>", ' "no" & go', "\n", "<script>alert(1)</script>"]
VALUES = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.123456])


class Page(HTMLParser):
    """What a browser would see: elements, the tokens' (number, style), and all text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        tokens = [attributes for tag, attributes in self.elements if tag == "i"]
        tokens = tokens[len(SHADES) :]  # the legend comes first
        self.numbers = [float(attributes["title"] or "") for attributes in tokens]
        self.styles = [attributes.get("style") or "background:#fff" for attributes in tokens]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_token_carries_its_number_and_text_and_nothing_can_run_or_load() -> None:
    texts, values = [*TEXTS, "javascript:x", "</div>"], [*VALUES.tolist(), 0, 0]
    turns = [Turn(1, "<u>", 0, 2), Turn(1, "assistant", 2, 7)]
    source = attention_page(texts, values, turns, title="<script>")
    page = Page(source)
    assert page.numbers == pytest.approx(values, rel=0.05)
    assert all(text.replace("\n", "↵") in page.text for text in texts)
    assert re.findall(r"<small>(.*?)</small>", source) == ["1 &lt;u&gt;", "1 assistant"]
    assert {tag for tag, _ in page.elements} == {"div", "p", "b", "small", "i", "br"}
    assert {name for _, attributes in page.elements for name in attributes} == {"style", "title"}
    assert "url(" not in source and "http" not in source and source.count("</div>") == 1


def test_the_colours_of_the_legend_take_room() -> None:
    """HTML collapses plain spaces, and an empty swatch has no width."""
    source = attention_page(TEXTS, VALUES, title="t")
    swatches = re.findall(r"<i[^>]*>(.*?)</i>", source)[: len(SHADES)]
    assert len(swatches) == len(SHADES) and all("\N{NO-BREAK SPACE}" in x for x in swatches)


def light(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_darker_is_more_the_nearest_shade_is_taken_and_letters_can_be_read() -> None:
    assert all(light(a) > light(b) + 0.03 for a, b in pairwise(SHADES))
    values = {0: 0, 0.06: 1, 0.19: 2, 0.3: 3, 0.4: 4, 0.5: 5, 0.61: 6, 0.7: 7, 0.8: 8}
    page = Page(attention_page(["x"] * len(values), list(values), title="t"))
    assert "0.8" in page.text
    for shade, style in zip(values.values(), page.styles, strict=True):
        assert f"background:{SHADES[shade]}" in style
        letters = 1.0 if ";color:#fff" in style else 0.0
        low, high = sorted((light(SHADES[shade]), letters))
        assert (high + 0.05) / (low + 0.05) >= 4.5, style


def test_equal_inputs_are_equal_bytes_and_4000_tokens_stay_below_300_kb() -> None:
    texts = [[" attention", ' "quoted"', " a<b", "."][i % 4] for i in range(4000)]
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    turns = [Turn(n // 2 + 1, "user", 20 * n, 20 * n + 20) for n in range(200)]
    one, two = (attention_page(texts, values, turns, title="t") for _ in range(2))
    assert one == two and len(one.encode()) <= 300_000


def test_token_texts_put_the_dialogue_together_and_a_mask_darkens_what_carries_loss(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = tiny[1]
    talk = [Message("user", "Where does Ada live, and why?"), Message("assistant", "In Lima <ok>.")]
    ids = find_turns(tokenizer, talk)[0][0].tolist()
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    page = Page(mask_page(tokenizer, {"input_ids": ids, "labels": labels}))
    assert page.numbers == [0] * (len(ids) - 3) + [1] * 3


def test_a_token_keeps_its_space_where_a_tokenizer_strips_it() -> None:
    class Stripping:  # a row alone loses its leading space, as with SentencePiece
        def batch_decode(self, rows: list[list[int]], **_: bool) -> list[str]:
            pieces = ["Hello", " you", "r", " ok"]
            return ["".join(pieces[i] for i in row).lstrip() for row in rows]

    assert token_texts(Stripping(), [0, 1, 2, 3]) == ["Hello", " you", "r", " ok"]


def test_turns_of_another_text_are_refused() -> None:
    with pytest.raises(ValueError, match="turns of 4 tokens, a text of 5"):
        attention_page(TEXTS, VALUES, [Turn(1, "user", 0, 4)], title="t")


def test_a_cache_strikes_out_what_it_evicted_and_numbers_the_slots_of_the_rest() -> None:
    page = cache_page(["A", " <b>", " cat", "\n", " sat"], visible(4, 1, 2), 1)
    assert (
        Page(page).text
        == "A0\u2009 <b> cat1\u2009↵2\u2009 sat3\u20095 tokens read, 4 kept, 1 evicted"
    )
    struck = re.findall(r"<s [^>]*>(.*?)</s>", page)
    assert struck == [" &lt;b&gt;"] and page.count("#b9e6d6") == 1
    assert "0 evicted" in cache_page(["A"], visible(0, 4, 8), 4)
