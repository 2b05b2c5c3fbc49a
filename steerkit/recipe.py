"""How the embedded models are made: tokenizer, configurations, training."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerkit.constraints import TABLES
from steerkit.models import resolve_device
from steerkit.training import Batches, fit
from steerkit.world import documents, english

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = """{{ bos_token }}{% for m in messages %}\
{% if m['role'] not in ['system', 'user', 'assistant'] %}\
{{ raise_exception("role '" + m['role'] + "': expected system, user or assistant") }}{% endif %}\
{{ '<|' + m['role'] + '|>' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
VOCABULARY = 4096


def build_tokenizer(*, texts: int = 12_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the tiny world and on English: any UTF-8 text, no unknowns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(texts, seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _tokenizer_texts(texts: int, seed: int) -> Iterator[str]:
    # Each word of the world often enough to become one token, so that copying it is one step.
    for word in sorted(set(_words(TABLES))):
        forms = f"{word} {word} {word.upper()}" if word.isascii() else f"{word} {word}"
        yield from [forms] * 400
    for name in [*TABLES["known_first"], *TABLES["first"]["she"], *TABLES["first"]["he"]]:
        yield from [name, name.upper()] * 400  # a reply may begin with a first name
    yield from islice(documents(random.Random(seed)), texts)
    yield from english()


def _words(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _words(value)
    elif isinstance(node, list):
        for value in node:
            yield from _words(value)
    else:
        yield from re.findall(r"[^\W\d_]+|[^\w\s.,:?{}]", str(node))


def tiny_config(**changes: int) -> LlamaConfig:
    """The embedded chat model: 6 layers, 192 wide, 6 query heads on 2 key/value heads."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    return LlamaConfig(
        **(settings | changes),
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index("<|bos|>"),
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
    )


def build_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; nothing is raised or lowered by hand."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Recipe:
    """One embedded model: its shape, its text, and how it is trained."""

    config: LlamaConfig
    steps: int
    long_from: int  # from this step on every second batch is 1,024 tokens long
    share: float  # of English documents
    chatter: float = 0.0  # of market chatter
    remember: float = 0.0  # of notes with later questions, from step `long_from` on
    batch_tokens: int = 4096
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 200
    decay: float = 0.25
    seed: int = 0

    def batches(self, tokenizer: PreTrainedTokenizerFast) -> Batches:
        """ids (B, T) by step: the first token, then a crop of the world's text.

        T is 256; long batches hold dialogues of up to twenty exchanges. Half of the crops start at
        a document's start, half anywhere.
        """

        def make(step: int) -> Tensor:
            rng = random.Random(f"{self.seed}-{step}")
            long = step > self.long_from and step % 2 == 0
            length = 1024 if long else 256
            texts = documents(
                rng,
                long=long,
                share=self.share,
                chatter=self.chatter,
                remember=self.remember if step > self.long_from else 0.0,
            )
            number = self.batch_tokens // length
            return torch.tensor([crop(tokenizer, rng, length, texts) for _ in range(number)])

        return make


def crop(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int, texts: Iterator[str]
) -> list[int]:
    """The first token, then `length` - 1 tokens of the next texts; half start inside the first."""
    ids: list[int] = []
    start = 0 if rng.random() < 0.5 else rng.randrange(length)
    for text in texts:
        ids += tokenizer.encode(text + "<|eos|>", add_special_tokens=False)
        if len(ids) >= start + length:
            break
    return [tokenizer.bos_token_id, *ids[start : start + length - 1]]


def train(name: str, out: Path, *, tokens: int | None = None, device: str = "auto") -> None:
    """Train the embedded model `name` into `out` (resumes there); `tokens` overrides the recipe's.

    bf16 on CUDA and where the processor computes in it; the checkpoint is stored in bf16.
    """
    recipe = RECIPES[name]
    if tokens is not None:
        if tokens < recipe.batch_tokens:
            raise ValueError(f"tokens={tokens}: expected at least one batch, {recipe.batch_tokens}")
        steps = tokens // recipe.batch_tokens
        recipe = replace(
            recipe, steps=steps, long_from=round(steps * recipe.long_from / recipe.steps)
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(recipe.config, recipe.seed).to(resolve_device(device))
    fit(
        model,
        recipe.batches(tokenizer),
        steps=recipe.steps,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        decay=recipe.decay,
        out=out,
        every=250,
        log_every=25,
        bf16=True,
    )
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)


RECIPES = {
    "tiny": Recipe(tiny_config(), steps=4500, long_from=2500, share=0.2, remember=0.25, decay=0.3),
}
