"""The attention function: stock where nothing is attached, honest about what it cannot serve."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import CONFIGS, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel as Model

from steerkit.attention.hook import (
    AttentionCall,
    attach,
    softmax_off_by_one,
    trace_attention,
    use_attention_function,
)
from steerkit.attention.record import (
    attention_weights,
    mean_weight_on_key,
    record_weights,
    sink_metric,
    softmax,
    value_norms,
)

REFUSED = {"gemma2": "SDPA", "gpt_oss": "SDPA", "gptj": "AttentionInterface"}
SERVED = [name for name in CONFIGS if name not in REFUSED]


def state_of(model: Model) -> tuple[str, list[str]]:
    left = [key for m in model.modules() for key in m.__dict__ if key.startswith("steerkit")]
    return model.config._attn_implementation, left


@torch.no_grad()
def eager_weights(model: Model, ids: Tensor) -> Tensor:
    """(L,B,H,T,T) by the library's own eager path."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = torch.stack(model(ids, output_attentions=True).attentions)
    model.set_attn_implementation(before)
    return out


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_nothing_attached_is_bit_equal_to_stock_sdpa(name: str) -> None:
    model, ids = tiny(name), tokens(2, 100)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    new = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    stock = model(ids).logits, model(ids, attention_mask=padding).logits
    generated = model.generate(ids, attention_mask=padding, **new)
    with use_attention_function(model):
        assert model.config._attn_implementation == "steerkit"
        assert torch.equal(model(ids).logits, stock[0])
        assert torch.equal(model(ids, attention_mask=padding).logits, stock[1])
        assert torch.equal(model.generate(ids, attention_mask=padding, **new), generated)
    assert state_of(model) == ("sdpa", [])


