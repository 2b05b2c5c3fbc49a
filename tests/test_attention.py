"""The attention function: stock where nothing is attached, honest about what it cannot serve."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, HYBRIDS, V, tiny, tokens
from torch import Tensor, nn
from transformers import AttentionMaskInterface, AutoModelForCausalLM, MambaConfig
from transformers import PreTrainedModel as Model

from steerkit.attention.heads import Head, heads_by_layer
from steerkit.attention.hook import (
    AttentionCall,
    attach,
    softmax_layers_only,
    softmax_off_by_one,
    trace_attention,
    use_attention_function,
)
from steerkit.attention.maps import attention_map
from steerkit.attention.record import (
    attention_weights,
    mean_weight_on_key,
    record_weights,
    sink_metric,
    value_norms,
)
from steerkit.steering.pasta import emphasise
from steerkit.streaming.sink_cache import SinkCache

REFUSED = {"gemma2": "softcap", "gptj": "AttentionInterface"}
SERVED = [name for name in CONFIGS if name not in REFUSED]
LEARNED_SINKS = ["gpt_oss", "mimo_v2_flash"]


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


@pytest.mark.parametrize("name", [name for name in SERVED if name not in LEARNED_SINKS])
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


def test_a_mask_of_fewer_axes_is_broadcast_also_for_one_query(llama: Model) -> None:
    ids, new = tokens(1, 7), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}

    def masked(axes: int) -> Tensor:
        def edit(call: AttentionCall) -> Tensor:
            Q, K = call.query.shape[2], call.key.shape[2]
            seen = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
            seen[:, 1] = False
            return call.attend(mask=seen[(None,) * (axes - 2)])

        with attach(llama, {0: edit, 1: edit}):
            return llama.generate(ids, **new, output_logits=True, return_dict_in_generate=True)

    four = masked(4)
    for fewer in (masked(2), masked(3)):
        assert all(map(torch.equal, fewer.logits, four.logits))


def test_an_exception_leaves_the_model_as_found(llama: Model) -> None:
    def broken(call: AttentionCall) -> Tensor:
        raise RuntimeError("broken")

    for around in (attach(llama, {0: broken}), softmax_off_by_one(llama)):
        with pytest.raises(RuntimeError, match="broken"), around:
            llama(tokens(1, 3))
            raise RuntimeError("broken")
    assert state_of(llama) == ("sdpa", [])


def test_nesting_is_refused_and_the_first_edit_stays(llama: Model) -> None:
    edits = {0: AttentionCall.attend}
    with attach(llama, edits):
        inside = state_of(llama)
        with pytest.raises(ValueError, match="already attached"), attach(llama, edits):
            pass
        assert state_of(llama) == inside
    for sinks in (llama, tiny("gpt_oss")):
        refused = pytest.raises(ValueError, match="already")
        with softmax_off_by_one(llama), refused, softmax_off_by_one(sinks):
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


@pytest.mark.parametrize("zero_sink", [False, True])
def test_reductions_equal_the_full_weights(
    llama: Model, zero_sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.attention.record._CHUNK_NUMBERS", 4 * 50 * 3)  # few queries each
    ids, rows = tokens(2, 50), []
    with softmax_off_by_one(llama) if zero_sink else use_attention_function(llama):
        full = torch.stack([attention_weights(llama, row[None]) for row in ids])  # (B,L,H,T,T)
        mass, alpha = mean_weight_on_key(llama, ids, first=1), mean_weight_on_key(llama, ids, k=3)
        heads = full[..., :20, 0].mean(-1)  # (B,L,H)
        eps = heads.median().item() + 1e-4
        metric = sink_metric(llama, ids, eps=eps, k=0, tokens=20)
        record_weights(llama, ids, lambda r: rows.append(r.weights.shape[2]))
    assert max(rows) < 9 and sum(rows) == 2 * 50  # chunks, and every row of both layers once
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


# Learned sinks


@pytest.mark.parametrize("name", LEARNED_SINKS)
@torch.no_grad()
def test_learned_sinks_equal_eager_attention(name: str) -> None:
    model, ids = tiny(name), tokens(2, 100)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0

    def run() -> list[Tensor]:
        new = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        padded = model(ids, attention_mask=padding).logits[:, 5:]
        return [model(ids).logits, padded, model.generate(ids, attention_mask=padding, **new)]

    assert state_of(model) == ("eager", [])  # transformers runs them on SDPA in no case
    eager = run()
    with use_attention_function(model):
        for ours, wanted in zip(run(), eager, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert state_of(model) == ("eager", [])
    for module in model.modules():
        if getattr(module, "sinks", None) is not None:
            module.sinks.fill_(-torch.inf)
    assert (model(ids).logits - eager[0]).abs().max() > 0.05  # the sinks matter here


@pytest.mark.parametrize("name", LEARNED_SINKS)
@torch.no_grad()
def test_a_learned_sink_has_a_share_of_its_own(name: str) -> None:
    model, ids = tiny(name), tokens(1, 60)
    share = 1 - eager_weights(model, ids).sum(-1).mean(-1)  # (L,B,H)
    torch.testing.assert_close(mean_weight_on_key(model, ids, k=None), share.transpose(0, 1))
    eps = share.median().item() + 1e-4
    metric = sink_metric(model, ids, eps=eps, k=None, tokens=60)
    assert metric == pytest.approx((share > eps).float().mean().item())
    assert 0 < metric < 1
    each = (1 - eager_weights(model, ids).sum(-1)).reshape(-1, 6, 10)  # six bins of ten queries
    heads = [divmod(n, 4) for n in range(8)]
    for reduce, column in (("max", each.amax((0, 2))), ("mean", each.mean((0, 2)))):
        cells = attention_map(model, ids, bins=6, reduce=reduce, heads=heads, sink=True)
        torch.testing.assert_close(cells[:, 0], column, atol=1e-5, rtol=0)
        assert torch.equal(cells[:, 1:], attention_map(model, ids, bins=6, reduce=reduce))


@pytest.mark.parametrize("name", [*LEARNED_SINKS, *HYBRIDS])
@torch.no_grad()
def test_emphasis_is_eager_reweighting_beside_sinks_and_linear_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 2 on transformers' own eager weights; a learned sink keeps its weight of before."""
    model, ids = tiny(name), tokens(2, 90)
    model.set_attn_implementation("eager")
    heads = [(1, 0), (1, 2), (3 if name in HYBRIDS else 0, 1)]
    padding, factor = torch.ones_like(ids), torch.full(ids.shape, 0.01)
    padding[0, :5] = 0
    factor[:, 10:20] = 1
    file = sys.modules[type(model).__module__]
    eager = file.eager_attention_forward

    def reweighted(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *mask, **other) -> tuple:
        weights = eager(module, q, k, v, *mask, **other)[1]
        sink = 1 - weights.sum(-1, keepdim=True)
        for layer, head in heads:
            if layer == module.layer_idx:
                weights[:, head] *= factor[:, None]
        weights = weights / (weights.sum(-1, keepdim=True) + sink)
        return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2), None

    with monkeypatch.context() as patch:
        patch.setattr(file, "eager_attention_forward", reweighted)
        wanted = model(ids, attention_mask=padding).logits
    which = softmax_layers_only(model) if name in HYBRIDS else nullcontext()
    warned = pytest.warns(match=r"layers \[0, 2\]") if name in HYBRIDS else nullcontext()
    with warned, which, emphasise(model, [[(10, 20)]] * 2, heads):
        steered = model(ids, attention_mask=padding).logits
    torch.testing.assert_close(steered[:, 5:], wanted[:, 5:], atol=1e-5, rtol=0)
    assert (steered - model(ids, attention_mask=padding).logits)[:, 5:].abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:layers")
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_read_in_its_softmax_layers_when_asked(name: str) -> None:
    model, ids = tiny(name), tokens(1, 40)
    for read in (attention_weights, lambda m, _: attach(m, {1: AttentionCall.attend}).__enter__()):
        with pytest.raises(ValueError, match=r"none in \[0, 2\]"):
            read(model, ids)
    eager = eager_weights(model, ids)[:, 0]
    with softmax_layers_only(model) as layers:
        assert layers == [1, 3] and [*heads_by_layer(model, None)] == layers
        weights = attention_weights(model, ids)
        alpha = mean_weight_on_key(model, ids)[:, layers]
        assert sink_metric(model, ids, eps=alpha.median().item() + 1e-6, tokens=40) == 0.5
        with pytest.raises(ValueError, match=r"L0H1: expected layers in \[1, 3\]"):
            heads_by_layer(model, "L0H1")
        with pytest.raises(ValueError, match=r"none in \[0, 2\]"):
            SinkCache(model)
    torch.testing.assert_close(weights[layers], eager, atol=2e-6, rtol=1e-4)
    assert not weights[[0, 2]].any() and state_of(model) == ("sdpa", [])


