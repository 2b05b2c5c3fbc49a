"""The acceptance tests measure what they say, and the shipped cards say what was measured."""

import json
import random
import sys
from types import SimpleNamespace

import acceptance
import gatt_results
import pytest
import torch
from model_card import card, chat_criteria, stream_criteria
from train_tiny import RECIPES
from transformers import AutoTokenizer

from steerkit.chat import prompt_ids
from steerkit.constraints import Constraint
from steerkit.files import DATA
from steerkit.gatt.dialogues import Plan, history, sample_dialogues
from steerkit.tiny import streams

BOOKS = [{"text": text} for text in ("One dog.", "Two cats.", "Three birds.")]


def measured_of(name):
    return json.loads((DATA / name / "acceptance.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_is_derived_from_the_measured_numbers(name):
    measured = measured_of(name)
    assert (DATA / name / "README.md").read_text() == card(name, measured)
    log = [json.loads(line) for line in (DATA / name / "log.jsonl").read_text().splitlines()]
    assert measured["tokens"] == log[-1]["tokens"]


def test_the_shipped_chat_model_is_accepted_and_a_missed_criterion_says_no():
    assert [c.name for c in chat_criteria(measured_of("tiny")) if not c.holds] == []
    losses = {"dense": 5.0, "window": 3.2, "streaming": 3.0, "recomputed": 3.0}
    losses["streaming_there"] = 3.1
    measured = {"English perplexity": 9.0, "bigram perplexity": 8.0, "English stream": losses}
    assert [c.holds for c in stream_criteria(measured)] == [False, False, False, True]


def test_bigram_probabilities_sum_to_one_and_know_a_text_that_alternates():
    """The inverse perplexity of each two-token text is a probability: over all of them, one."""
    text = torch.tensor([0, 1] * 500)
    assert acceptance.bigram_perplexity(text, text, 4) == pytest.approx(1.0, abs=0.01)
    train = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    for first in range(5):
        texts = [torch.tensor([first, second]) for second in range(5)]
        perplexities = [acceptance.bigram_perplexity(train, text, 5) for text in texts]
        assert sum(1 / p for p in perplexities) == pytest.approx(1)


def test_the_embedded_model_obeys_what_it_has_just_read_and_reads_what_it_never_saw(tiny):
    """A rival is another person in the text with the attribute in question."""
    obeyed, right = acceptance.obeying(*tiny, "hobby", n=16)
    assert obeyed.mean() >= 0.9 and (right <= obeyed).all()
    right, rival = acceptance.reading(*tiny, n=64)
    assert 8 <= rival.sum() <= 32 and right.mean() >= 0.9


# What the trainings behind notebook 01 are measured by


def test_the_base_names_no_hobby_and_obeys_nothing_without_instruction(tiny):
    assert gatt_results.leak(*tiny, turns=2, n=8).mean() == 0
    assert gatt_results.untold(*tiny, n=2).mean() >= 0.8


def test_the_divergence_from_the_teacher_is_the_sum_over_the_vocabulary(tiny):
    """Zero at turn 1, where both read the same; later equal to a loop over single prompts."""
    model, tokenizer = tiny
    plan = Plan((Constraint("hobby", "chess"),), "Hobby: chess.", ("Who are you?", "Hi."))
    sample = sample_dialogues(*tiny, [plan], candidates=1)[0]
    measured = gatt_results.teacher_kl(model, model, tokenizer, [sample])
    assert measured.shape == (1, 2) and measured[0, 0] == pytest.approx(0, abs=1e-5)
    ids = tokenizer(sample.replies[1], add_special_tokens=False)["input_ids"]
    total = 0.0
    for k in range(len(ids)):
        prompts = [prompt_ids(tokenizer, history(sample, 1, every=e)) for e in (True, False)]
        logits = [model(torch.tensor([prompt + ids[:k]])).logits[0, -1] for prompt in prompts]
        p, q = (row.double().softmax(-1) for row in logits)
        total += (p * (p / q).log()).sum().item()
    assert measured[0, 1].item() == pytest.approx(total / len(ids), rel=1e-3)


# Streams


def test_books_are_one_text_after_the_first_token(tiny, monkeypatch):
    tokenizer, requests = tiny[1], []
    datasets = SimpleNamespace(load_dataset=lambda *a, **k: requests.append((a, k)) or BOOKS)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    ids = streams.book_stream(tokenizer, 9)
    assert len(ids) == 9 and ids[0] == tokenizer.bos_token_id not in ids[1:]
    assert ids == streams.text_stream(tokenizer, "One dog.\nTwo cats.\nThree", 9)
    assert requests == [(("emozilla/pg19",), {"split": "test", "streaming": True})]


def test_two_streams_are_real_text_and_talk_of_one_length(tiny, tmp_path):
    market = AutoTokenizer.from_pretrained(DATA / "tiny-stream")
    (tmp_path / "log.txt").write_text("One dog. " * 50)
    for tokenizer, title in ((tiny[1], "dialogue"), (market, "market")):
        for text, real, n in ((tmp_path / "log.txt", "text", 70), ("", "English", 60)):
            two = streams.two_streams(tokenizer, 40, least=n, text=str(text))
            assert {name: ids.shape for name, ids in two.items()} == {real: (1, n), title: (1, n)}
            assert two[title][0].tolist() == streams.talk_stream(tokenizer, n)


def test_only_its_note_answers_a_question_about_a_stranger():
    for seed in range(50):
        fact = streams.note_fact(0, random.Random(seed))
        value, start = fact.answer.strip(), fact.question.rsplit("<|assistant|>")[1]
        assert value in fact.line and value not in fact.question
        assert start + fact.answer + fact.end.removesuffix("<|end|>") in fact.line
        assert start.split()[:2] == fact.line.split("Note: ")[1].split()[:2]  # the same person
