"""PASTA's four tasks (2311.02262, section 5): prompt, emphasised span, answer, and metrics.

An example emphasises a phrase of its prompt; a task says how replies are scored: the paper's way,
and strictly (the whole reply is right). What is drawn or loaded stands in `task_data`. Scores are
(n,) tensors of 0..1, one number per example, so that intervals can be computed.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput

from steerkit.chat import Message
from steerkit.spans import encode, find_span
from steerkit.steering.head_search import Prompt

Steer = Callable[[PreTrainedModel, object], AbstractContextManager]
"""(model, spans) -> a `with`; for PASTA `partial(emphasise, heads=..., alpha=...)`."""


class Example(NamedTuple):
    """One prompt of a task.

    `span` is the phrase that is emphasised, `answer` the whole right reply, `value` what it must
    state. `kept`: phrases of a right reply that the span says nothing about. `candidates`: `value`
    and its rivals, where the paper compares their probabilities. `paraphrases`: the same question
    in other words. `source`: the text that is to be rewritten.
    """

    messages: tuple[Message, ...]
    span: str
    answer: str
    value: str
    kept: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    paraphrases: tuple[tuple[Message, ...], ...] = ()
    source: str = ""


Metric = Callable[[str, Example], float]


@dataclass(frozen=True)
class Task:
    """`draw(rng, conflict, split)` makes one example of the tiny world; metrics score replies."""

    name: str
    title: str
    draw: Callable[[random.Random, bool, str], Example]
    strict: Metric
    paper: Mapping[str, Metric] = field(default_factory=dict)
    compare: Mapping[str, str] = field(default_factory=dict)  # name -> "prompt" or "paraphrases"

    def examples(
        self, n: int, *, seed: int, split: str = "test", conflict: bool = True
    ) -> list[Example]:
        """`n` examples; nobody and nothing asked in split "profile" is asked in split "test".

        Without `conflict` nothing in the prompt competes with the span: the easy form.
        """
        if split not in ("profile", "test"):
            raise ValueError(f'split="{split}": expected "profile" or "test"')
        rng = random.Random(f"{self.name} {split} {conflict} {seed}")
        return [self.draw(rng, conflict, split) for _ in range(n)]


# --- metrics on one reply ----------------------------------------------------------------------


def json_paper(reply: str, _: Example) -> float:
    """F. Acc as published: some {...} in the reply parses."""
    return float(bool(_objects(reply)))


def json_value_paper(reply: str, example: Example) -> float:
    """P. Acc as published: some {...} in the reply parses and states the value."""
    return float(any(_states(json.dumps(o), example.value) for o in _objects(reply)))


def json_strict(reply: str, example: Example) -> float:
    """The whole reply is one JSON object, and states exactly what the right one states."""
    try:
        found, wanted = json.loads(reply), json.loads(example.answer)
    except ValueError:
        return 0.0
    return float(isinstance(found, dict) and _folded(found) == _folded(wanted))


def pronouns_paper(reply: str, example: Example) -> float:
    """Acc as published: share of the source's she and he that is gone; empty replies score 1."""
    return _gone(reply, example.source, {"she", "he"})


def all_pronouns_paper(reply: str, example: Example) -> float:
    """A. Acc as published: the same for all forms (her, his, himself, ...)."""
    return _gone(reply, example.source, _PRONOUNS)


def pronouns_strict(reply: str, example: Example) -> float:
    """They stands in the reply, no she or he of any form, and the rest of the source is kept.

    With an exact `answer` the reply must equal it; otherwise 80 % of the source's words are asked
    for, verbs in either number.
    """
    words = _words(reply)
    if not {"they", "them", "their", "theirs"} & set(words) or _PRONOUNS & set(words):
        return 0.0
    if example.answer:
        return exact(reply, example)
    said = {_stem(w) for w in words}
    content = [_stem(w) for w in _words(example.source) if w not in _PRONOUNS]
    return float(sum(w in said for w in content) >= 0.8 * len(content))


