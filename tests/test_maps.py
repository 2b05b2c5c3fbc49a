"""Binned maps and shares equal brute force on the library's weights, and hold no L x H x T^2."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from test_attention import SERVED, eager_weights, state_of
from tiny_models import tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from steerkit.attention.hook import (
    AttentionCall,
    attach,
    softmax_off_by_one,
    use_attention_function,
)
from steerkit.attention.maps import attention_map, attention_received, span_attention, span_share
from steerkit.attention.record import WeightChunk, attention_weights, record_weights
from steerkit.steering.other_methods import spotlight
from steerkit.steering.pasta import emphasise

T, BINS, SKIP = 90, 7, 3  # beyond the sliding windows of 64; bins of 12 and of 13 tokens
SPANS = [(4, 9), (7, 12), (40, 41)]
INSIDE = [t for t in range(T) if 4 <= t < 12 or t == 40]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def by_hand(weights: Tensor, value: Callable[[list[float]], float], skip: int = 0) -> Tensor:
    """weights (N,T,T) -> (BINS, BINS): `value` of a list of all causal pairs of a cell."""
    out = torch.zeros(BINS, BINS)
    for a in range(BINS):
        for b in range(a + 1):
            rows = [i for i in range(T) if i * BINS // T == a]
            keys = [j for j in range(skip, T) if j * BINS // T == b]
            pairs = [(i, j) for i in rows for j in keys if j <= i]
            values = [w[i, j].item() for w in weights for i, j in pairs]
            out[a, b] = value(values) if values else 0
    return out


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("name", SERVED)
def test_maps_and_shares_equal_brute_force_on_eager_weights(name: str) -> None:
    model, ids = tiny(name), tokens(1, T)
    weights = eager_weights(model, ids)[:, 0]  # (L,H,T,T)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    flat = weights.flatten(0, 1)
    close(attention_map(model, ids, bins=BINS), by_hand(flat, max))
    close(attention_map(model, ids, bins=BINS, reduce="mean", skip=SKIP), by_hand(flat, mean, SKIP))
    share, peak = span_attention(model, ids, SPANS)
    close(share, weights[..., INSIDE].sum(-1))
    close(peak, weights[..., INSIDE].amax(-1))
    assert torch.equal(span_share(model, ids, SPANS), share)
    assert state_of(model) == ("sdpa", [])


@pytest.mark.parametrize("skip", [0, SKIP, 20])
def test_heads_and_skip_choose_what_is_looked_at(llama: PreTrainedModel, skip: int) -> None:
    ids = tokens(1, T)
    weights = eager_weights(llama, ids)[:, 0]
    layer = attention_map(llama, ids, bins=BINS, heads=[(1, h) for h in range(4)], skip=skip)
    torch.testing.assert_close(layer, by_hand(weights[1], max, skip), atol=1e-5, rtol=1e-4)
    chosen = {"heads": [(1, 3), (0, 2), (1, 3)], "bins": BINS, "skip": skip}
    two = torch.stack([weights[0, 2], weights[1, 3]])
    ours = attention_map(llama, ids, reduce="mean", **chosen)
    torch.testing.assert_close(ours, by_hand(two, mean, skip), atol=1e-5, rtol=1e-4)


def test_one_bin_and_a_bin_per_token_are_the_extremes(llama: PreTrainedModel) -> None:
    ids = tokens(1, T)
    weights = attention_weights(llama, ids)
    assert attention_map(llama, ids, bins=1).tolist() == [[pytest.approx(1.0)]]  # row 0
    torch.testing.assert_close(attention_map(llama, ids, bins=T), weights.amax((0, 1)))
    torch.testing.assert_close(
        attention_map(llama, ids, bins=T, reduce="mean"), weights.mean((0, 1))
    )


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_chunks_do_not_show(
    llama: PreTrainedModel, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, T)
    whole = (
        attention_map(llama, ids, bins=BINS, reduce=reduce),
        span_share(llama, ids, SPANS),
    )
    monkeypatch.setattr("steerkit.attention.record._CHUNK_NUMBERS", 4 * T * 5)  # five rows
    torch.testing.assert_close(attention_map(llama, ids, bins=BINS, reduce=reduce), whole[0])
    torch.testing.assert_close(span_share(llama, ids, SPANS), whole[1])


def test_received_is_what_each_key_gets_from_some_queries(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.attention.record._CHUNK_NUMBERS", 4 * T * 7)  # seven rows a chunk
    weights = attention_weights(llama, tokens(1, T))
    ask = partial(attention_received, llama, tokens(1, T), (20, 45))
    torch.testing.assert_close(ask(), weights[:, :, 20:45].amax((0, 1, 2)))
    one = weights[1, 2, 20:45].mean(0)
    torch.testing.assert_close(ask(reduce="mean", heads=[(1, 2)]), one)


# Composition: what is attached stays in force


def literal(
    kept: dict[int, Tensor], layer: int, heads: list[int], outside: Tensor, alpha: float
) -> Callable[[AttentionCall], Tensor]:
    """Equation 2 of 2311.02262 word by word: multiply by alpha, renormalise. Keeps the weights."""

    def edit(call: AttentionCall) -> Tensor:
        q, k, v = call.query, call.key, call.value
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * call.scaling
        n = q.shape[2]
        mask = call.mask if call.mask is not None else torch.ones(n, n, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        steered = weights * torch.where(outside, alpha, 1.0)
        steered = steered / steered.sum(-1, keepdim=True)
        weights[:, heads] = steered[:, heads]
        kept[layer] = weights[0].detach()
        return (weights @ v).transpose(1, 2)

    return edit


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_inside_emphasise_the_recorded_weights_are_the_steered_ones(name: str) -> None:
    model, ids, alpha = tiny(name), tokens(1, T), 0.05
    heads = [(0, 1), (0, 2), (1, 3)]
    outside = torch.tensor([t not in INSIDE for t in range(T)])
    kept: dict[int, Tensor] = {}
    edits = {n: literal(kept, n, [h for at, h in heads if at == n], outside, alpha) for n in (0, 1)}
    with attach(model, edits):
        model(ids, use_cache=False)
    wanted = torch.stack([kept[0], kept[1]])  # (L,H,T,T)
    plain = span_share(model, ids, SPANS)
    with emphasise(model, [SPANS], heads, alpha=alpha):
        inside = state_of(model)
        share = span_share(model, ids, SPANS)
        ours = attention_map(model, ids, bins=BINS)
        assert state_of(model) == inside
    torch.testing.assert_close(share, wanted[..., INSIDE].sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours, by_hand(wanted.flatten(0, 1), max), atol=1e-5, rtol=1e-4)
    assert (share - plain)[0, 1, 41:].mean() > 0.1
    assert torch.equal(span_share(model, ids, SPANS), plain)


def double_first_value(call: AttentionCall) -> Tensor:
    return call.attend(value=torch.cat([2 * call.value[:, :, :1], call.value[:, :, 1:]], dim=2))


@pytest.mark.parametrize(
    "around",
    [use_attention_function, softmax_off_by_one, lambda m: attach(m, {0: double_first_value})],
    ids=["nothing attached", "softmax_off_by_one", "an edit of values"],
)
@torch.no_grad()
def test_recording_does_not_change_what_the_model_says(
    llama: PreTrainedModel, around: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> None:
    ids = tokens(1, T)
    with around(llama):
        before = llama(ids).logits
        seen = attention_weights(llama, ids)
        assert torch.equal(llama(ids).logits, before)
    assert seen[1, :, :, 0].std() > 0  # something was recorded behind the edit
    assert state_of(llama) == ("sdpa", [])


def test_an_edit_that_does_not_attend_is_refused_not_left_out(llama: PreTrainedModel) -> None:
    def silent(call: AttentionCall) -> Tensor:
        return torch.zeros_like(call.query).transpose(1, 2)

    def twice(call: AttentionCall) -> Tensor:
        return call.attend() + call.attend()

    for edit, calls in ((silent, "1 attention calls of 2"), (twice, "3 attention calls of 2")):
        with attach(llama, {0: edit}), pytest.raises(ValueError, match=calls):
            span_share(llama, tokens(1, T), SPANS)
    assert state_of(llama) == ("sdpa", [])


def test_what_an_edit_asks_for_itself_is_not_recorded(llama: PreTrainedModel) -> None:
    plain = span_share(llama, tokens(1, T), SPANS)
    with spotlight(llama, [SPANS], target=0.6):  # asks for the share first, in a call of its own
        share = span_share(llama, tokens(1, T), SPANS)
    psi = plain[0, :, 41:]  # of the first layer, which reads the same hidden states
    wanted = torch.where(psi < 0.6, 0.6 / (0.6 + 1 - psi), psi)
    torch.testing.assert_close(share[0, :, 41:], wanted, atol=1e-5, rtol=1e-4)


def test_a_recording_inside_a_recording_is_refused(llama: PreTrainedModel) -> None:
    def nested(chunk: WeightChunk) -> None:
        attention_map(llama, tokens(1, T), bins=2)

    with pytest.raises(ValueError, match="recorded already"):
        record_weights(llama, tokens(1, T), nested)
    assert state_of(llama) == ("sdpa", [])


# Memory


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.fixture(scope="module")
def half_billion() -> PreTrainedModel:
    """The width of a model of 0.5 B parameters, one of its 24 layers: they follow each other."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=896, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_4096_tokens_hold_one_chunk_and_never_a_square(half_billion: PreTrainedModel) -> None:
    ids, hidden = tokens(1, 4096) % 64, 896 * 4096
    with Largest() as largest:
        found = attention_map(half_billion, ids, bins=64)
    assert found.shape == (64, 64) and found.diagonal().min() > 0
    assert largest.numbers <= 2 * hidden < 4096**2  # less than one head's square
    assert not found.triu(1).any()


