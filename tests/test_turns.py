"""Where messages stand: each token in one turn, and each message's tokens say its text."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import Message, prompt_ids
from steerkit.spans import find_turns, reduce_by_turn

DIALOGUE = [
    Message("system", "Speak French."),
    Message("user", "What does Ada Lovelace like?"),
    Message("assistant", "Ada likes jam."),
    Message("user", "Repeat: She likes jam."),
    Message("assistant", "She likes jam."),
]


@pytest.fixture(scope="module")
def tokenizer(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return tiny[1]


def test_ids_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = find_turns(tokenizer, DIALOGUE)
    rows = [m._asdict() for m in DIALOGUE]
    assert ids.tolist() == [tokenizer.apply_chat_template(rows, return_dict=False)]
    opened, _ = find_turns(tokenizer, DIALOGUE[:4])
    assert ids[0, : opened.shape[1]].tolist() == prompt_ids(tokenizer, DIALOGUE[:4])[:-1]


def test_each_message_stands_where_its_text_does(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, found = find_turns(tokenizer, DIALOGUE)
    assert [(t.number, t.role) for t in found] == [
        (0, "system"),
        (1, "user"),
        (1, "assistant"),
        (2, "user"),
        (2, "assistant"),
    ]
    edges = [found[0].start, *(t.end for t in found)]
    assert edges[0] == 0 and edges[-1] == ids.shape[1]
    assert [t.start for t in found] == edges[:-1]  # no gap, no overlap
    for message, turn in zip(DIALOGUE[1:], found[1:], strict=True):
        text = tokenizer.decode(ids[0, turn.start : turn.end])
        assert text.replace(" ", "") == f"<|{message.role}|>{message.content}<|end|>".replace(
            " ", ""
        )


def test_by_turn_reduces_each_reply_over_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, found = find_turns(tokenizer, DIALOGUE)
    values = torch.rand(2, 3, ids.shape[1])
    one, two = found[2], found[4]
    wanted = [values[..., t.start : t.end].mean(-1) for t in (one, two)]
    assert torch.equal(reduce_by_turn(values, found), torch.stack(wanted, -1))
    most = reduce_by_turn(values, found, role="user", reduce=torch.amax)
    assert torch.equal(most[..., 1], values[..., found[3].start : found[3].end].amax(-1))


def test_a_template_that_rewrites_what_was_said_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="rewrites the end of message 0"):
        find_turns(forgetful, DIALOGUE)


def other_text(found: list) -> Tensor:
    return reduce_by_turn(torch.zeros(found[-1].end + 1), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda found: reduce_by_turn(torch.zeros(found[-1].end), found, role="tool"),
            "'tool'.*assist",
        ),
        (other_text, "different texts"),
    ],
)
def test_wrong_values_are_one_clear_error(
    tokenizer: PreTrainedTokenizerBase, call: Callable[[list], object], message: str
) -> None:
    _, found = find_turns(tokenizer, DIALOGUE)
    with pytest.raises(ValueError, match=message):
        call(found)


def test_no_messages_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no messages"):
        find_turns(tokenizer, [])