def exact(reply: str, example: Example) -> float:
    """The reply is the answer, word for word."""
    return float(reply.split() == example.answer.split())


def first_words(reply: str, example: Example) -> float:
    """The reply begins with the answer: for models that go on with a text."""
    wanted = _words(example.answer)
    return float(bool(wanted) and _words(reply)[: len(wanted)] == wanted)


def states_value(reply: str, example: Example) -> float:
    """The value stands in the reply, and none of its rivals."""
    rivals = [c for c in example.candidates if c != example.value]
    return float(_states(reply, example.value) and not any(_states(reply, r) for r in rivals))


def kept(reply: str, example: Example) -> float:
    """What the span says nothing about is still right: all phrases of `example.kept` are there."""
    return float(bool(reply.strip()) and all(_states(reply, phrase) for phrase in example.kept))


def fluency(reply: str) -> float:
    """Weighted entropy (bits) of the reply's bi- and trigrams, 2/3 and 4/3, as in ROME (2202.05262)
    and PASTA: repeating oneself scores low, and so does a short reply."""
    words = reply.split()
    parts = [(2 / 3, _entropy(words, 2)), (4 / 3, _entropy(words, 3))]
    return sum(weight * bits for weight, bits in parts) / 2


def consistency(replies: Sequence[str], references: Sequence[str]) -> list[float]:
    """Cosine of tf-idf word vectors of each reply and its reference, idf over the references."""
    bags = [Counter(_words(text)) for text in references]
    frequency = Counter(word for bag in bags for word in bag)
    idf = {w: math.log((1 + len(bags)) / (1 + n)) + 1 for w, n in frequency.items()}
    rare = math.log(1 + len(bags)) + 1

    def weigh(bag: Counter[str]) -> dict[str, float]:
        return {word: count * idf.get(word, rare) for word, count in bag.items()}

    return [
        _cosine(weigh(Counter(_words(r))), weigh(b)) for r, b in zip(replies, bags, strict=True)
    ]


_PRONOUNS = {"she", "he", "her", "him", "hers", "his", "herself", "himself"}
_PLURAL = {"is": "are", "was": "were", "has": "have", "does": "do", "goes": "go"}


def _objects(text: str) -> list[dict]:
    """Every {...} of the text that parses, longest first from each opening brace."""
    found, decoder = [], json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text[match.start() :])
        except ValueError:
            continue
        found.append(value)
    return found


def _folded(value: object) -> object:
    return json.loads(json.dumps(value, ensure_ascii=False).casefold())


