"""PASTA's four tasks (2311.02262, section 5): prompt, emphasised span, answer, and metrics.

An example emphasises a phrase of its prompt. A task says how replies are scored: the paper's way,
and strictly (the whole reply is right). Examples are drawn in `tiny/tasks.py` or
read from a file. Scores are (n,) tensors of 0..1, one number per example, so that intervals can be
computed.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerkit.chat import Batch, Message, as_messages, batches, prompt_ids, reply
from steerkit.models import Model, Tokenizer
from steerkit.spans import Spans, find_span, span_mask
from steerkit.steering.scoring import Prompt

Steer = Callable[[Model, Spans], AbstractContextManager]
"""(model, spans) -> a `with`; for PASTA `partial(emphasise, heads=..., alpha=...)`."""

Messages = tuple[Message, ...]


class Example(NamedTuple):
    """One prompt of a task.

    `span` is the phrase that is emphasised, `answer` the whole right reply, `value` what it must
    state. `kept`: phrases of a right reply that the span says nothing about. `candidates`: `value`
    and its rivals, where the paper compares their probabilities. `paraphrases`: the same question
    in other words. `source`: the text that is to be rewritten.
    """

    messages: Messages
    span: str
    answer: str
    value: str
    kept: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    paraphrases: tuple[Messages, ...] = ()
    source: str = ""


Examples = Sequence[Example]


def read_examples(path: str | Path) -> list[Example]:
    """Examples of your own from a file of JSON lines, each with the fields of `Example`; a message
    is {"role": ..., "content": ...}. `data/make/real_tasks.py` writes such files."""
    examples = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        pairs = json.loads(line).items()
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in pairs}
        fields["messages"] = tuple(as_messages(fields["messages"]))
        others = fields.get("paraphrases", ())
        fields["paraphrases"] = tuple(tuple(as_messages(messages)) for messages in others)
        examples.append(Example(**fields))
    return examples


Metric = Callable[[str, Example], float]


@dataclass(frozen=True)
class Task:
    """`draw(rng, conflict, split)` makes one example of the tiny world; metrics score replies."""

    name: str
    title: str
    draw: Callable[[random.Random, bool, str], Example]
    strict: Metric
    paper: Mapping[str, Metric] = field(default_factory=dict)
    compare: Mapping[str, bool] = field(default_factory=dict)  # name -> on paraphrases?

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
        parsed, right = json.loads(reply), json.loads(example.answer)
    except ValueError:
        return 0.0
    return float(isinstance(parsed, dict) and _folded(parsed) == _folded(right))


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
    stems = {_stem(w) for w in words}
    content = [_stem(w) for w in _words(example.source) if w not in _PRONOUNS]
    return float(sum(w in stems for w in content) >= 0.8 * len(content))


def exact(reply: str, example: Example) -> float:
    """The reply is the answer, word for word."""
    return float(reply.split() == example.answer.split())


def first_words(reply: str, example: Example) -> float:
    """The reply begins with the answer: for models that go on with a text."""
    answer = _words(example.answer)
    return float(bool(answer) and _words(reply)[: len(answer)] == answer)


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
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def consistency(replies: Sequence[str], references: Sequence[str]) -> list[float]:
    """Cosine of tf-idf word vectors of each reply and its reference, idf over the references."""
    frequency = Counter(word for text in references for word in set(_words(text)))
    n = 1 + len(references)

    def vector(text: str) -> dict[str, float]:
        counts = Counter(_words(text))
        return {w: count * (math.log(n / (1 + frequency[w])) + 1) for w, count in counts.items()}

    pairs = zip(replies, references, strict=True)
    return [_cosine(vector(text), vector(reference)) for text, reference in pairs]


_PRONOUNS = {"she", "he", "her", "him", "hers", "his", "herself", "himself"}
_PLURAL = {"is": "are", "was": "were", "has": "have", "does": "do", "goes": "go"}


def _objects(text: str) -> list[dict]:
    """Every {...} of the text that parses, longest first from each opening brace."""
    objects, decoder = [], json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        with suppress(ValueError):
            objects.append(decoder.raw_decode(text[match.start() :])[0])
    return objects


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
    """The span between two marks, asterisks or quotes, where it stands last."""

    def change(messages: Messages) -> Messages:
        i = max(i for i, m in enumerate(messages) if example.span in m.content)
        before, span, after = messages[i].content.rpartition(example.span)
        new = messages[i]._replace(content=f"{before}{mark}{span}{mark}{after}")
        return (*messages[:i], new, *messages[i + 1 :])

    return _each(example, change)._replace(span=f"{mark}{example.span}{mark}")


def few_shot(example: Example, shots: Examples) -> Example:
    """`shots` with their right answers as earlier exchanges; a system message of theirs opens
    their own first message, so that each shot shows its instruction."""
    history: list[Message] = []
    for shot in shots:
        system = "".join(f"{m.content} " for m in shot.messages if m.role == "system")
        first, *rest = (m for m in shot.messages if m.role != "system")
        first = first._replace(content=system + first.content)
        history += [first, *rest, Message("assistant", shot.answer)]

    def change(messages: Messages) -> Messages:
        systems = sum(m.role == "system" for m in messages)  # they come first
        return (*messages[:systems], *history, *messages[systems:])

    return _each(example, change)


def prompted(examples: Examples, shots: Examples) -> dict[str, list[Example]]:
    """The examples by how they are asked, as in the paper's tables: no model is touched."""
    return {
        "zero-shot": list(examples),
        "*-marked": [marked(e, "*") for e in examples],
        '"-marked': [marked(e, '"') for e in examples],
        "few-shot": [few_shot(e, shots) for e in examples],
    }


