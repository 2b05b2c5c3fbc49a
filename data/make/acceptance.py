"""Acceptance tests of the embedded models: what each must do before any experiment uses it.

Everything is measured on people, pairs of families and English that training never shows.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from training_documents import documents, draw_held_out
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import Message, reply
from steerkit.constraints import FAMILIES, Constraint, Question, instruct, values
from steerkit.gatt.dialogues import Plan
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.statistics import bootstrap
from steerkit.streaming.losses import recomputed_losses, token_losses
from steerkit.tiny.gatt import mixed_plans, question_for
from steerkit.tiny.streams import endless_stream, english_stream, talk_stream, talk_title
from steerkit.tiny.world import (
    ATTRIBUTES,
    answer,
    ask,
    biography_question,
    english,
    known_people,
    say,
)

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase


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
    drawn = [
        draw_held_out(rng) if family is None else (Constraint(family, rng.choice(values(family))),)
        for _ in range(n)
    ]
    questions = [question_for(rng, constraints) for constraints in drawn]
    plans = [Plan(c, instruct(rng, c), (q,)) for c, q in zip(drawn, questions, strict=True)]
    first = adherence_by_turn(model, tokenizer, plans)
    return first.obeyed[:, 0], first.obeyed[:, 0] * first.right[:, 0]


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


def stream_losses(
    model: Model, ids: Tensor, *, length: int, sinks: int = 4, points: int = 256
) -> dict[str, float]:
    """Mean loss (nats) on a stream, ids (1, T), beyond its first `length` tokens.

    In all bounded settings a token sees `length` tokens, itself included. Re-computation puts the
    first token in front of each window: the model has never seen a text without it. It is sampled
    at `points` positions; `streaming_there` is streaming's loss at the same ones.
    """
    losses = {
        "dense": token_losses(model, ids),
        "window": token_losses(model, ids, sinks=0, window=length - 1),
        "streaming": token_losses(model, ids, sinks=sinks, window=length - 1 - sinks),
    }
    means = {name: loss[0, length:].mean().item() for name, loss in losses.items()}
    at = torch.linspace(length, ids.shape[1] - 2, points).long()
    first = ids[0, :1].tolist()
    again = recomputed_losses(model, ids, length=length - 1, first=first, positions=at)
    means["recomputed"] = again.mean().item()
    means["streaming_there"] = losses["streaming"][0, at].mean().item()
    return means


def english_perplexity(
    model: Model, tokenizer: Tokenizer, *, length: int = 256, tokens: int = 20_000
) -> float:
    """Of held-out English in fresh contexts of `length` tokens, each begun by the first token."""
    first, *rest = english_stream(tokenizer, tokens)
    chunks = torch.tensor(rest).unfold(0, length - 1, length - 1)
    fresh = torch.cat([torch.full((len(chunks), 1), first), chunks], 1)
    return token_losses(model, fresh.to(model.device)).mean().exp().item()


def measure_chat(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """All numbers of a chat model: name -> mean with 95 % interval and n, or means by turn."""
    right, rival = reading(model, tokenizer)
    measured: dict[str, Any] = {
        "facts": _summary(facts(model, tokenizer)),
        "reading": _summary(right),
        "reading, no rival": _summary(right[~rival]),
        "reading, a rival": _summary(right[rival]),
    }
    for family in FAMILIES:
        measured[f"obeys {family}"] = _summary(obeying(model, tokenizer, family)[0])
    measured["obeys held-out pairs"] = _summary(obeying(model, tokenizer, None)[0])
    for key, every in (("repeated", True), ("first turn only", False)):
        plans = mixed_plans(64, turns=20, seed=f"adherence {every}")
        obeyed = adherence_by_turn(model, tokenizer, plans, every=every).obeyed
        measured[f"{key}, by turn"] = [round(x, 4) for x in obeyed.mean(0).tolist()]
        measured[f"{key}, all turns"] = _summary(obeyed.mean(1))
    return measured


def measure_streams(
    model: Model, tokenizer: Tokenizer, *, length: int, tokens: int = 20_000
) -> dict[str, Any]:
    """Held-out losses on two endless streams, and English perplexity beside a bigram model's.

    `length` is the training length: the cache's size, and the fresh contexts of the perplexity.
    The second stream is of dialogues for a chat model, and of the market for another.
    """
    first, *rest = english_stream(tokenizer, tokens)
    train = torch.tensor(tokenizer("\n\n".join(english()), add_special_tokens=False)["input_ids"])
    talk = talk_stream(tokenizer, tokens)
    if tokenizer.chat_template:
        texts = documents(random.Random("held-out dialogue"), english_share=0.0)
        talk = endless_stream(tokenizer, texts, tokens)
    streams = {"English": [first, *rest], talk_title(tokenizer): talk}
    return {
        "English perplexity": english_perplexity(model, tokenizer, length=length, tokens=tokens),
        "bigram perplexity": bigram_perplexity(train, torch.tensor(rest), len(tokenizer)),
        "length": length,
    } | {
        f"{name} stream": stream_losses(model, torch.tensor([ids]), length=length)
        for name, ids in streams.items()
    }


def _summary(scores: Tensor) -> dict[str, float]:
    mean, low, high = bootstrap(scores)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "n": len(scores)}
