"""Spans from text: brute force over all token ranges decides what the right answer is."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from steerkit.chat import Message, dialogue_ids, prompt_ids
from steerkit.spans import find_span, find_spans, find_turns, reduce_by_turn

TEXT = (
    "Reply in French.\n\nAnna likes tea, and the steak tastes of tea. Ça coûte 5 € 😀 naïve. "
    "你好, 世界! Reply in capitals: tea"
)
TRIMMED = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
DIALOGUE = [
    Message("system", "Reply in French."),
    Message("user", "Where does Anna live? Reply in French."),
    Message("assistant", "Anna lives in Rome."),
    Message("user", "What does Anna like?"),
]


def embedded() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "data" / "tiny")


def bytes_trimmed() -> PreTrainedTokenizerBase:
    """Byte-level BPE as GPT-2's: offsets leave the space in front of a word out."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), ByteLevelOffsets(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT, "tea steak Reply in French"] * 9, trainer)
    return wrapped(made)


def pieces() -> PreTrainedTokenizerBase:
    """Pieces with a leading mark for the space, as Llama's, and a first token added by itself."""
    made = Tokenizer(models.Unigram([("<s>", 0.0), ("<unk>", -9.0)], unk_id=1))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT, *(m.content for m in DIALOGUE), TRIMMED] * 9, trainer)
    made.post_processor = TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    return wrapped(made)


def wrapped(made: Tokenizer) -> PreTrainedTokenizerBase:
    out = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<s>")
    out.chat_template = TRIMMED
    return out


@pytest.fixture(scope="module", params=[embedded, bytes_trimmed, pieces])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.param()


def brute_force(tokenizer, ids, phrase):
    """Every token range that decodes to the phrase and would not if it were shorter."""
    n = len(ids)
    reads = {
        (a, b): tokenizer.decode(ids[a:b]).strip() == phrase
        for a in range(n)
        for b in range(a + 1, min(n, a + 30) + 1)
    }
    return [
        (a, b)
        for (a, b), same in reads.items()
        if same and not reads.get((a + 1, b)) and not reads.get((a, b - 1))
    ]


@pytest.mark.parametrize("phrase", ["Reply in French.", "tea", "Ça coûte", "😀", "世界", "naïve"])
def test_a_phrase_is_every_token_range_that_decodes_to_it(tokenizer, phrase):
    ids = tokenizer(TEXT)["input_ids"]
    wanted = brute_force(tokenizer, ids, phrase)
    assert find_spans(tokenizer, TEXT, phrase) == wanted
    assert len(wanted) == (TEXT.count(phrase) - TEXT.count("s" + phrase) or 1)
    assert find_span(tokenizer, TEXT, phrase, occurrence=-1) == wanted[-1]


def test_a_phrase_of_a_dialogue_is_found_in_its_prompt(tokenizer):
    ids = prompt_ids(tokenizer, DIALOGUE)
    for phrase, times in (("Reply in French.", 2), ("What does Anna like?", 1), ("Anna", 3)):
        spans = find_spans(tokenizer, DIALOGUE, phrase)
        assert spans == brute_force(tokenizer, ids, phrase) and len(spans) == times


# Turns


def test_each_message_stands_where_its_text_does(tokenizer):
    dialogue = [*DIALOGUE, DIALOGUE[2]]
    ids, turns = find_turns(tokenizer, dialogue)
    assert ids[0].tolist() == dialogue_ids(tokenizer, dialogue)
    assert [(t.number, t.role) for t in turns] == [
        (0, "system"), (1, "user"), (1, "assistant"), (2, "user"), (2, "assistant"),
    ]  # fmt: skip
    edges = [t.end for t in turns]
    assert [t.start for t in turns] == [0, *edges[:-1]] and edges[-1] == ids.shape[1]
    for message, turn in zip(dialogue, turns, strict=True):
        text = tokenizer.decode(ids[0, turn.start : turn.end])
        before, content, after = text.rpartition(message.content)
        assert content and len(before) <= len("<|bos|><|system|>") and len(after) <= len("<|end|>")


def test_a_reduction_by_turn_takes_each_reply_s_tokens():
    _, turns = find_turns(embedded(), [*DIALOGUE, DIALOGUE[2]])
    values = torch.rand(2, 3, turns[-1].end)
    replies = [values[..., t.start : t.end] for t in turns if t.role == "assistant"]
    means = reduce_by_turn(values, turns)
    assert torch.equal(means, torch.stack([x.mean(-1) for x in replies], -1))
    most = reduce_by_turn(values, turns, reduce=torch.amax)
    assert torch.equal(most, torch.stack([x.amax(-1) for x in replies], -1))


# Errors


class Slow:
    is_fast = False


def rewriting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A template that writes another end where a message is the last one."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: find_span(t, TEXT, "coffee"), "'coffee' is not in the prompt 'Reply in"),
        (lambda t: find_span(t, TEXT, "tea"), r"3 times: choose one by occurrence=0 to 2"),
        (lambda t: find_span(t, TEXT, "tea", occurrence=-4), "occurrence=-4"),
        (lambda t: find_span(t, TEXT, "  "), "is empty"),
        (lambda t: find_span(t, TEXT, "eply in Frenc"), "its tokens read ' ?Reply in French'"),
        (lambda t: find_turns(t, []), "at least one message"),
        (lambda t: find_turns(rewriting(t), DIALOGUE), "rewrites message 0"),
        (lambda t: reduce_by_turn(torch.zeros(1), find_turns(t, DIALOGUE)[1]), "different texts"),
        (lambda t: find_span(Slow(), TEXT, "tea"), "Slow does not say .* fast tokenizer"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(embedded())
