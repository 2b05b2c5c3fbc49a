"""Messages to token ids, and a model's replies.

A prompt is a text, or a dialogue: a list of messages, which the tokenizer's chat template renders.
Axes: B batch, T tokens, K cached tokens, N generated tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from steerkit.models import Model, Tokenizer

# The format of many chat models, without the system text that the templates of some add.
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Message(NamedTuple):
    """One message: role is "system", "user" or "assistant".

    >>> from steerkit import Message, load, reply
    >>> model, tokenizer = load("tiny")
    >>> reply(model, tokenizer, [[Message("user", "Where does Anna Adler live?")]])
    ['Anna Adler lives in Lisbon.']
    """

    role: str
    content: str


ROLES = ("system", "user", "assistant")
Dialogue = Sequence[Message | Mapping[str, str]]
Prompt = str | Dialogue


def as_messages(dialogue: Dialogue) -> list[Message]:
    """The messages of a dialogue, which may also be dicts {"role": ..., "content": ...}.

    What has more than these, as tool calls and pictures have, is refused: it would be lost.
    """
    try:
        messages = [m if isinstance(m, Message) else Message(**m) for m in dialogue]
    except TypeError:  # texts, other keys, or one message instead of a list
        messages = []
    right = all(m.role in ROLES and isinstance(m.content, str) for m in messages)
    if not messages or not right:
        raise ValueError(
            f"{dialogue!r}: expected at least one message, in a list of Message(role, content) or "
            f"of dicts with both and nothing else; a role is {', '.join(ROLES)}, a content is text"
        )
    return messages


def user_text(message: str | Message | Mapping[str, str]) -> str:
    """What the user says: a text, or the content of a message of role "user"."""
    if isinstance(message, str):
        return message
    (message,) = as_messages([message])
    if message.role != "user":
        raise ValueError(f"{message!r}: expected the user's message, or its text")
    return message.content


# --- text to token ids -------------------------------------------------------------------------


def prompt_text(tokenizer: Tokenizer, prompt: Prompt, *, opened: bool = True) -> str:
    """A text as it is; a dialogue as the chat template renders it, `opened` for the next reply."""
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: take a chat model, or set tokenizer.chat_template"
        )
    messages = [m._asdict() for m in as_messages(prompt)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, *, opened: bool = True) -> list[int]:
    """Token ids of `prompt_text`; only a plain text gets special tokens, a template writes them."""
    text, plain = prompt_text(tokenizer, prompt, opened=opened), isinstance(prompt, str)
    return tokenizer(text, add_special_tokens=plain)["input_ids"]


def dialogue_ids(tokenizer: Tokenizer, dialogue: Dialogue) -> list[int]:
    """Token ids of a dialogue as it stands, not opened for a reply."""
    return prompt_ids(tokenizer, dialogue, opened=False)


def template_pieces(tokenizer: Tokenizer, dialogue: Dialogue) -> list[str]:
    """What the chat template writes around the contents: n messages -> n + 1 texts.

    Read off the template itself, which renders the dialogue with a placeholder for each content.
    Raises ValueError if a content is not shown exactly once, in its place.
    """
    # Characters for private use, which no template writes, around the message's number.
    marked = [m._replace(content=f"\ue000{n}\ue001") for n, m in enumerate(as_messages(dialogue))]
    parts = re.split("\ue000([0-9]+)\ue001", prompt_text(tokenizer, marked))
    shown = parts[1::2]
    if shown != [str(n) for n in range(len(marked))]:
        raise ValueError(
            f"the chat template shows the messages {', '.join(shown)} of 0 to {len(marked) - 1}, "
            "and not each once in its place; set a plain one (tokenizer.chat_template = "
            "chat.CHATML, or your own)"
        )
    return parts[::2]


def check_template(tokenizer: Tokenizer) -> None:
    """ValueError when the tokenizer has no chat template, or one with a system prompt of its own.

    Such a template would instruct the model in every measurement that claims to have no
    instruction, or one only in the first user message.
    """
    before = template_pieces(tokenizer, [Message("user", "Hi.")])[0]
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(ids, skip_special_tokens=True)
    words = re.sub(r"\b(system|user|human|assistant|model|im_start|start_of_turn)\b", "", before)
    if len(re.findall(r"\w{2,}", words)) > 2:
        raise ValueError(
            f'the chat template puts a text of its own before the user\'s: "{before.strip()}"; '
            "give a template without it (tokenizer.chat_template = chat.CHATML, or your own)"
        )


def check_request(**values: object) -> None:
    """ValueError for a number below 1, and for one text in the place of several."""
    for name, value in values.items():
        if isinstance(value, str):  # its characters would each be a text
            raise ValueError(f"{name}={value[:40]!r}: expected several texts; put it into a list")
        if isinstance(value, int | float) and (value < 1 or value % 1):
            raise ValueError(f"{name}={value}: expected a whole number of 1 or more")


def check_ids(model: Model, ids: Tensor, *, one_text: bool = False) -> None:
    """ValueError unless `ids` are (B,T) token ids of the model's vocabulary, with T >= 2.

    With `one_text` B must be 1.
    """
    if not isinstance(ids, Tensor):
        raise ValueError(f"ids are {type(ids).__name__}: expected a tensor (B, T) of token ids")
    shaped = ids.ndim == 2 and len(ids) > 0 and ids.shape[1] > 1 and not (one_text and len(ids) > 1)
    if not shaped or ids.is_floating_point():
        texts = "one text" if one_text else "texts"
        raise ValueError(
            f"ids are {ids.dtype} {tuple(ids.shape)}: expected {texts} of at least 2 tokens as "
            "integers (B, T); one text is ids[None]"
        )
    low, high = int(ids.min()), int(ids.max())
    vocabulary = model.get_input_embeddings().num_embeddings
    if low < 0 or high >= vocabulary:
        raise ValueError(f"ids from {low} to {high}: the vocabulary is 0 .. {vocabulary - 1}")


def stop_ids(model: Model, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a reply: the tokenizer's end of sequence, and the model's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *ends} - {None})


# --- replies -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Some of the prompts as one batch, padded on the left.

    `indices` says which prompts; `inputs` holds input_ids and attention_mask, (B,T) each; `padding`
    is the number of padding tokens in front of each prompt.
    """

    indices: list[int]
    inputs: BatchEncoding
    padding: list[int]

    def move(self, spans: Sequence[Sequence[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """The spans of this batch's prompts, out of those of all prompts, moved by the padding."""
        return [
            [(start + pad, end + pad) for start, end in spans[i]]
            for i, pad in zip(self.indices, self.padding, strict=True)
        ]


def pad_left(tokenizer: Tokenizer, ids: Sequence[list[int]], indices: Sequence[int]) -> Batch:
    """The prompts `indices` of `ids` as one batch."""
    chosen = [ids[i] for i in indices]
    if not all(chosen):
        raise ValueError("a prompt has no token: say something")
    inputs = tokenizer.pad({"input_ids": chosen}, padding_side="left", return_tensors="pt")
    T = inputs["input_ids"].shape[1]
    return Batch(list(indices), inputs, [T - len(prompt) for prompt in chosen])


def batches(tokenizer: Tokenizer, ids: Sequence[list[int]], size: int) -> Iterator[Batch]:
    """All prompts in batches of `size`, shorter ones first, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), size):
        yield pad_left(tokenizer, ids, order[start : start + size])


@torch.no_grad()
def reply(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    steer: Callable[[Batch], AbstractContextManager] | None = None,
    options: Callable[[Batch], Mapping[str, Any]] | None = None,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[str]:
    """The greedy reply to each prompt, in batches with left padding.

    Each batch is generated inside the context `steer(batch)`, for example
    `lambda batch: emphasise(model, batch.move(spans), heads)` with the spans of all prompts.
    `options(batch)` are further arguments of `generate`.

    >>> from steerkit import load, reply
    >>> model, tokenizer = load("tiny")
    >>> reply(model, tokenizer, [[{"role": "user", "content": "Where does Anna Adler live?"}]])
    ['Anna Adler lives in Lisbon.']
    """
    check_request(prompts=prompts, max_new_tokens=max_new_tokens, batch=batch)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    replies = [""] * len(ids)
    for padded in batches(tokenizer, ids, batch):
        inputs = padded.inputs.to(model.device)
        with steer(padded) if steer else nullcontext():
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids(model, tokenizer) or None,
                **(options(padded) if options else {}),
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(padded.indices, texts, strict=True):
            replies[i] = text
    return replies


class BatchedChat:
    """A batch of dialogues whose keys and values stay cached between turns.

    Cached tokens are not read again: twenty turns cost one pass over the text, and not ten. Two
    dialogues after two turns (letters: cached tokens, dots: padding, masked):

        cache      . . a b c d e . f g h     cached[0] = a b c d e f g h
                   i j k l m . . n o p q     cached[1] = i j k l m n o p q

    Positions skip what is masked, so that each dialogue's replies are those that it would get
    alone, to rounding. Sliding windows count masked tokens; with such layers the cache starts anew
    at each turn.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.start(0)

    def start(self, dialogues: int) -> None:
        """An empty cache for this number of dialogues."""
        self.cache = DynamicCache(config=self.model.config)
        self.cached: list[list[int]] = [[] for _ in range(dialogues)]  # token ids by dialogue
        self.mask = torch.zeros(dialogues, 0, dtype=torch.long)  # (B,K), 0 = masked

    def select(self, indices: Sequence[int]) -> None:
        """Keep these dialogues, in this order; one named twice is two from now on."""
        index = torch.tensor(indices)
        self.cached = [list(self.cached[i]) for i in indices]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index.to(self.model.device))

    @torch.no_grad()
    def reply(
        self, dialogues: Sequence[Dialogue], *, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """The next reply to each dialogue: greedy, or sampled with torch's global generator."""
        check_request(dialogues=len(dialogues), max_new_tokens=max_new_tokens)
        prompts = [prompt_ids(self.tokenizer, dialogue) for dialogue in dialogues]
        sliding = any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)
        if sliding or len(self.cached) != len(prompts):
            self.start(len(prompts))
        unread = [self._unread(i, ids) for i, ids in enumerate(prompts)]
        block = pad_left(self.tokenizer, unread, range(len(unread))).inputs
        placeholders = torch.zeros_like(self.mask)  # generate() reads these from the cache
        inputs = torch.cat([placeholders, block["input_ids"]], 1)  # (B, K + unread)
        mask = torch.cat([self.mask, block["attention_mask"]], 1)

        stops = stop_ids(self.model, self.tokenizer)
        sampling = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
        out = self.model.generate(
            inputs.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=stops or None,
            **sampling,
        ).cpu()
        new = out[:, inputs.shape[1] :]  # (B,N)
        stop = torch.isin(new, torch.tensor(stops, dtype=new.dtype)).long()
        in_reply = stop.cumsum(1) - stop == 0  # up to its first stop token, which belongs to it
        texts = [ids[real].tolist() for ids, real in zip(new, in_reply, strict=True)]

        # The cache holds all but the last generated token, which was never read.
        self.mask = torch.cat([mask, in_reply.long()], 1)[:, : self.cache.get_seq_length()]
        self.cached = [
            (prompt + text)[: int(m.sum())]
            for prompt, text, m in zip(prompts, texts, self.mask, strict=True)
        ]
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)

    def _unread(self, i: int, ids: list[int]) -> list[int]:
        """The tokens of dialogue i that the cache lacks; cached tokens that differ are masked."""
        # The last token is read again in any case: its logits begin the reply.
        pairs = zip(self.cached[i], ids[:-1], strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        # A reply may be tokenised otherwise when it is read again: mask it from there on.
        self.mask[i, self.mask[i].cumsum(0) > same] = 0
        return ids[same:]
