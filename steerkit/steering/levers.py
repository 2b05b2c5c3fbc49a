"""Levers: ways to make a reply follow an instruction that stands in a dialogue's first message.

A lever is one function, whether it repeats the instruction, steers attention, or combines two
predictions. So one bench can compare them all. (Ghost Attention is no lever here: it changes the
weights, and its model can be asked through any lever.)

Axes: B batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from steerkit.chat import Batch, Dialogue, as_messages, pad_left, prompt_ids, reply
from steerkit.models import Model, Tokenizer
from steerkit.spans import Span, Spans, find_span

Dialogues, Texts = Sequence[Dialogue], Sequence[str]
Lever = Callable[[Model, Tokenizer, Dialogues, Texts], list[str]]
"""(model, tokenizer, dialogues, the wanted instruction of each) -> the next reply to each."""

NEW_TOKENS = 48  # at most, of each reply


def plain(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, _: Texts = ()) -> list[str]:
    """No lever: the greedy replies."""
    return reply(model, tokenizer, dialogues, max_new_tokens=NEW_TOKENS)


def repeated(which: Callable[[int, int], bool], text: str | None = None) -> Lever:
    """Put the instruction in front of more of the user's messages.

    `which(turn, last)` says in front of which, counted from 0 to `last`; the first message has it
    anyway. `text` stands there instead of the instruction, as a control of the same length.
    """

    def lever(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, wanted: Texts) -> list[str]:
        longer = []
        for dialogue, instruction in zip(dialogues, wanted, strict=True):
            messages = as_messages(dialogue)
            users = [n for n, message in enumerate(messages) if message.role == "user"]
            for turn, n in enumerate(users[1:], 1):
                if which(turn, len(users) - 1):
                    content = f"{text or instruction} {messages[n].content}"
                    messages[n] = messages[n]._replace(content=content)
            longer.append(messages)
        return plain(model, tokenizer, longer)

    return lever


def steered(
    method: Callable[[Model, Spans], AbstractContextManager],
    *,
    where: Callable[[Span, int], Span] = lambda span, _: span,
) -> Lever:
    """Steer attention to the instruction: `steered(partial(spotlight, target=0.3))`.

    `where(span, tokens)` may move the instruction's span within a prompt of so many tokens.
    """

    def lever(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, wanted: Texts) -> list[str]:
        spans = []
        for dialogue, instruction in zip(dialogues, wanted, strict=True):
            tokens = len(prompt_ids(tokenizer, dialogue))
            span = find_span(tokenizer, dialogue, instruction, occurrence=0)  # a reply may quote it
            spans.append([where(span, tokens)])

        def steer(batch: Batch) -> AbstractContextManager:
            return method(model, batch.move(spans))

        return reply(model, tokenizer, dialogues, steer=steer, max_new_tokens=NEW_TOKENS)

    return lever


def guided(scale: float) -> Lever:
    """Classifier-free guidance (2306.17806): away from what is said without the instruction.

    log p(with) moves on by (scale - 1) * (log p(with) - log p(without)). The prompt without is the
    same dialogue, its instruction taken out: without one, transformers takes the last token alone.
    Two forward passes a token; 1 = no guidance. (For rotary models: transformers counts the
    positions of the second prompt from its padding on.)
    """

    def lever(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, wanted: Texts) -> list[str]:
        without = []
        for dialogue, instruction in zip(dialogues, wanted, strict=True):
            first, *later = as_messages(dialogue)
            content = first.content.replace(instruction, "", 1).strip()
            without.append(prompt_ids(tokenizer, [first._replace(content=content), *later]))

        def options(batch: Batch) -> dict[str, Any]:
            negative = pad_left(tokenizer, without, batch.indices).inputs.to(model.device)
            return {
                "guidance_scale": scale,
                "negative_prompt_ids": negative["input_ids"],
                "negative_prompt_attention_mask": negative["attention_mask"],
            }

        return reply(model, tokenizer, dialogues, options=options, max_new_tokens=NEW_TOKENS)

    return lever
