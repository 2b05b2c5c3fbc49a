"""Batched replies equal single ones, kept keys and values change none, templates are read once."""

from contextlib import contextmanager

import pytest
import tiny_models

import steerkit
from steerkit.chat import (
    BatchedChat,
    Message,
    as_messages,
    dialogue_ids,
    prompt_ids,
    reply,
    stop_ids,
    template_pieces,
)
from steerkit.gatt.dialogues import Plan
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.spans import find_turns
from steerkit.viz.widgets import explore_attention

QUESTIONS = ["Where does Anna Adler live?", "Tell me the pet of Boris Bloom. Hobby: chess.", "Hi."]


def user(*texts):
    """Dialogues of one user message each."""
    return [[Message("user", text)] for text in texts]


# Prompts


def test_ids_are_those_of_transformers(tiny):
    dialogue = [Message("user", "Hi."), Message("assistant", "Yes."), Message("user", "Who?")]
    dicts = [m._asdict() for m in dialogue]
    for opened, ids in ((True, prompt_ids), (False, dialogue_ids)):
        wanted = tiny[1].apply_chat_template(dicts, add_generation_prompt=opened, return_dict=False)
        assert ids(tiny[1], dialogue) == ids(tiny[1], dicts) == wanted
    assert prompt_ids(tiny[1], "Hi.") == tiny[1]("Hi.")["input_ids"]


def test_the_pieces_of_a_template_lie_around_the_contents(tiny):
    dialogue = [Message("user", "Hi."), Message("assistant", "user"), Message("user", "Hi.")]
    pieces = template_pieces(tiny[1], dialogue)
    assert pieces == [
        "<|bos|><|user|>", "<|end|><|assistant|>", "<|end|><|user|>", "<|end|><|assistant|>",
    ]  # fmt: skip


def test_a_template_that_leaves_a_message_out_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny[1], "chat_template", "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="shows the messages 0 of 0 to 1, and not each once"):
        template_pieces(tiny[1], [Message("user", "Hi."), Message("assistant", "Yes.")])


def plan_rows(model, tokenizer, dialogue):
    plan = Plan((), "", dialogue[2:])
    (sample,) = steerkit.sample_dialogues(model, tokenizer, [plan])
    return sample, steerkit.make_rows([sample]), adherence_by_turn(model, tokenizer, [plan]).replies


TAKES_MESSAGES = {
    "reply": lambda m, t, d: reply(m, t, [d]),
    "BatchedChat": lambda m, t, d: BatchedChat(m, t).reply([d]),
    "prompt_ids": lambda m, t, d: prompt_ids(t, d),
    "dialogue_ids": lambda m, t, d: dialogue_ids(t, d),
    "template_pieces": lambda m, t, d: template_pieces(t, d),
    "find_span": lambda m, t, d: steerkit.find_span(t, d, "pet"),
    "find_turns": lambda m, t, d: (find_turns(t, d)[0].tolist(), find_turns(t, d)[1]),
    "stream_chat": lambda m, t, d: [*steerkit.stream_chat(m, t, d[2:], window=60)],
    "explore_attention": lambda m, t, d: explore_attention(m, t, d),
    "Plan": plan_rows,
}
TALK = [Message("user", "Hi."), Message("assistant", "Yes."), Message("user", "Which pet has Ada?")]
WRONG = [
    "Hi.", TALK[0], [], [{"role": "user"}], [{"role": "bot", "content": "Hi."}],
    [{"role": "user", "content": None}], [{"role": "user", "content": "", "name": "Ada"}],
]  # fmt: skip


@pytest.mark.parametrize("call", TAKES_MESSAGES.values(), ids=TAKES_MESSAGES)
def test_messages_may_be_dicts_wherever_they_are_taken(tiny, call):
    """The format of transformers and of chat data sets."""
    assert call(*tiny, [m._asdict() for m in TALK]) == call(*tiny, TALK)
    with pytest.raises(ValueError, match=r"'bot'.*expected at least one message"):
        call(*tiny, [*TALK, {"role": "bot", "content": "Hi."}])