def _each(example: Example, change: Callable[[Messages], Messages]) -> Example:
    """The same change in the prompt and in its paraphrases."""
    paraphrases = tuple(change(m) for m in example.paraphrases)
    return example._replace(messages=change(example.messages), paraphrases=paraphrases)


# --- a model on examples -----------------------------------------------------------------------


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    examples: Examples,
    *,
    steer: Steer | None = None,
    max_new_tokens: int = 48,
    probabilities: bool = True,
) -> dict[str, Tensor]:
    """All scores of greedy replies, (n,) each: "strict", the paper's, "kept", "fluency" (bits),
    "consistency". Without `probabilities` those that compare candidates are left out."""
    replies = generate(model, tokenizer, examples, steer=steer, max_new_tokens=max_new_tokens)
    pairs = list(zip(replies, examples, strict=True))
    metrics: dict[str, Metric] = {"strict": task.strict, **task.paper, "kept": kept}
    scores = {name: [metric(r, e) for r, e in pairs] for name, metric in metrics.items()}
    scores["fluency"] = [fluency(r) for r in replies]
    scores["consistency"] = consistency(replies, [e.answer or e.source for e in examples])
    measured = {name: torch.tensor(values) for name, values in scores.items()}
    for name, paraphrased in task.compare.items() if probabilities else ():
        measured[name] = compare(model, tokenizer, examples, paraphrased=paraphrased, steer=steer)
    return measured


def generate(
    model: Model,
    tokenizer: Tokenizer,
    examples: Examples,
    *,
    steer: Steer | None = None,
    max_new_tokens: int = 48,
) -> list[str]:
    """The greedy reply to each example, steered towards its span."""
    prompts = [_prompt(tokenizer, e) for e in examples]
    spans = [[_span(tokenizer, e)] for e in examples] if steer else []
    context = (lambda padded: steer(model, padded.move(spans))) if steer else None
    replies = reply(model, tokenizer, prompts, steer=context, max_new_tokens=max_new_tokens)
    return [text.strip() for text in replies]