def _states(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _gone(reply: str, source: str, pronouns: set[str]) -> float:
    before = sum(w in pronouns for w in _words(source))
    after = sum(w in pronouns for w in _words(reply))
    return max(0.0, 1 - after / before) if before else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _stem(word: str) -> str:
    return _PLURAL.get(word, word.removesuffix("s"))


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def _cosine(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(x * b.get(w, 0.0) for w, x in a.items()) / norm if norm else 0.0


# --- other ways to ask: Table 1's baselines ----------------------------------------------------


def marked(example: Example, mark: str = "*") -> Example:
    """The span between two marks, asterisks or quotes."""
    return _each(example, lambda m: _with_marks(m, example.span, mark))._replace(
        span=f"{mark}{example.span}{mark}"
    )


def few_shot(example: Example, shots: Sequence[Example]) -> Example:
    """`shots` with their right answers as earlier exchanges; a system message of theirs opens
    their own first message, so that each shot shows its instruction."""
    history: list[Message] = []
    for shot in shots:
        told = "".join(f"{m.content} " for m in shot.messages if m.role == "system")
        asked = [m for m in shot.messages if m.role != "system"]
        asked[0] = asked[0]._replace(content=told + asked[0].content)
        history += [*asked, Message("assistant", shot.answer)]
    return _each(example, lambda m: _after(m, history))


def prompted(examples: Sequence[Example], shots: Sequence[Example]) -> dict[str, list[Example]]:
    """The examples by how they are asked, as in the paper's tables: no model is touched."""
    return {
        "zero-shot": list(examples),
        "*-marked": [marked(e, "*") for e in examples],
        '"-marked': [marked(e, '"') for e in examples],
        "few-shot": [few_shot(e, shots) for e in examples],
    }


Messages = tuple[Message, ...]


def _each(example: Example, change: Callable[[Messages], Messages]) -> Example:
    """The same change in the prompt and in its paraphrases."""
    paraphrases = tuple(change(m) for m in example.paraphrases)
    return example._replace(messages=change(example.messages), paraphrases=paraphrases)


def _after(messages: Messages, history: Sequence[Message]) -> Messages:
    first = [m for m in messages if m.role == "system"]
    return (*first, *history, *(m for m in messages if m.role != "system"))


def _with_marks(messages: Messages, span: str, mark: str) -> Messages:
    """The last message that holds the span, with marks around it."""
    for i in reversed(range(len(messages))):
        before, found, after = messages[i].content.rpartition(span)
        if found:
            new = messages[i]._replace(content=f"{before}{mark}{span}{mark}{after}")
            return (*messages[:i], new, *messages[i + 1 :])
    raise ValueError(f"span {span!r} is not in the prompt {messages[-1].content[:60]!r}")


# --- a model on examples -----------------------------------------------------------------------


class Measured(NamedTuple):
    """The replies, and for each score its (n,) values."""

    replies: list[str]
    scores: dict[str, Tensor]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    *,
    steer: Steer | None = None,
    max_new_tokens: int = 48,
    batch: int = 64,
    probabilities: bool = True,
) -> Measured:
    """Greedy replies and all scores: "strict", the paper's, "kept", "fluency" (bits),
    "consistency". Without `probabilities` those that compare candidates are left out."""
    replies = generate(
        model, tokenizer, examples, steer=steer, max_new_tokens=max_new_tokens, batch=batch
    )
    pairs = list(zip(replies, examples, strict=True))
    metrics: dict[str, Metric] = {"strict": task.strict, **task.paper, "kept": kept}
    scores = {name: [metric(r, e) for r, e in pairs] for name, metric in metrics.items()}
    scores["fluency"] = [fluency(r) for r in replies]
    scores["consistency"] = consistency(replies, [e.answer or e.source for e in examples])
    found = {name: torch.tensor(values) for name, values in scores.items()}
    for name, asked in task.compare.items() if probabilities else ():
        found[name] = compare(model, tokenizer, examples, asked=asked, steer=steer, batch=batch)
    return Measured(replies, found)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    steer: Steer | None = None,
    max_new_tokens: int = 48,
    batch: int = 64,
) -> list[str]:
    """The greedy reply to each example, in batches with left padding."""
    order = sorted(range(len(examples)), key=lambda i: _length(examples[i].messages))
    replies = [""] * len(examples)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        out = _continue(model, tokenizer, [examples[i] for i in rows], steer, max_new_tokens)
        texts = tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            replies[i] = text.strip()
    return replies


def _length(messages: Sequence[Message]) -> int:
    return sum(len(m.content) for m in messages)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    asked: str = "prompt",
    steer: Steer | None = None,
    batch: int = 64,
) -> Tensor:
    """Is the value the most probable of the candidates where the answer states it? (n,) of 0..1.

    By the candidates' first tokens, after the answer's words before the value. ES of PASTA's
    CounterFact; with asked="paraphrases" its PS, a mean over them; on BiasBios its accuracy.
    """
    if asked == "paraphrases":
        rows = [(i, e._replace(messages=m)) for i, e in enumerate(examples) for m in e.paraphrases]
        if len({i for i, _ in rows}) < len(examples):
            raise ValueError("an example has no paraphrases to compare its candidates on")
    else:
        rows = list(enumerate(examples))
    totals, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
    rows.sort(key=lambda row: _length(row[1].messages))
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        for (i, _), won in zip(
            some, _won(model, tokenizer, [e for _, e in some], steer), strict=True
        ):
            totals[i] += won
            counts[i] += 1
    return totals / counts


