"""What an embedded model must be able to do before any experiment, on what it never saw."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import Message, chat_batch, reply
from steerkit.constraints import FAMILIES, HELD_OUT_PAIRS, Constraint, Question, instruct, values
from steerkit.statistics import bootstrap
from steerkit.streaming.losses import recomputed_losses, token_losses
from steerkit.streaming.stream_eval import Fact
from steerkit.tiny.world import (
    ATTRIBUTES,
    answer,
    ask,
    biography_question,
    documents,
    draw_constraints,
    english,
    fact_question,
    known_people,
    market,
    note,
    render,
    repeat_question,
    say,
    stranger,
)

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase
_CHARACTERS = 32  # read per wanted token of a file: no language's mean comes near


def facts(model: Model, tokenizer: Tokenizer) -> Tensor:
    """Every memorised fact asked once: (200,) of 0/1, the reply word for word."""
    rng = random.Random("facts")
    questions = [
        Question(ask(rng, p.name, a), p.name, a, p.facts[a])
        for p in known_people()
        for a in ATTRIBUTES
    ]
    return _right(model, tokenizer, questions)


def reading(model: Model, tokenizer: Tokenizer, *, n: int = 256) -> tuple[Tensor, Tensor]:
    """Values read from biographies of people who are not in the training data: (n,) of 0/1.

    Also (n,) boolean: does a rival, another person with that attribute, stand in the text? Then
    the name alone decides, and a guess is right half of the time.
    """
    rng = random.Random("reading")
    questions = [biography_question(rng, held_out=True) for _ in range(n)]
    verbs = [say("", q.attribute, "").strip(" .") for q in questions]
    rival = [q.text.count(f" {verb} ") > 1 for q, verb in zip(questions, verbs, strict=True)]
    return _right(model, tokenizer, questions), torch.tensor(rival)


def _right(model: Model, tokenizer: Tokenizer, questions: Sequence[Question]) -> Tensor:
    replies = reply(model, tokenizer, [[Message("user", q.text)] for q in questions])
    expected = [answer(q.subject, q.attribute, q.value) for q in questions]
    return torch.tensor([float(a == b) for a, b in zip(replies, expected, strict=True)])


def obeying(
    model: Model, tokenizer: Tokenizer, family: str | None, *, n: int = 128
) -> tuple[Tensor, Tensor]:
    """Instruction and question in one message: (n,) obeyed, (n,) obeyed and the value right.

    `family` names one family; None draws pairs of families that training never combined.
    """
    rng = random.Random(f"obeying {family}")
    given = [
        draw_constraints(rng, held_out=True)
        if family is None
        else (Constraint(family, rng.choice(values(family))),)
        for _ in range(n)
    ]
    questions = [question_for(rng, constraints) for constraints in given]
    asked = [
        [Message("user", f"{instruct(rng, c)} {q.text}")]
        for c, q in zip(given, questions, strict=True)
    ]
    replies = reply(model, tokenizer, asked)
    rows = zip(replies, given, questions, strict=True)
    results = [
        (all(c.obeyed(r) for c in cs), q.value.casefold() in r.casefold()) for r, cs, q in rows
    ]
    obeyed, valid = torch.tensor(results, dtype=torch.float32).unbind(1)
    return obeyed, obeyed * valid


def question_for(rng: random.Random, constraints: Sequence[Constraint]) -> Question:
    """A question on which the constraints can show: pronouns need a sentence to be repeated."""
    pronoun = any(c.family == "pronoun" for c in constraints)
    return repeat_question(rng) if pronoun else fact_question(rng)


def adherence_by_turn(
    model: Model,
    tokenizer: Tokenizer,
    *,
    every: bool,
    turns: int = 20,
    n: int = 64,
    families: Sequence[str] = FAMILIES,
) -> Tensor:
    """Dialogues with the model's own replies: (n, turns) of 0/1, does each reply obey?

    The instruction stands in each user message (`every`) or in the first one only. Reply t answers
    the t-th user message, counted from 1.
    """
    rng = random.Random(f"adherence {every}")
    given = [
        Constraint(f, rng.choice(values(f)))
        for f in families
        for _ in range(-(-n // len(families)))
    ]
    rng.shuffle(given)
    users = [
        [
            f"{instruct(rng, [c])} {question_for(rng, [c]).text}"
            if every or turn == 0
            else question_for(rng, [c]).text
            for turn in range(turns)
        ]
        for c in given[:n]
    ]
    replies = chat_batch(model, tokenizer, users)
    return torch.tensor(
        [[float(c.obeyed(r)) for r in row] for c, row in zip(given, replies, strict=False)]
    )


def bigram_perplexity(train: Tensor, test: Tensor, size: int) -> float:
    """Perplexity of test (N,) under bigram counts of train (M,), ids below `size`.

    Interpolated with add-one unigrams; the bigram's weight is n / (n + 5), n the count of its
    first token.
    """
    counts = torch.zeros(size, size)
    counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
    unigram = (counts.sum(0) + 1) / (counts.sum() + size)
    probability = (counts + 5 * unigram) / (counts.sum(1, keepdim=True) + 5)
    return torch.exp(-probability[test[:-1], test[1:]].log().mean()).item()


def english_stream(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first token, then held-out English without a break, `tokens` ids in all."""
    ids = text_stream(tokenizer, "\n\n".join(english(held_out=True)))
    if len(ids) < tokens:
        raise ValueError(f"tokens={tokens}: the held-out English has {len(ids)}; ask for fewer")
    return ids[:tokens]


