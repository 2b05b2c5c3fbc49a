"""Messages to token ids and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Message(NamedTuple):
    """One message: role is "system", "user" or "assistant"."""

    role: str
    content: str


def render(messages: Sequence[Message]) -> str:
    """The embedded models' format, without the first token; equal to their chat template."""
    return "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages)


def prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue, opened for the assistant's next reply."""
    rows = [m._asdict() for m in messages]
    return tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[str]:
    """The greedy next reply to each dialogue, in batches with left padding."""
    order = sorted(range(len(dialogues)), key=lambda i: sum(len(m.content) for m in dialogues[i]))
    replies = [""] * len(dialogues)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = [prompt(tokenizer, dialogues[i]) for i in rows]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(rows, texts, strict=True):
            replies[i] = text
    return replies


def play(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    users: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = 64,
) -> list[list[str]]:
    """Dialogues with the model's own replies: the user's messages are given, all of one number."""
    dialogues: list[list[Message]] = [[] for _ in users]
    for turn in range(len(users[0])):
        for dialogue, texts in zip(dialogues, users, strict=True):
            dialogue.append(Message("user", texts[turn]))
        replies = reply(model, tokenizer, dialogues, max_new_tokens=max_new_tokens)
        for dialogue, text in zip(dialogues, replies, strict=True):
            dialogue.append(Message("assistant", text))
    return [[m.content for m in dialogue if m.role == "assistant"] for dialogue in dialogues]