def _won(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    steer: Steer | None,
) -> list[bool]:
    """The answer's words before the value are forced as if generated; then the next logits."""
    before = [e.answer[: e.answer.rindex(e.value)].rstrip() for e in examples]
    forced = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in before]
    steps = 1 + max(map(len, forced))
    logits = _continue(model, tokenizer, examples, steer, steps, forced).logits
    won = []
    for row, (ids, e) in enumerate(zip(forced, examples, strict=True)):
        first = [_first_token(tokenizer, e, candidate) for candidate in e.candidates]
        won.append(int(logits[len(ids)][row, first].argmax()) == e.candidates.index(e.value))
    return won


class _Force(LogitsProcessor):
    """Row r writes the tokens forced[r] first."""

    def __init__(self, forced: Sequence[Sequence[int]], start: int) -> None:
        self.forced, self.start = forced, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        for row, ids in enumerate(self.forced):
            if step < len(ids):
                scores[row] = -torch.inf
                scores[row, ids[step]] = 0.0
        return scores


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    steer: Steer | None,
    steps: int,
    forced: Sequence[Sequence[int]] = (),
) -> GenerateDecoderOnlyOutput:
    """One batch of greedy replies, padded on the left, steered towards each example's span."""
    asked = [_prompt(tokenizer, e.messages) for e in examples]
    spans = [
        [_span(tokenizer, p, e)] if steer else [] for p, e in zip(asked, examples, strict=True)
    ]
    inputs, spans = encode(tokenizer, asked, spans)
    start = inputs["input_ids"].shape[1]
    options = {"logits_processor": [_Force(forced, start)], "output_logits": True} if forced else {}
    with steer(model, spans) if steer else nullcontext():
        out = model.generate(
            **inputs.to(model.device),
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
    out.sequences = out.sequences[:, start:]
    return out


def _first_token(tokenizer: PreTrainedTokenizerBase, example: Example, word: str) -> int:
    at = example.answer.rindex(example.value)
    space = " " if at == 0 or example.answer[at - 1].isspace() else ""
    return tokenizer(space + word, add_special_tokens=False)["input_ids"][0]


# --- examples as token ids ---------------------------------------------------------------------


def prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Prompt]:
    """What the head search scores: the prompt's ids, its span, the right answer's ids."""
    return [prompt(tokenizer, example) for example in examples]


def prompt(tokenizer: PreTrainedTokenizerBase, example: Example, *, end: bool = True) -> Prompt:
    """One example as token ids; with `end` the answer ends as a reply does."""
    if not example.answer.strip():
        raise ValueError(
            f"example without answer ({example.messages[-1].content[:60]!r}): the score of a head "
            "is the answer's log-probability; give one"
        )
    opened = _open(tokenizer, example)
    space = "" if tokenizer.chat_template else " "
    answer = tokenizer(space + example.answer, add_special_tokens=False)["input_ids"]
    if end and tokenizer.chat_template and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return opened._replace(answer=answer)


def _open(tokenizer: PreTrainedTokenizerBase, example: Example) -> Prompt:
    asked = _prompt(tokenizer, example.messages)
    ids = encode(tokenizer, [asked], [[]])[0]["input_ids"][0].tolist()
    return Prompt(ids, [_span(tokenizer, asked, example)], [])


def _prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> str | Sequence[Message]:
    """A dialogue for a chat model; for others the messages' text."""
    if tokenizer.chat_template:
        return messages
    return "\n".join(m.content for m in messages)


def _span(
    tokenizer: PreTrainedTokenizerBase, asked: str | Sequence[Message], example: Example
) -> tuple[int, int]:
    return find_span(tokenizer, asked, example.span, occurrence=-1)