def compare(
    model: Model,
    tokenizer: Tokenizer,
    examples: Examples,
    *,
    paraphrased: bool = False,
    steer: Steer | None = None,
) -> Tensor:
    """Is the value the most probable of the candidates where the answer states it? (n,) of 0..1.

    By the candidates' first tokens, after the answer's words before the value. ES of PASTA's
    CounterFact; `paraphrased` its PS, a mean over the paraphrases; on BiasBios its accuracy.
    """
    forms = [e.paraphrases if paraphrased else (e.messages,) for e in examples]
    pairs = zip(examples, forms, strict=True)
    single = [e._replace(messages=form) for e, each in pairs for form in each]
    ids = [prompt_ids(tokenizer, _prompt(tokenizer, e)) for e in single]
    spans = [[_span(tokenizer, e)] for e in single]
    preferred = torch.zeros(len(single))
    for batch in batches(tokenizer, ids, 64):
        found, _ = span_mask(batch.move(spans))
        # A mask as wide as the prompts: so what comes after them is treated as generated.
        inside = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
        inside[:, : found.shape[1]] = found
        with steer(model, inside) if steer else nullcontext():
            chosen = [single[i] for i in batch.indices]
            preferred[batch.indices] = _preferred(model, tokenizer, chosen, batch)
    return torch.stack([part.mean() for part in preferred.split([len(each) for each in forms])])


@torch.no_grad()
def _preferred(model: Model, tokenizer: Tokenizer, examples: Examples, prompts: Batch) -> Tensor:
    """1 where the value's first token has the largest logit of all candidates': (B,).

    One forward over the prompts, padded on the left, and the answers up to the value, padded on the
    right: all prompts end at the same token.
    """
    said = [e.answer[: e.answer.rindex(e.value)] for e in examples]
    before = [torch.tensor(_plain_ids(tokenizer, x.rstrip()), dtype=torch.long) for x in said]
    after = pad_sequence(before, batch_first=True, padding_value=-1)
    ids = prompts.inputs["input_ids"]
    mask = torch.cat([prompts.inputs["attention_mask"], after >= 0], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask.to(model.device), "position_ids": positions.to(model.device)}
    whole = torch.cat([ids, after.clamp(min=0)], dim=1).to(model.device)
    logits = model(whole, **inputs, use_cache=False, logits_to_keep=after.shape[1] + 1).logits

    preferred = torch.zeros(len(examples))
    for row, (e, text) in enumerate(zip(examples, said, strict=True)):
        space = " " if not text or text[-1].isspace() else ""
        first = [_plain_ids(tokenizer, space + word)[0] for word in e.candidates]
        best = int(logits[row, len(before[row]), first].argmax())
        preferred[row] = e.candidates[best] == e.value
    return preferred


# --- examples as token ids ---------------------------------------------------------------------


def to_prompts(tokenizer: Tokenizer, examples: Examples) -> list[Prompt]:
    """What the head search scores: the prompt's ids, its span, the right answer's ids."""
    prompts = []
    for e in examples:
        if not e.answer.strip():
            raise ValueError(f"an example without answer: {e.messages[-1].content[:60]!r}")
        answer, end = f" {e.answer}", []  # a text that goes on
        if tokenizer.chat_template:
            answer, end = e.answer, [tokenizer.eos_token_id]
        ids = prompt_ids(tokenizer, _prompt(tokenizer, e))
        answer_ids = [*_plain_ids(tokenizer, answer), *end]
        prompts.append(Prompt(ids, [_span(tokenizer, e)], answer_ids))
    return prompts


def _prompt(tokenizer: Tokenizer, example: Example) -> str | Messages:
    """A dialogue for a chat model; for others the messages' text."""
    if tokenizer.chat_template:
        return example.messages
    return "\n".join(m.content for m in example.messages)


def _span(tokenizer: Tokenizer, example: Example) -> tuple[int, int]:
    """Where the example's span stands last in its prompt."""
    return find_span(tokenizer, _prompt(tokenizer, example), example.span, occurrence=-1)


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
