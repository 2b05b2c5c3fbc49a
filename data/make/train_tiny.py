"""How the embedded models are made: tokenizers, configurations, phases of training.

`python data/make/train_tiny.py --model tiny --out DIR` takes hours, and goes on where it was
stopped; `model_card.py` then measures the model.
"""

import argparse
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from resumable_fit import Batches, fit, write_log
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training_documents import chatter, documents, everything, late_documents, readings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerkit.constraints import TABLES
from steerkit.models import resolve_device
from steerkit.tiny.world import english, market_chain

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = """{{ bos_token }}{% for m in messages %}\
{% if m['role'] not in ['system', 'user', 'assistant'] %}\
{{ raise_exception("role '" + m['role'] + "': expected system, user or assistant") }}{% endif %}\
{{ '<|' + m['role'] + '|>' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, each word of the tiny world one of them."""
    return train_tokenizer(_chat_texts(), size=4096, template=CHAT_TEMPLATE)


def stream_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens: the market's words, and pieces of English."""
    return train_tokenizer(_stream_texts(), size=1024)


def train_tokenizer(
    texts: Iterator[str], *, size: int, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text encodes without unknowns and decodes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = template
    return fast


def _chat_texts() -> Iterator[str]:
    # Each word of the world often enough to become one token, so that copying it is one step.
    for word in sorted(set(_words(TABLES))):
        forms = f"{word} {word} {word.upper()}" if word.isascii() else f"{word} {word}"
        yield from [forms] * 400
    for name in [*TABLES["known_first"], *TABLES["first"]["she"], *TABLES["first"]["he"]]:
        yield from [name, name.upper()] * 400  # a reply may begin with a first name
    yield from islice(documents(random.Random(0)), 12_000)
    yield from english()


def _stream_texts() -> Iterator[str]:
    for word in market_chain()[0]:
        yield from [f"{word} {word}"] * 3000
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


def llama(**shape: int) -> LlamaConfig:
    """A Llama with the embedded tokenizers' special tokens."""
    return LlamaConfig(
        **shape,
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


def chat_batches(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Batches:
    """ids (B, T) by step, 4,096 tokens: crops of 256 tokens of the chat model's documents.

    After 5/8 of the steps come notes and late pairs, and every second batch is 1,024 tokens long
    with dialogues of up to twenty exchanges.
    """
    late_from = round(steps * 5 / 8)

    def make(step: int) -> Tensor:
        rng = random.Random(f"{seed}-{step}")
        late = step > late_from
        long = late and step % 2 == 0
        length = 1024 if long else 256
        texts = late_documents(rng, long=long) if late else documents(rng)
        return torch.tensor([crop(tokenizer, rng, length, texts) for _ in range(4096 // length)])

    return make


def binding_batches(tokenizer: PreTrainedTokenizerFast, _: int, seed: int) -> Batches:
    """ids (16, 128) by step: mostly roll calls, which teach the binding of a name to its value."""

    def make(step: int) -> Tensor:
        rng = random.Random(f"b{seed}-{step}")
        texts = readings(rng, roll_calls=0.7, quizzes=0.1)
        return torch.tensor([crop(tokenizer, rng, 128, texts) for _ in range(16)])

    return make


def whole_batches(tokenizer: PreTrainedTokenizerFast, _: int, seed: int) -> Batches:
    """ids (B, T) by step, 4,096 tokens: crops of 256 and, every second time, of 1,024 tokens."""

    def make(step: int) -> Tensor:
        rng = random.Random(f"whole {seed}-{step}")
        length = 256 if step % 2 else 1024
        texts = everything(rng, long=length == 1024)
        return torch.tensor([crop(tokenizer, rng, length, texts) for _ in range(4096 // length)])

    return make


def stream_batches(tokenizer: PreTrainedTokenizerFast, _: int, seed: int) -> Batches:
    """ids (64, 64) by step: crops of English and of the market."""

    def make(step: int) -> Tensor:
        rng = random.Random(f"{seed}-{step}")
        texts = chatter(rng)
        return torch.tensor([crop(tokenizer, rng, 64, texts) for _ in range(64)])

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


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own data, optimizer and learning rate."""

    batches: Callable[[PreTrainedTokenizerFast, int, int], Batches]  # (tokenizer, steps, seed)
    tokens: int  # per step
    steps: int
    lr: float
    warmup: int
    decay: float


@dataclass(frozen=True)
class Recipe:
    """One embedded model: its shape, its language, and the phases of its training."""

    config: LlamaConfig
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    length: int  # tokens of most training sequences
    phases: dict[str, Phase]

    @property
    def tokens(self) -> int:
        """Tokens of a whole training."""
        return sum(phase.steps * phase.tokens for phase in self.phases.values())


RECIPES = {
    # Grouped-query attention, so that every path of the kit meets it. Three phases: after the first
    # one the model reads a value where one person has it and guesses where two have; the second
    # teaches the binding, and forgets some of the rest; the third holds everything.
    "tiny": Recipe(
        llama(
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        ),
        chat_tokenizer,
        length=256,
        phases={
            "world": Phase(chat_batches, 4096, steps=4000, lr=2e-3, warmup=200, decay=0.3),
            "binding": Phase(binding_batches, 2048, steps=2000, lr=2e-3, warmup=50, decay=0),
            "whole": Phase(whole_batches, 4096, steps=800, lr=1.5e-3, warmup=50, decay=0.6),
        },
    ),
    # One layer: nothing before it could gate the copying head, so an idle head needs a sink.
    "tiny-stream": Recipe(
        llama(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        ),
        stream_tokenizer,
        length=64,
        phases={"stream": Phase(stream_batches, 4096, steps=8000, lr=2e-2, warmup=100, decay=0.1)},
    ),
}


def train(
    name: str, out: Path, *, tokens: int | None = None, seed: int = 0, device: str = "auto"
) -> None:
    """Train the embedded model `name` into `out` (resumes there); `tokens` overrides the recipe's.

    With `tokens` all phases grow or shrink alike. Between phases the weights are rounded to bf16,
    as they are stored. The shipped models have seed 0. Wide models are computed in bf16.
    """
    if name not in RECIPES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    scale = 1.0 if tokens is None else tokens / recipe.tokens
    steps = {key: round(phase.steps * scale) for key, phase in recipe.phases.items()}
    if min(steps.values()) < 1:
        raise ValueError(f"tokens={tokens}: expected at least one batch in each of {list(steps)}")
    tokenizer = recipe.tokenizer()
    model = build_model(recipe.config, seed).to(resolve_device(device))
    log: list[dict[str, float]] = []
    for key, phase in recipe.phases.items():
        entries = fit(
            model,
            phase.batches(tokenizer, steps[key], seed),
            steps=steps[key],
            lr=phase.lr,
            warmup=phase.warmup,
            decay=phase.decay,
            out=out / key,
            bf16=recipe.config.hidden_size > 64,  # slower than float32 in small matrices
        )
        model.to(torch.bfloat16).float()
        log += _continued(log, entries, key)
    write_log(out / "log.jsonl", log)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)


def _continued(
    log: list[dict[str, float]], entries: list[dict[str, float]], phase: str
) -> list[dict[str, float]]:
    """The log of a phase, counted on from the phase before it."""
    step, tokens = (log[-1]["step"], log[-1]["tokens"]) if log else (0, 0)
    return [
        {"phase": phase, **entry, "step": entry["step"] + step, "tokens": entry["tokens"] + tokens}
        for entry in entries
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="resumes there")
    parser.add_argument("--model", choices=sorted(RECIPES), default="tiny")
    parser.add_argument("--tokens", type=int, help="instead of the recipe's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    train(
        options.model, options.out, tokens=options.tokens, seed=options.seed, device=options.device
    )


if __name__ == "__main__":
    main()