# Bad input


def long(name: str, T: int) -> tuple[PreTrainedModel, Tensor]:
    return tiny(name, max_position_embeddings=128), tokens(1, T)


def test_beyond_the_trained_positions_a_rotary_model_warns_and_still_adds_up() -> None:
    model, ids = long("llama", 150)
    with pytest.warns(UserWarning, match="150 tokens.*trained on 128 positions"):
        share = span_share(model, ids, [(0, 150)])
    torch.testing.assert_close(share, torch.ones(2, 4, 150))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        span_share(model, ids[:, :128], SPANS)  # the limit itself is within


def test_beyond_learned_positions_there_is_nothing_to_measure() -> None:
    gpt2 = tiny("gpt2")
    with pytest.raises(ValueError, match=r"129 tokens.*GPT2.* 128 learned positions"):
        attention_map(gpt2, tokens(1, 129))
    attention_map(gpt2, tokens(1, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: attention_map(m, ids, heads=[(2, 0)]), "layer < 2"),
        (lambda m, ids: attention_map(m, ids, heads=[(0, 4)]), "4 query heads"),
        (lambda m, ids: attention_map(m, ids, heads=[]), "no heads"),
        (lambda m, ids: span_share(m, ids, [(80, 91)]), r"token 91.* 90 tokens"),
        (lambda m, ids: attention_received(m, ids, (80, 91)), r"queries \[80, 91\).*<= 90"),
        (lambda m, ids: attention_received(m, ids, (0, 5), reduce="sum"), "'sum'"),
        (lambda m, ids: attention_map(tiny("gptj"), ids), "AttentionInterface"),
    ],
)
def test_bad_input_is_one_clear_error(
    llama: PreTrainedModel, call: Callable[[PreTrainedModel, Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(llama, tokens(1, T))
    assert state_of(llama) == ("sdpa", [])
