"""PASTA equals literal reweighting, everywhere: each oracle here multiplies weights, not scores."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from test_attention import SERVED, state_of
from tiny_models import tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention import Call, attach
from steerkit.emphasis import Head, emphasise

HEADS = [Head(0, 1), Head(0, 3), Head(1, 0), Head(1, 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def literal(heads: Sequence[tuple[int, int]], factor: Tensor) -> dict[int, Callable]:
    """Equation 2 as it stands: softmax, times `factor` (B,T) by key, renormalised; later keys 1."""

    def of(layer: int) -> Callable[[Call], Tensor]:
        def edit(call: Call) -> Tensor:
            (B, H, Q, _), K = call.query.shape, call.key.shape[2]
            groups = H // call.key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
            scores = call.query @ key.mT * call.scaling
            visible = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
            visible = visible if call.mask is None else call.mask
            weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
            held = torch.ones(B, K)  # a sliding window that evicts is tested elsewhere
            T = min(K, factor.shape[1])
            held[:, :T] = factor.repeat_interleave(B // len(factor), 0)[:, :T]
            for which, head in heads:
                if which == layer:
                    weights[:, head] *= held[:, None]
            total = weights.sum(-1, keepdim=True).clamp_min(1e-30)  # 0 in the rows of pads
            return (weights / total @ value).transpose(1, 2)

        return edit

    return {layer: of(layer) for layer in {layer for layer, _ in heads}}


def factor_of(spans: Sequence[Sequence[tuple[int, int]]], T: int, alpha: float) -> Tensor:
    out = torch.full((len(spans), T), alpha)
    for row, each in zip(out, spans, strict=True):
        for start, end in each:
            row[start:end] = 1.0
    return out


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_prefill_and_decode_equal_literal_reweighting(name: str) -> None:
    model, ids, spans = tiny(name), tokens(2, 40), [[(3, 9)], [(20, 24), (30, 31)]]
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    new |= {"output_logits": True, "return_dict_in_generate": True}

    def run() -> list[Tensor]:
        made = model.generate(ids, attention_mask=padding, **new)
        plain = model.generate(ids, **new)
        padded = model(ids, attention_mask=padding).logits
        padded[1, :5] = 0
        logits = [torch.stack(made.logits), torch.stack(plain.logits)]
        return [model(ids).logits, padded, made.sequences, plain.sequences, *logits]

    plain = run()
    with attach(model, literal(HEADS, factor_of(spans, 40, 0.01))):
        wanted = run()
    with emphasise(model, spans, HEADS, alpha=0.01):
        ours = run()
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (plain[0] - wanted[0]).abs().max() > 0.05
    assert state_of(model) == ("sdpa", [])
