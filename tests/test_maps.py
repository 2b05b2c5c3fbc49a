"""Binned maps and shares equal brute force on the library's weights, and hold no L x H x T^2."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from test_attention import SERVED, eager_weights, state_of
from tiny_models import V, tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM
from transformers import PreTrainedModel as Model

from steerkit.attention.hook import (
    AttentionCall,
    attach,
    softmax_off_by_one,
    use_attention_function,
)
from steerkit.attention.maps import (
    attention_map,
    attention_received,
    bin_edges,
    bin_max,
    span_attention,
    span_share,
)
from steerkit.attention.record import attention_weights, mean_weight_on_key
from steerkit.steering.other_methods import spotlight
from steerkit.steering.pasta import emphasise

T, BINS, SKIP = 90, 7, 3  # beyond the sliding windows of 64; bins of 12 and of 13 tokens
SPANS = [(4, 9), (7, 12), (40, 41)]
INSIDE = [t for t in range(T) if 4 <= t < 12 or t == 40]


def by_hand(
    weights: Tensor, value: Callable[[list[float]], float], skip: int = 0, causal: bool = True
) -> Tensor:
    """weights (N,T,T) -> (BINS, BINS): `value` of a list of all causal pairs of a cell."""
    out = torch.zeros(BINS, BINS)
    for a in range(BINS):
        for b in range(BINS):
            rows = [i for i in range(T) if i * BINS // T == a]
            keys = [j for j in range(skip, T) if j * BINS // T == b]
            pairs = [(i, j) for i in rows for j in keys if j <= i or not causal]
            values = [w[i, j].item() for w in weights for i, j in pairs]
            out[a, b] = value(values) if values else 0
    return out


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("name", SERVED)
def test_maps_and_shares_equal_brute_force_on_eager_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.attention.record._CHUNK_NUMBERS", 4 * T * 5)  # five queries
    model, ids = tiny(name), tokens(1, T)
    weights, before = eager_weights(model, ids)[:, 0], state_of(model)  # (L,H,T,T)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    flat = weights.flatten(0, 1)
    close(attention_map(model, ids, bins=BINS), by_hand(flat, max))
    close(bin_max(weights, bin_edges(T, BINS)), by_hand(flat, max))
    close(attention_map(model, ids, bins=BINS, reduce="mean", skip=SKIP), by_hand(flat, mean, SKIP))
    chosen = {"heads": [(1, 3), (0, 2), (1, 3)], "skip": 20}
    two = torch.stack([weights[0, 2], weights[1, 3]])
    close(attention_map(model, ids, bins=BINS, **chosen), by_hand(two, max, 20))
    share, peak = span_attention(model, ids, SPANS)
    close(share, weights[..., INSIDE].sum(-1))
    close(peak, weights[..., INSIDE].amax(-1))
    assert torch.equal(span_share(model, ids, SPANS), share)
    assert state_of(model) == before


def test_bidirectional_models_show_the_weights_on_later_keys() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=V, intermediate_size=48, **size)).eval()
    ids = tokens(1, T)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    model.set_attn_implementation("eager")
    weights = eager_weights(model, ids)[:, 0]
    model.set_attn_implementation("sdpa")
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-4)
    close(attention_weights(model, ids), weights)
    close(mean_weight_on_key(model, ids, k=40, first=50)[0], weights[:, :, 50:, 40].mean(-1))
    close(span_share(model, ids, SPANS), weights[..., INSIDE].sum(-1))
    flat = weights.flatten(0, 1)
    close(attention_map(model, ids, bins=BINS), by_hand(flat, max, causal=False))
    cells = attention_map(model, ids, bins=BINS, reduce="mean", skip=SKIP)
    close(cells, by_hand(flat, mean, SKIP, causal=False))
    close(attention_map(model, ids, bins=1, reduce="mean"), flat.mean()[None, None])


def test_received_is_what_each_key_gets_from_some_queries(llama: Model) -> None:
    weights = attention_weights(llama, tokens(1, T))
    ask = partial(attention_received, llama, tokens(1, T), (20, 45))
    torch.testing.assert_close(ask(), weights[:, :, 20:45].amax((0, 1, 2)))
    one = weights[1, 2, 20:45].mean(0)
    torch.testing.assert_close(ask(reduce="mean", heads=[(1, 2)]), one)


# Composition: what is attached stays in force


@pytest.mark.parametrize("name", SERVED)
def test_inside_emphasise_the_recorded_weights_are_the_steered_ones(name: str) -> None:
    model, ids, alpha = tiny(name), tokens(1, T), 0.05
    plain, outside = attention_weights(model, ids), torch.ones(T, dtype=torch.bool)
    outside[INSIDE] = False
    with emphasise(model, [SPANS], [(0, 1), (0, 2), (1, 3)], alpha=alpha):
        before = state_of(model)
        steered = attention_weights(model, ids)
        share = span_share(model, ids, SPANS)
        cells = attention_map(model, ids, bins=BINS)
        assert state_of(model) == before
    expected = plain[0] * torch.where(outside, alpha, 1.0)  # equation 2 of 2311.02262
    sink = 1 - plain[0].sum(-1, keepdim=True)  # a learned one keeps its weight
    expected = expected / (expected.sum(-1, keepdim=True) + sink)
    expected[[0, 3]] = plain[0, [0, 3]]
    torch.testing.assert_close(steered[0], expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(steered[1], plain[1])
    torch.testing.assert_close(share, steered[..., INSIDE].sum(-1))
    torch.testing.assert_close(cells, by_hand(steered.flatten(0, 1), max))
    assert torch.equal(attention_weights(model, ids), plain)


def double_first_value(call: AttentionCall) -> Tensor:
    return call.attend(value=torch.cat([2 * call.value[:, :, :1], call.value[:, :, 1:]], dim=2))


@pytest.mark.parametrize(
    "around",
    [use_attention_function, softmax_off_by_one, lambda m: attach(m, {0: double_first_value})],
    ids=["nothing attached", "softmax_off_by_one", "an edit of values"],
)
@torch.no_grad()
def test_recording_does_not_change_what_the_model_says(
    llama: Model, around: Callable[[Model], AbstractContextManager[None]]
) -> None:
    ids = tokens(1, T)
    with around(llama):
        before = llama(ids).logits
        seen = attention_weights(llama, ids)
        assert torch.equal(llama(ids).logits, before)
    assert seen[1, :, :, 0].std() > 0  # something was recorded behind the edit
    assert state_of(llama) == ("sdpa", [])


def test_an_edit_that_does_not_attend_is_refused_not_left_out(llama: Model) -> None:
    def silent(call: AttentionCall) -> Tensor:
        return torch.zeros_like(call.query).transpose(1, 2)

    def twice(call: AttentionCall) -> Tensor:
        return call.attend() + call.attend()

    for edit, calls in ((silent, "1 attention calls of 2"), (twice, "3 attention calls of 2")):
        with attach(llama, {0: edit}), pytest.raises(ValueError, match=calls):
            span_share(llama, tokens(1, T), SPANS)
    assert state_of(llama) == ("sdpa", [])


def test_what_an_edit_asks_for_itself_is_not_recorded(llama: Model) -> None:
    plain = span_share(llama, tokens(1, T), SPANS)
    with spotlight(llama, [SPANS], target=0.6):  # asks for the share first, in a call of its own
        share = span_share(llama, tokens(1, T), SPANS)
    psi = plain[0, :, 41:]  # of the first layer, which reads the same hidden states
    wanted = torch.where(psi < 0.6, 0.6 / (0.6 + 1 - psi), psi)
    torch.testing.assert_close(share[0, :, 41:], wanted, atol=1e-5, rtol=1e-4)


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


def test_4096_tokens_hold_one_chunk_and_never_a_square() -> None:
    model = tiny("llama", num_hidden_layers=1, max_position_embeddings=4096)
    with Largest() as largest:
        cells = attention_map(model, tokens(1, 4096), bins=64)
    assert cells.shape == (64, 64) and cells.diagonal().min() > 0 and not cells.triu(1).any()
    assert largest.numbers <= 2**20 < 4096**2  # less than one head's square


# Bad input


def test_beyond_its_positions_a_rotary_model_warns_and_learned_ones_end() -> None:
    rotary, ids = tiny("llama", max_position_embeddings=128), tokens(1, 150)
    with pytest.warns(UserWarning, match="150 tokens.*trained on 128 positions"):
        share = span_share(rotary, ids, [(0, 150)])
    torch.testing.assert_close(share, torch.ones(2, 4, 150))
    with pytest.raises(ValueError, match=r"150 tokens.* 128 learned positions"):
        attention_map(tiny("gpt2"), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (rotary, tiny("gpt2")):
            span_share(model, ids[:, :128], SPANS)  # the limit itself is within


def test_spans_and_queries_end_within_the_text(llama: Model) -> None:
    with pytest.raises(ValueError, match=r"token 91.* 90 tokens"):
        span_share(llama, tokens(1, T), [(80, 91)])
    with pytest.raises(ValueError, match=r"queries \[80, 91\).*<= 90"):
        attention_received(llama, tokens(1, T), (80, 91))
