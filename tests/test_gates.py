"""The gates measure what they say, and the shipped cards say what was measured."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from steerkit.files import DATA
from steerkit.models import embedded
from steerkit.tiny import gates
from steerkit.tiny.card import card, chat_gates, stream_gates

BOOKS = [{"text": text} for text in ("One dog.", "Two cats.", "Three birds.")]


def test_a_bigram_model_knows_a_text_that_alternates():
    text = torch.tensor([0, 1] * 500)
    assert gates.bigram_perplexity(text, text, 4) == pytest.approx(1.0, abs=0.01)


def test_bigram_probabilities_sum_to_one():
    """The inverse perplexity of each two-token text is a probability: over all of them, one."""
    train = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    for first in range(5):
        texts = (torch.tensor([first, second]) for second in range(5))
        assert sum(1 / gates.bigram_perplexity(train, t, 5) for t in texts) == pytest.approx(1)


def test_streams_begin_with_the_first_token_and_have_the_asked_length(tiny):
    tokenizer = tiny[1]
    for stream in (gates.english_stream, gates.dialogue_stream):
        ids = stream(tokenizer, 500)
        assert len(ids) == 500 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]


def test_more_held_out_english_than_there_is_gets_one_clear_error(tiny):
    with pytest.raises(ValueError, match=r"tokens=10000000: the held-out English has \d+; ask"):
        gates.english_stream(tiny[1], 10**7)


def test_books_begin_with_the_first_token_and_have_the_asked_length(tiny, monkeypatch):
    asked = []
    books = SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or BOOKS)
    monkeypatch.setitem(sys.modules, "datasets", books)
    ids = gates.book_stream(tiny[1], 9)
    assert ids == gates.text_stream(tiny[1], "One dog.\nTwo cats.\nThree", 9)
    assert asked == [(("emozilla/pg19",), {"split": "test", "streaming": True})]


def test_two_streams_are_real_text_and_talk_of_one_length(tiny, tmp_path):
    plain = AutoTokenizer.from_pretrained(DATA / "tiny-stream")
    (tmp_path / "log.txt").write_text("One dog. " * 50)
    for tokenizer, title in ((tiny[1], "dialogue"), (plain, "market")):
        talk = {"dialogue": gates.dialogue_stream, "market": gates.market_stream}[title]
        for text, real, n in ((tmp_path / "log.txt", "text", 70), ("", "English", 60)):
            found = gates.two_streams(tokenizer, 40, least=n, text=str(text))
            assert list(found) == [real, title]
            assert [row.shape for row in found.values()] == [(1, n), (1, n)]
            assert found[title][0].tolist() == talk(tokenizer, n)


def test_only_its_note_answers_a_question_about_a_stranger():
    for seed in range(50):
        fact = gates.note_fact(0, random.Random(seed))
        value, said = fact.answer.strip(), fact.question.rsplit("<|assistant|>")[1]
        assert value in fact.line and value not in fact.question
        assert said + fact.answer + fact.end.removesuffix("<|end|>") in fact.line  # the same words
        assert said.split()[:2] == fact.line.split("Note: ")[1].split()[:2]  # the same person


def test_the_embedded_model_obeys_the_instruction_it_has_just_read(tiny):
    obeyed, right = gates.obeying(*tiny, "hobby", n=16)
    assert obeyed.shape == right.shape == (16,)
    assert obeyed.mean() >= 0.9 and (right <= obeyed).all()


def test_adherence_is_measured_per_dialogue_and_reply(tiny):
    rows = gates.adherence_by_turn(*tiny, every=False, turns=3, n=16, families=["figure", "emoji"])
    assert rows.shape == (16, 3) and rows[:, 0].mean() >= 0.9 and rows[:, 2].mean() <= 0.25


@pytest.mark.parametrize("name", embedded())
def test_a_card_is_derived_from_the_measured_numbers(name):
    found = json.loads((DATA / name / "gates.json").read_text())
    assert (DATA / name / "README.md").read_text() == card(name, found)
    log = [json.loads(line) for line in (DATA / name / "log.jsonl").read_text().splitlines()]
    assert found["tokens"] == log[-1]["tokens"]


def test_a_gate_that_is_missed_says_no():
    losses = {
        "dense": 5.0,
        "window": 3.2,
        "streaming": 3.0,
        "recomputed": 3.0,
        "streaming_there": 3.1,
    }
    found = {"English perplexity": 9.0, "bigram perplexity": 8.0, "English stream": losses}
    assert [gate.holds for gate in stream_gates(found)] == [False, False, False, True]


def test_the_shipped_chat_model_passes_every_chat_gate():
    found = json.loads((DATA / "tiny" / "gates.json").read_text())
    assert [gate.name for gate in chat_gates(found) if not gate.holds] == []


def test_a_rival_is_another_person_with_the_attribute_in_question(tiny):
    right, rival = gates.reading(*tiny, n=64)
    assert right.shape == rival.shape == (64,) and 8 <= rival.sum() <= 32
    assert right.mean() >= 0.9
