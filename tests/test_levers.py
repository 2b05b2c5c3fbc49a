"""Levers that keep an instruction: each equals what it says in other words, and 1 or 0 is off."""

from functools import partial

import pytest
import torch

from steerkit.chat import Message, prompt_ids, reply
from steerkit.spans import find_span
from steerkit.steering.levers import guided, plain, repeated, steered
from steerkit.steering.other_methods import additive_bias

INSTRUCTION = "Hobby: chess."
QUESTIONS = ("Where does Anna Adler live?", "Which pet does Boris Bloom have?", "Who are you?")


def dialogue(turns, *, said=(0,), text=INSTRUCTION):
    """A dialogue whose replies forget the instruction; `text` leads the messages `said`."""
    messages = []
    for turn, question in enumerate(QUESTIONS[:turns]):
        content = f"{text} {question}" if turn in said else question
        messages += [Message("user", content), Message("assistant", "Boris Bloom has a dog.")]
    return messages[:-1]


DIALOGUES = [dialogue(turns) for turns in (3, 1, 2)]
INSTRUCTIONS = [INSTRUCTION] * 3


@pytest.mark.parametrize(
    "lever",
    [repeated(lambda turn, last: False), steered(partial(additive_bias, bias=0.0)), guided(1.0)],
    ids=["repeated nowhere", "0 nats", "scale 1"],
)
def test_off_is_the_plain_reply(tiny, lever):
    assert lever(*tiny, DIALOGUES, INSTRUCTIONS) == plain(*tiny, DIALOGUES)


def test_repetition_is_the_longer_dialogue(tiny):
    """In every message; in the latest one; another text there, which the reply does not obey."""
    every = repeated(lambda turn, last: True)(*tiny, DIALOGUES, INSTRUCTIONS)
    assert every == plain(*tiny, [dialogue(turns, said=(0, 1, 2)) for turns in (3, 1, 2)])
    assert all("I love chess." in text for text in every)
    latest = repeated(lambda turn, last: turn == last)(*tiny, DIALOGUES[:1], INSTRUCTIONS[:1])
    assert latest == plain(*tiny, [dialogue(3, said=(0, 2))])
    other = repeated(lambda turn, last: turn == last, text="Well then.")
    assert "chess" not in other(*tiny, DIALOGUES[:1], INSTRUCTIONS[:1])[0]


@pytest.mark.parametrize("said", [(0,), (0, 1)], ids=["said once", "quoted later"])
def test_steering_is_of_the_instruction_or_of_where_it_is_moved_to(tiny, said):
    model, tokenizer = tiny
    boost, asked = partial(additive_bias, bias=5.0), dialogue(3, said=said)
    for where in (lambda span, _: span, lambda span, _: (0, span[1]), lambda _, n: (n - 5, n - 2)):
        (text,) = steered(boost, where=where)(*tiny, [asked], INSTRUCTIONS[:1])
        span = find_span(tokenizer, asked, INSTRUCTION, occurrence=0)
        span = where(span, len(prompt_ids(tokenizer, asked)))
        with boost(model, [[span]]):
            assert [text] == reply(*tiny, [asked])


def test_guidance_is_the_formula_token_by_token(tiny):
    """No cache, no padding, no batch: g (log p(with) - log p(without)) + log p(without)."""
    model, tokenizer = tiny
    texts, plainly = guided(4.0)(*tiny, DIALOGUES, INSTRUCTIONS), plain(*tiny, DIALOGUES)
    assert texts != plainly
    for messages, text in zip(DIALOGUES, texts, strict=True):
        question = messages[0].content.removeprefix(f"{INSTRUCTION} ")
        both = [
            prompt_ids(tokenizer, m) for m in (messages, [Message("user", question), *messages[1:]])
        ]
        new = []
        for _ in range(len(tokenizer(text, add_special_tokens=False).input_ids)):
            logits = [model(torch.tensor([ids + new])).logits[0, -1] for ids in both]
            told, untold = (x.log_softmax(-1) for x in logits)
            new.append(int((4.0 * (told - untold) + untold).argmax()))
        assert tokenizer.decode(new) == text