@pytest.mark.parametrize("dialogue", WRONG)
def test_what_is_no_dialogue_is_named(dialogue):
    with pytest.raises(ValueError, match="expected at least one message, in a list") as caught:
        as_messages(dialogue)
    assert str(caught.value).startswith(repr(dialogue))


# Replies


def test_a_reply_does_not_depend_on_its_batch(tiny):
    """Left padding, other lengths beside it: the greedy reply is the same."""
    dialogues = user(*QUESTIONS)
    alone = [reply(*tiny, [dialogue])[0] for dialogue in dialogues]
    assert reply(*tiny, dialogues, batch=2) == reply(*tiny, dialogues) == alone


def test_each_batch_is_generated_inside_its_context(tiny):
    """`steer` gets each padded batch once; spans move by the padding, and name the same tokens."""
    prompts, open_now, calls = user(*QUESTIONS), [], []
    spans = [[(2, len(prompt_ids(tiny[1], prompt)) - 2)] for prompt in prompts]

    @contextmanager
    def steer(batch):
        open_now.append(batch)
        yield
        calls.append(open_now.pop())

    assert reply(*tiny, prompts, steer=steer, batch=2) == reply(*tiny, prompts)
    assert sorted(i for batch in calls for i in batch.indices) == [0, 1, 2] and not open_now
    for batch in calls:
        for i, ids, [(start, end)] in zip(
            batch.indices, batch.inputs["input_ids"], batch.move(spans), strict=True
        ):
            assert tiny[1].decode(ids[start:end]) == QUESTIONS[i]


def test_stop_tokens_are_the_tokenizers_and_the_models(tiny, monkeypatch):
    model, tokenizer = tiny
    for ends, wanted in ((None, {6}), (9, {6, 9}), ([9, 8], {6, 8, 9})):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        assert set(stop_ids(model, tokenizer)) == wanted


# Dialogues whose keys and values stay cached


def test_a_kept_cache_gives_the_replies_of_fresh_prompts(tiny):
    """Dialogues of other lengths, a fork, a reply that is replaced, a selection."""
    chat, first = BatchedChat(*tiny), user(QUESTIONS[0], QUESTIONS[1])
    texts = chat.reply(first)
    assert texts == reply(*tiny, first) == chat.reply(first)  # and again, the prompt all cached

    def go_on(dialogues, answers, question):
        pairs = zip(dialogues, answers, strict=True)
        return [[*d, Message("assistant", a), Message("user", question)] for d, a in pairs]

    fork = go_on(first, texts, "What is your hobby?")
    assert chat.reply(fork) == reply(*tiny, fork)
    replaced = go_on(first, ["Oslo, of course."] * 2, "Hi.")
    assert chat.reply(replaced) == reply(*tiny, replaced)
    chat.select([1, 0, 1])
    swapped = go_on([replaced[i] for i in (1, 0, 1)], ["Hm."] * 3, QUESTIONS[0])
    assert chat.reply(swapped) == reply(*tiny, swapped)


def test_layers_with_a_sliding_window_reply_alike(tiny):
    """Such a window counts masked tokens, so the cache starts anew: also after a selection."""
    model, few = (
        tiny_models.tiny("mistral", vocab_size=4096, sliding_window=8),
        {"max_new_tokens": 12},
    )
    chat, dialogues = BatchedChat(model, tiny[1]), user(*QUESTIONS)
    for order in ([0, 1, 2], [2, 0, 0]):
        answers = chat.reply(dialogues, **few)
        assert answers == reply(model, tiny[1], dialogues, **few)
        chat.select(order)
        dialogues = [
            [*dialogues[i], Message("assistant", answers[i]), Message("user", "Hi.")] for i in order
        ]


def test_what_the_cache_holds_is_not_read_again(tiny, monkeypatch):
    model, tokenizer = tiny
    read, inner = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: read.append(k["input_ids"].numel()) or inner(*a, **k)
    )
    chat, messages = BatchedChat(*tiny), []
    for _ in range(4):
        messages.append(Message("user", QUESTIONS[0]))
        messages.append(Message("assistant", chat.reply([messages])[0]))
    assert sum(read) <= len(dialogue_ids(tokenizer, messages)) + 4
