"""Messages to token ids and back."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# The format of many chat models, without the system text that the templates of some add.
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Message(NamedTuple):
    """One message: role is "system", "user" or "assistant"."""

    role: str
    content: str


def render(messages: Sequence[Message]) -> str:
    """The embedded models' format, without the first token; equal to their chat template."""
    return "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue, opened for the assistant's next reply."""
    rows = [m._asdict() for m in messages]
    return tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)


def dialogue_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue as it stands, not opened for a reply."""
    return tokenizer.apply_chat_template([m._asdict() for m in messages], return_dict=False)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError when the tokenizer has no chat template, or one that speaks on its own.

    A template that puts a system text of its own in front would instruct the model in every
    measurement that claims to have no instruction, or one only in the first user message.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: take a chat model, or set tokenizer.chat_template"
        )
    said = "\u2042"  # a user message that no template contains
    ids = prompt_ids(tokenizer, [Message("user", said)])
    before = tokenizer.decode(ids, skip_special_tokens=True).split(said)[0]
    words = re.sub(r"\b(system|user|human|assistant|model|im_start|start_of_turn)\b", "", before)
    if len(re.findall(r"\w{2,}", words)) > 2:
        raise ValueError(
            f'the chat template puts a text of its own before the user\'s: "{before.strip()}"; '
            "give a template without it (tokenizer.chat_template = chat.CHATML, or your own)"
        )


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
        ids = [prompt_ids(tokenizer, dialogues[i]) for i in rows]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(rows, texts, strict=True):
            replies[i] = text
    return replies


class BatchedChat:
    """A batch of dialogues whose keys and values stay between turns.

    What the cache already holds is not read again: twenty turns cost one pass over the text and
    not ten. Rows of different lengths leave holes in the cache, which are masked, so positions and
    replies are those of each dialogue alone (to rounding). Layers with a sliding window would lose
    count of the holes: with those the cache starts anew at each turn.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ids: list[list[int]] = []  # per row what the cache holds, holes left out
        self.mask = torch.zeros(0, 0, dtype=torch.long)  # (B, K) over the cache, 0 = hole
        self.cache: DynamicCache | None = None

    def start(self, rows: int) -> None:
        """An empty cache for `rows` dialogues."""
        self.cache, self.ids = DynamicCache(config=self.model.config), [[] for _ in range(rows)]
        self.mask = torch.zeros(rows, 0, dtype=torch.long)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is two dialogues from now on."""
        self.ids = [list(self.ids[i]) for i in rows]
        if self.cache is not None:
            index = torch.tensor(rows)
            self.mask = self.mask[index]
            self.cache.batch_select_indices(index.to(self.model.device))

    @torch.no_grad()
    def reply(
        self,
        messages: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
    ) -> list[str]:
        """The next reply to each dialogue: greedy, or sampled with torch's global generator."""
        wanted = [prompt_ids(self.tokenizer, row) for row in messages]
        inputs, mask = self._advance(wanted)
        sampling = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
        out = self.model.generate(
            inputs.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **sampling,
        ).cpu()
        new = out[:, inputs.shape[1] :]
        lengths = [_length(row, self._stops()) for row in new]
        held = self.cache.get_seq_length()  # the last token was never read
        made = torch.tensor(lengths)[:, None] > torch.arange(new.shape[1])
        self.mask = torch.cat([mask, made.long()], 1)[:, :held]
        for ids, row, length in zip(wanted, new.tolist(), lengths, strict=True):
            ids += row[: min(length, held - inputs.shape[1])]
        self.ids = wanted
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            self.cache = None
        kept = [row[:n] for row, n in zip(new, lengths, strict=True)]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=True)

    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops if isinstance(stops, list) else [stops])

    def _advance(self, wanted: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, K + new) and their mask: the cache's columns, then what it does not hold yet."""
        if self.cache is None or len(self.ids) != len(wanted):
            self.start(len(wanted))
        fresh = []
        for row, (held, ids) in enumerate(zip(self.ids, wanted, strict=True)):
            same = next(
                (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), None
            )
            same = min(len(held), len(ids) - 1) if same is None else same
            # A reply that is tokenised otherwise when it is read again: mask it from there on.
            self.mask[row][self.mask[row].cumsum(0) > same] = 0
            fresh.append(ids[same:])
        block = self.tokenizer.pad({"input_ids": fresh}, padding_side="left", return_tensors="pt")
        past = torch.zeros_like(self.mask)  # generate() takes the cache's part from the cache
        return (
            torch.cat([past, block["input_ids"]], 1),
            torch.cat([self.mask, block["attention_mask"]], 1),
        )


def _length(row: Tensor, stops: set[int]) -> int:
    """Tokens of a generated row up to and including its first stop token."""
    return next((i + 1 for i, token in enumerate(row.tolist()) if token in stops), len(row))


def chat_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    users: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[list[str]]:
    """Dialogues with the model's own greedy replies: users (B, turns) -> replies (B, turns)."""
    replies: list[list[str]] = []
    for start in range(0, len(users), batch):
        texts = users[start : start + batch]
        dialogues: list[list[Message]] = [[] for _ in texts]
        talk = BatchedChat(model, tokenizer)
        for turn in range(len(texts[0])):
            for dialogue, row in zip(dialogues, texts, strict=True):
                dialogue.append(Message("user", row[turn]))
            for dialogue, text in zip(
                dialogues, talk.reply(dialogues, max_new_tokens=max_new_tokens), strict=True
            ):
                dialogue.append(Message("assistant", text))
        replies += [
            [m.content for m in dialogue if m.role == "assistant"] for dialogue in dialogues
        ]
    return replies