def test_masks_of_the_model_s_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers promises nothing, it must compute the same as on SDPA, padding too."""
    model, other = tiny("llama"), tiny("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with use_attention_function(model):
        pass
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "steerkit", lambda *_, **__: None)
    with pytest.raises(ValueError, match="masks of the model's own"), use_attention_function(other):
        pass
    assert state_of(other) == ("sdpa", [])


@torch.no_grad()
def test_a_learned_sink_in_bfloat16_is_nearer_to_the_truth_than_eager() -> None:
    model = tiny("gpt_oss").bfloat16()
    call = trace_attention(model, tokens(2, 60))[1]
    eager = sys.modules[type(model).__module__].eager_attention_forward

    def by_eager(dtype: torch.dtype) -> Tensor:
        call.module.sinks.data = call.learned_sink.to(dtype)
        qkv = [x.to(dtype) for x in (call.query, call.key, call.value)]
        future = torch.full((60, 60), -torch.inf, dtype=dtype).triu(1)
        return eager(call.module, *qkv, future, scaling=call.scaling)[0]

    exact = by_eager(torch.float64)
    ours, theirs = (x.double() - exact for x in (call.attend(), by_eager(torch.bfloat16)))
    assert 0 < ours.norm() < theirs.norm()


def test_a_learned_sink_has_its_gradient() -> None:
    model, ids = tiny("gpt_oss"), tokens(2, 30)
    gradients = []
    for attention in (nullcontext(), use_attention_function(model)):
        with attention:
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "attn" in n])
        model.zero_grad()
    assert gradients[0]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_model_without_sdpa_is_refused_unless_sinks_are_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    with pytest.raises(ValueError, match="SDPA cannot compute"), use_attention_function(model):
        pass
    assert state_of(model) == ("eager", [])


# What comes in

PAIRS = [(0, 1), (1, 2)]
ONE = [Head(1, 2), (1, 2), "L1H2", torch.tensor([1, 2]), ["L1H2"]]
TWO = [PAIRS, iter(PAIRS), torch.tensor(PAIRS), np.array(PAIRS), ["L0H1", Head(1, 2)]]
TWO += [[(torch.tensor(0), torch.tensor(1)), torch.tensor([1, 2])]]
TWO += [{"0": [1], "1": torch.tensor([2])}, {0: np.array([1]), torch.tensor(1): (2,)}]


@pytest.mark.parametrize("heads", [*ONE, *TWO], ids=lambda heads: type(heads).__name__)
def test_heads_come_in_every_form_and_one_needs_no_list(llama: Model, heads: object) -> None:
    one = any(heads is head for head in ONE)
    assert heads_by_layer(llama, heads) == ({1: [2]} if one else {0: [1], 1: [2]})


@pytest.mark.parametrize(
    "heads",
    [3, "H2", [1.0, 2.0], [(0.0, 1.0)], [(True, False)], torch.zeros(2, 2), torch.ones(1, 3).int()],
    ids=str,
)
def test_what_is_no_head_is_refused_in_one_sentence(llama: Model, heads: object) -> None:
    with pytest.raises(ValueError, match=r"no heads: .* \(layer, index\)"):
        heads_by_layer(llama, heads)


@pytest.mark.parametrize("layer", [2, -1, 0.5, torch.tensor(1)])
def test_an_edit_of_no_layer_is_refused(llama: Model, layer: object) -> None:
    """A tensor as a key would match no layer, without a word."""
    with pytest.raises(ValueError, match="layers"), attach(llama, {layer: AttentionCall.attend}):
        pass


def in_a_thread(run: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("state", ["edit", "recorder", "zero sink"])
def test_a_second_thread_is_refused_by_the_reason(llama: Model, state: str) -> None:
    ids = tokens(1, 5)

    def from_a_thread(*_: object) -> None:
        for run in (lambda: llama(ids), lambda: attach(llama, {}).__enter__()):
            with pytest.raises(ValueError, match="another thread"):
                in_a_thread(run)

    if state == "recorder":
        record_weights(llama, ids, from_a_thread)
    else:
        edits = {0: AttentionCall.attend}
        with softmax_off_by_one(llama) if state == "zero sink" else attach(llama, edits):
            from_a_thread()
    in_a_thread(lambda: llama(ids))  # and afterwards all threads may


def test_a_backward_pass_in_another_thread_may_run_layers_again(llama: Model) -> None:
    """As CUDA's does, under gradient checkpointing."""
    model = tiny("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with softmax_off_by_one(model):
        loss = model(tokens(1, 9), labels=tokens(1, 9)).loss
        in_a_thread(loss.backward)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_weights_are_not_asked_for_by_output_attentions(name: str) -> None:
    model = tiny(name)
    with (
        attach(model, {0: AttentionCall.attend}),
        pytest.raises(ValueError, match="output_attentions=True"),
    ):
        model(tokens(1, 5), output_attentions=True)


def test_a_model_without_softmax_attention_is_refused_in_one_sentence() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=V, hidden_size=16))
    for ask in (attention_weights, sink_metric, lambda m, ids: heads_by_layer(m, None)):
        with pytest.raises(ValueError, match="Mamba"):
            ask(model, tokens(1, 64))