def text_stream(tokenizer: Tokenizer, text: str, tokens: int | None = None) -> list[int]:
    """The first token, if the tokenizer has one, then `text`: at most `tokens` ids."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: expected at least 1")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]][:tokens]


def file_stream(
    tokenizer: Tokenizer, path: str | Path, tokens: int, *, least: int = 2
) -> list[int]:
    """The first token, then the beginning of a UTF-8 file of any size: `least` to `tokens` ids.

    Raises ValueError in one line for a file that is missing, empty, too short or not UTF-8.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(_CHARACTERS * tokens)  # so that a log may be larger than memory
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error.reason} near byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give one with text in it")
    ids = text_stream(tokenizer, text, tokens)
    if len(ids) < least:
        raise ValueError(f"{path}: {len(ids)} tokens, expected at least {least}; take a longer one")
    return ids


def book_stream(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first token, then PG19's first test books, `tokens` ids: needs the extra `data`, and a
    network."""
    from datasets import load_dataset

    books = islice(load_dataset("emozilla/pg19", split="test", streaming=True), 9)
    return text_stream(tokenizer, "\n".join(book["text"] for book in books), tokens)


def note_fact(_: int, rng: random.Random) -> Fact:
    """For `eval_stream`: a note about a stranger, and a question that only this note answers."""
    who, what = stranger(rng), rng.choice(ATTRIBUTES)
    start, end = answer(who.name, what, who.facts[what]).split(f" {who.facts[what]}")
    question = render([Message("user", ask(rng, who.name, what))]) + "<|assistant|>" + start
    line = render(note(who.name, what, who.facts[what]))
    return Fact(line, question, f" {who.facts[what]}", f"{end}<|end|>")


def stream_losses(
    model: Model, ids: Tensor, *, length: int, sinks: int = 4, points: int = 256
) -> dict[str, float]:
    """Mean loss (nats) on a stream, ids (1, T), beyond its first `length` tokens.

    In all bounded settings a token sees `length` tokens, itself included. Re-computation puts the
    first token in front of each window: the model has never seen a text without it. It is sampled
    at `points` positions, and given beside streaming's loss at the same ones.
    """
    losses = {
        "dense": token_losses(model, ids),
        "window": token_losses(model, ids, sinks=0, window=length - 1),
        "streaming": token_losses(model, ids, sinks=sinks, window=length - 1 - sinks),
    }
    found = {name: row[0, length:].mean().item() for name, row in losses.items()}
    at = torch.linspace(length, ids.shape[1] - 2, points).long()
    first = ids[0, :1].tolist()
    again = recomputed_losses(model, ids, length=length - 1, first=first, positions=at)
    found["recomputed"] = again.mean().item()
    found["streaming_there"] = losses["streaming"][0, at].mean().item()
    return found


def pair_names() -> list[str]:
    """The held-out pairs of families, for the card."""
    return sorted(" + ".join(sorted(pair)) for pair in HELD_OUT_PAIRS)


def dialogue_stream(
    tokenizer: Tokenizer, tokens: int, *, seed: str = "held-out dialogue"
) -> list[int]:
    """The first token, then tiny-world documents without English and without end, `tokens` ids."""
    return _endless(tokenizer, documents(random.Random(seed), english_share=0.0), tokens)


def market_stream(tokenizer: Tokenizer, tokens: int, *, seed: str = "held-out market") -> list[int]:
    """The first token, then market chatter without end, `tokens` ids."""
    rng = random.Random(seed)
    return _endless(tokenizer, (market(rng) for _ in count()), tokens)


def talk(tokenizer: Tokenizer) -> tuple[str, Callable[..., list[int]]]:
    """What endless talk is about: dialogue for a chat model, the market for any other."""
    return ("dialogue", dialogue_stream) if tokenizer.chat_template else ("market", market_stream)


def two_streams(
    tokenizer: Tokenizer, tokens: int, *, least: int = 2, text: str = "", books: bool = False
) -> dict[str, Tensor]:
    """Two streams that no training saw, ids (1,T) by title: real text and as much endless talk.

    `tokens` of the file `text`, of PG19's `books` or of held-out English; never fewer than `least`.
    """
    tokens = max(tokens, least)
    if text:
        real, ids = "text", file_stream(tokenizer, text, tokens, least=least)
    elif books:
        real, ids = "PG19", book_stream(tokenizer, tokens)
    else:
        real, ids = "English", english_stream(tokenizer, tokens)
    title, endless = talk(tokenizer)
    return {real: torch.tensor([ids]), title: torch.tensor([endless(tokenizer, len(ids))])}


def _endless(tokenizer: Tokenizer, texts: Iterator[str], tokens: int) -> list[int]:
    ids = text_stream(tokenizer, "", tokens)
    for text in texts:
        ids += tokenizer(text + "<|eos|>", add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise AssertionError("the texts are endless")


def measure_chat(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """All gates of a chat model: name -> mean with 95 % interval and n, or a row by turn."""
    found: dict[str, Any] = {
        "facts": _summary(facts(model, tokenizer)),
    }
    right, rival = reading(model, tokenizer)
    found |= {"reading": _summary(right), "reading, no rival": _summary(right[~rival])}
    found |= {"reading, a rival": _summary(right[rival])}
    for family in FAMILIES:
        found[f"obeys {family}"] = _summary(obeying(model, tokenizer, family)[0])
    found["obeys held-out pairs"] = _summary(obeying(model, tokenizer, None)[0])
    for key, every in (("repeated", True), ("first turn only", False)):
        rows = adherence_by_turn(model, tokenizer, every=every)
        found[f"{key}, by turn"] = [round(x, 4) for x in rows.mean(0).tolist()]
        found[f"{key}, all turns"] = _summary(rows.mean(1))
    return found


def english_perplexity(
    model: Model, tokenizer: Tokenizer, *, length: int = 256, tokens: int = 20_000
) -> float:
    """Of held-out English in fresh contexts of `length` tokens, each begun by the first token."""
    first, *rest = english_stream(tokenizer, tokens)
    chunks = torch.tensor(rest).unfold(0, length - 1, length - 1)
    fresh = torch.cat([torch.full((len(chunks), 1), first), chunks], 1)
    return token_losses(model, fresh.to(model.device)).mean().exp().item()


def measure_streams(
    model: Model, tokenizer: Tokenizer, *, length: int, tokens: int = 20_000
) -> dict[str, Any]:
    """Held-out losses on two endless streams, and English perplexity beside a bigram model's.

    `length` is the training length: the cache's size, and the fresh contexts of the perplexity.
    The second stream is of dialogues for a chat model, and of the market for another.
    """
    first, *rest = english_stream(tokenizer, tokens)
    train = torch.tensor(tokenizer("\n\n".join(english()), add_special_tokens=False)["input_ids"])
    kind, other = talk(tokenizer)
    streams = {"English": [first, *rest], kind: other(tokenizer, tokens)}
    return {
        "English perplexity": english_perplexity(model, tokenizer, length=length, tokens=tokens),
        "bigram perplexity": bigram_perplexity(train, torch.tensor(rest), len(tokenizer)),
        "length": length,
    } | {
        f"{name} stream": stream_losses(model, torch.tensor([ids]), length=length)
        for name, ids in streams.items()
    }


def _summary(values: Tensor) -> dict[str, float]:
    mean, low, high = bootstrap(values)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}
