"""Batched replies equal single ones, and dialogues are played with the model's own replies."""

from steerkit.chat import Message, chat_batch, prompt_ids, reply

QUESTIONS = ["Where does Anna Adler live?", "Tell me the pet of Boris Bloom. Hobby: chess.", "Hi."]


def test_a_reply_does_not_depend_on_its_batch(tiny):
    """Left padding, other lengths beside it: the greedy reply is the same."""
    dialogues = [[Message("user", text)] for text in QUESTIONS]
    alone = [reply(*tiny, [dialogue])[0] for dialogue in dialogues]
    assert reply(*tiny, dialogues, batch=2) == reply(*tiny, dialogues) == alone


def test_a_prompt_is_the_template_opened_for_the_assistant(tiny):
    tokenizer = tiny[1]
    text = tokenizer.decode(prompt_ids(tokenizer, [Message("user", "Hi.")]))
    assert text == "<|bos|><|user|>Hi.<|end|><|assistant|>"


def test_play_feeds_each_reply_back(tiny):
    users = [[QUESTIONS[0], QUESTIONS[2]], [QUESTIONS[1], QUESTIONS[0]]]
    for texts, replies in zip(users, chat_batch(*tiny, users), strict=True):
        history = [Message("user", texts[0]), Message("assistant", replies[0])]
        assert replies[1] == reply(*tiny, [[*history, Message("user", texts[1])]])[0]
