"""Streams for the losses: any UTF-8 file, and chatter without end."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from steerkit.files import DATA
from steerkit.tiny import streams
from steerkit.tiny.world import market_chain


def test_a_file_is_read_as_its_text_would_be(tiny, tmp_path: Path):
    tokenizer, text = tiny[1], "Zwölf Boxkämpfer 🚀\njagen Viktor.\n" * 20
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    ids = streams.file_stream(tokenizer, path, 10**6)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert streams.file_stream(tokenizer, path, 17) == ids[:17]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Is a directory"),
        (b"", r"\d tokens, expected at least 50"),
        ("über".encode("latin-1"), "give the path of a text file in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_clear_line(tiny, tmp_path: Path, content, message):
    path = tmp_path if content is None else tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        streams.file_stream(tiny[1], path, 100, least=50)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_more_of_a_file_is_read_than_is_needed(tiny, tmp_path: Path):
    """Bytes that are no text, far behind the wanted tokens, are never decoded."""
    path = tmp_path / "log.txt"
    path.write_bytes(b"all is well\n" * 10_000 + b"\xff")
    assert len(streams.file_stream(tiny[1], path, 20)) == 20


def test_talk_never_closes_and_each_model_hears_its_own(tiny):
    market = AutoTokenizer.from_pretrained(DATA / "tiny-stream")
    titles = [streams.talk_title(tokenizer) for tokenizer in (tiny[1], market)]
    assert titles == ["dialogue", "market"]
    for tokenizer in (tiny[1], market):
        ids = streams.talk_stream(tokenizer, 3000)
        assert len(ids) == 3000 and ids == streams.talk_stream(tokenizer, 3500)[:3000]
        assert ids != streams.talk_stream(tokenizer, 3000, seed="another")
        texts = tokenizer.decode(ids[1:]).split("<|eos|>")[:-1]  # the last one is cut
        assert len(set(texts)) == len(texts) > 10
    words = {part for word in market_chain()[0] for part in word.split()}
    assert set(" ".join(texts).split()) <= words
