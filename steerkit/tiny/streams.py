"""Long token streams for the streaming losses: held-out English, files, books, endless talk.

Each stream begins with the tokenizer's first token: the models never saw a text without it.
"""

import random
from collections.abc import Iterable
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor

from steerkit.chat import Message
from steerkit.models import Tokenizer
from steerkit.streaming.stream_eval import Fact
from steerkit.tiny import world


def text_stream(tokenizer: Tokenizer, text: str, tokens: int | None = None) -> list[int]:
    """The first token, if the tokenizer has one, then `text`: at most `tokens` ids."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]][:tokens]


def english_stream(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """Held-out English without a break, `tokens` ids in all."""
    ids = text_stream(tokenizer, "\n\n".join(world.english(held_out=True)))
    if len(ids) < tokens:
        raise ValueError(f"tokens={tokens}: the held-out English has {len(ids)}; ask for fewer")
    return ids[:tokens]


def file_stream(
    tokenizer: Tokenizer, path: str | Path, tokens: int, *, least: int = 2
) -> list[int]:
    """The beginning of a UTF-8 file of any size: `least` to `tokens` ids.

    Raises ValueError in one line for a file that is missing, too short or not UTF-8.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            # A log may be larger than memory. In no language has a token 32 letters on average.
            text = file.read(32 * tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; give the path of a text file in UTF-8") from error
    ids = text_stream(tokenizer, text, tokens)
    if len(ids) < least:
        raise ValueError(f"{path}: {len(ids)} tokens, expected at least {least}; take a longer one")
    return ids


def book_stream(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """PG19's first test books, `tokens` ids: needs the extra `data`, and a network."""
    from datasets import load_dataset

    books = islice(load_dataset("emozilla/pg19", split="test", streaming=True), 9)
    return text_stream(tokenizer, "\n".join(book["text"] for book in books), tokens)


def talk_title(tokenizer: Tokenizer) -> str:
    """What endless talk is about: dialogues for a chat model, the market for any other."""
    return "dialogue" if tokenizer.chat_template else "market"


def talk_stream(tokenizer: Tokenizer, tokens: int, *, seed: str = "") -> list[int]:
    """Talk of the tiny world without end, `tokens` ids; held out of training by default."""
    title = talk_title(tokenizer)
    rng = random.Random(seed or f"held-out {title}")
    talk = small_talk if title == "dialogue" else world.market
    return endless_stream(tokenizer, (talk(rng) for _ in count()), tokens)


def endless_stream(tokenizer: Tokenizer, texts: Iterable[str], tokens: int) -> list[int]:
    """The first `tokens` ids of endless texts."""
    each = (tokenizer(text + "<|eos|>", add_special_tokens=False)["input_ids"] for text in texts)
    endless = chain(text_stream(tokenizer, ""), chain.from_iterable(each))
    return list(islice(endless, tokens))


def small_talk(rng: random.Random) -> str:
    """A dialogue of up to six questions with their answers, and without an instruction."""
    messages = []
    for _ in range(rng.randint(1, 6)):
        q = rng.choice([world.fact_question, world.biography_question, world.repeat_question])(rng)
        messages.append(Message("user", q.text))
        messages.append(Message("assistant", world.answer(q.subject, q.attribute, q.value)))
    return world.render(messages)


def two_streams(
    tokenizer: Tokenizer, tokens: int, *, least: int = 2, text: str = "", books: bool = False
) -> dict[str, Tensor]:
    """Two streams that no training saw, ids (1,T) by title: real text and as much endless talk.

    `tokens` of the file `text`, of PG19's `books` or of held-out English; never fewer than `least`.
    """
    tokens = max(tokens, least)
    if text:
        title, ids = "text", file_stream(tokenizer, text, tokens, least=least)
    elif books:
        title, ids = "PG19", book_stream(tokenizer, tokens)
    else:
        title, ids = "English", english_stream(tokenizer, tokens)
    talk = torch.tensor([talk_stream(tokenizer, len(ids))])
    return {title: torch.tensor([ids]), talk_title(tokenizer): talk}


def note_fact(_: int, rng: random.Random) -> Fact:
    """For `eval_stream`: a note about a stranger, and a question that only this note answers."""
    who, attribute = world.stranger(rng), rng.choice(world.ATTRIBUTES)
    value = who.facts[attribute]
    start, end = world.answer(who.name, attribute, value).split(f" {value}")
    asked = world.render([Message("user", world.ask(rng, who.name, attribute))])
    question = f"{asked}<|assistant|>{start}"
    line = world.render(world.note(who.name, attribute, value))
    return Fact(line, question, f" {value}", f"{end}<|end|>")