@pytest.mark.parametrize("name", SERVED)
def test_recorded_weights_equal_the_library_s_eager_ones(name: str) -> None:
    model, ids = tiny(name), tokens(1, 90)  # beyond the sliding windows of 64
    torch.testing.assert_close(
        attention_weights(model, ids), eager_weights(model, ids)[:, 0], atol=2e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_architectures_are_refused_with_the_reason(name: str) -> None:
    model = tiny(name)
    before = state_of(model)
    with pytest.raises(ValueError, match=REFUSED[name]), use_attention_function(model):
        pass
    assert state_of(model) == before


def test_an_edit_sees_one_layer_changes_no_call_and_is_gone_afterwards(llama: Model) -> None:
    ids, calls = tokens(1, 7), []

    def first_key_only(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.attend(mask=(torch.arange(7) < 1)[None, None, None])

    before = llama(ids).logits
    with attach(llama, {1: first_key_only}):
        changed = llama(ids).logits
        weights = attention_weights(llama, ids)
    assert [(c.query.shape, c.key.shape, c.mask) for c in calls] == 2 * [
        ((1, 4, 7, 8), (1, 2, 7, 8), None)
    ]
    assert weights[1, ..., 0].eq(1).all() and not weights[0, :, 1:, 0].eq(1).any()
    assert not torch.allclose(before, changed)
    assert torch.equal(llama(ids).logits, before)


@pytest.mark.parametrize("fail", ["inside", "in the edit"])
def test_an_exception_leaves_the_model_as_found(llama: Model, fail: str) -> None:
    def broken(call: AttentionCall) -> Tensor:
        raise RuntimeError("broken")

    before = state_of(llama)
    with pytest.raises(RuntimeError, match="broken"), attach(llama, {0: broken}):
        if fail == "inside":
            raise RuntimeError("broken")
        llama(tokens(1, 3))
    with pytest.raises(RuntimeError), softmax_off_by_one(llama):
        raise RuntimeError
    assert state_of(llama) == before


def test_nesting_is_refused_and_the_first_edit_stays(llama: Model) -> None:
    edits = {0: AttentionCall.attend}
    with attach(llama, edits):
        inside = state_of(llama)
        with pytest.raises(ValueError, match="already attached"), attach(llama, edits):
            pass
        assert state_of(llama) == inside
    refused = pytest.raises(ValueError, match="already attached")
    with softmax_off_by_one(llama), refused, softmax_off_by_one(llama):
        pass
    assert state_of(llama) == ("sdpa", [])


def test_a_layer_that_never_calls_the_function_is_an_error() -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = 3  # as a layer of linear attention would be counted
    for find in (trace_attention, lambda model: attention_weights(model, tokens(1, 5))):
        with pytest.raises(ValueError, match="2 attention calls of 3 layers"):
            find(model)


def test_finding_the_layers_leaves_the_random_state_alone() -> None:
    model = tiny("gpt2").train()  # dropout draws random numbers
    before = torch.get_rng_state()
    trace_attention(model)
    assert torch.equal(torch.get_rng_state(), before)


def off_by_one_by_hand(call: AttentionCall) -> Tensor:
    """exp(s) / (1 + sum exp(s)), literally."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT * call.scaling).exp()
    if call.mask is not None:
        scores = scores * call.mask
    elif q.shape[2] > 1:
        scores = scores.tril()
    weights = scores / (1 + scores.sum(-1, keepdim=True))
    return (weights @ v).transpose(1, 2).to(call.query.dtype)


def by_hand(model: Model, run: Callable[[], Tensor]) -> Tensor:
    with attach(model, dict.fromkeys(range(2), off_by_one_by_hand)):
        return run()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "mistral"])
@torch.no_grad()
def test_softmax_off_by_one_equals_its_formula(name: str) -> None:
    model, ids = tiny(name, sharpen=2.0), tokens(2, 90)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0

    def generate() -> Tensor:
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)

    plain = model(ids).logits
    wanted = by_hand(model, lambda: model(ids).logits)
    padded = by_hand(model, lambda: model(ids, attention_mask=padding).logits)
    generated = by_hand(model, generate)
    with softmax_off_by_one(model):
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        ours = model(ids, attention_mask=padding).logits
        torch.testing.assert_close(ours[:, 3:], padded[:, 3:], atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(), generated)
    assert (wanted - plain).abs().max() > 0.05


def test_softmax_with_a_zero_sink_is_softmax_over_one_more_zero_score() -> None:
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [2.0, 1.0, 3.0]])
    exp = scores.exp()
    torch.testing.assert_close(softmax(scores, True), exp / (1 + exp.sum(-1, keepdim=True)))
    assert softmax(scores, True)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("zero_sink", [False, True])
def test_reductions_equal_the_full_weights(
    llama: Model, zero_sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.attention.record._CHUNK_NUMBERS", 4 * 50 * 3)  # one query each
    ids, rows = tokens(2, 50), []
    with softmax_off_by_one(llama) if zero_sink else use_attention_function(llama):
        full = torch.stack([attention_weights(llama, row[None]) for row in ids])  # (B,L,H,T,T)
        mass, alpha = mean_weight_on_key(llama, ids, first=1), mean_weight_on_key(llama, ids, k=3)
        heads = full[..., :20, 0].mean(-1)  # (B,L,H)
        eps = heads.median().item() + 1e-4
        metric = sink_metric(llama, ids, eps=eps, k=0, tokens=20)
        record_weights(llama, ids, lambda r: rows.append(r.weights.shape[2]))
    assert max(rows) == 1 and sum(rows) == 2 * 50  # chunks, and every row of both layers once
    torch.testing.assert_close(mass, full[..., 1:, 0].mean(-1))
    torch.testing.assert_close(alpha, full[..., 3:, 3].mean(-1))
    assert metric == pytest.approx((heads > eps).float().mean().item()) == 0.5
    assert (full.sum(-1) < 1 - 1e-3).any() == zero_sink


@torch.no_grad()
def test_value_norms_are_norms_of_the_projected_values(llama: Model) -> None:
    ids = tokens(1, 9)
    layer = llama.model.layers[0]
    hidden = layer.input_layernorm(llama.model.embed_tokens(ids))
    values = layer.self_attn.v_proj(hidden).view(9, 2, 8)  # (T,Hkv,D)
    norms = value_norms(llama, ids)
    assert norms.shape == (2, 2, 9)
    torch.testing.assert_close(norms[0], values.norm(dim=-1).T)
