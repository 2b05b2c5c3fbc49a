"""PASTA's relatives against their formulas, written on weights: no score is touched here."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_attention import state_of
from test_pasta import HEADS, MASK, NEW, PADDED, SPANS, close
from tiny_models import tiny, tokens
from torch import Tensor

from steerkit.attention.heads import Head
from steerkit.attention.hook import AttentionCall, Edit, attach
from steerkit.steering import key_bias
from steerkit.steering.other_methods import additive_bias, instaboost, split_softmax, spotlight
from steerkit.steering.pasta import emphasise
from steerkit.steering.verify import verify

ALL = [Head(layer, index) for layer in range(2) for index in range(4)]
Change = Callable[[Tensor, Tensor], Tensor]
Method = Callable[..., AbstractContextManager]


def boosted(weights: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, 5 * weights, weights)


def biased(weights: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, weights * torch.tensor(-1.5).exp(), weights)


def spotlit(weights: Tensor, inside: Tensor) -> Tensor:
    """Equations 2-4 of SpotLight; 5 is asserted: the share that comes of it."""
    psi = (weights * inside).sum(-1, keepdim=True)
    factor = torch.where(psi < 0.3, 0.3 / psi, torch.ones(()))
    out = torch.where(inside & (psi > 0), weights * factor, weights)
    out = out / out.sum(-1, keepdim=True).clamp(min=1e-30)  # rows of pads
    share = (out * inside).sum(-1, keepdim=True)
    close(share, torch.where((psi < 0.3) & (psi > 0), 0.3 / (1.3 - psi), psi))
    return out


def spotlit_exactly(weights: Tensor, inside: Tensor) -> Tensor:
    """Every query that sees spans, and less of them than 0.3, sees 0.3 of them."""
    psi = (weights * inside).sum(-1, keepdim=True)
    scaled = torch.where(inside, weights * 0.3 / psi, weights * 0.7 / (1 - psi))
    return torch.where((psi > 0) & (psi < 0.3), scaled, weights)


def split(weights: Tensor, inside: Tensor) -> Tensor:
    psi = (weights * inside).sum(-1, keepdim=True).double().clamp(0, 1)
    raised = psi**0.4
    some = (psi > 0) & (psi < 1)
    scaled = torch.where(inside, weights * raised / psi, weights * (1 - raised) / (1 - psi))
    return torch.where(some, scaled, weights.double()).to(weights.dtype)


RELATIVES: dict[str, tuple[Method, Change]] = {
    "instaboost": (partial(instaboost, multiplier=5), boosted),
    "additive": (partial(additive_bias, bias=-1.5), biased),
    "spotlight": (partial(spotlight, target=0.3), spotlit),
    "spotlight, exact": (partial(spotlight, target=0.3, exact=True), spotlit_exactly),
    "split": (partial(split_softmax, exponent=0.4), split),
}


def by_hand(change: Change, heads: list[Head]) -> dict[int, Edit]:
    """Weights after the softmax, changed in `heads`, renormalised; keys are the whole sequence."""

    def of(layer: int) -> Edit:
        chosen = [head.index for head in heads if head.layer == layer]

        def edit(call: AttentionCall) -> Tensor:
            (_, H, Q, _), K = call.query.shape, call.key.shape[2]
            groups = H // call.key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
            visible = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
            visible = visible if call.mask is None else call.mask
            scores = (call.query @ key.mT * call.scaling).masked_fill(~visible, -1e30)
            weights = scores.softmax(-1) * visible
            inside = F.pad(MASK, (0, max(0, K - 40)))[:, None, None]
            changed = change(weights[:, chosen], inside)
            weights[:, chosen] = changed / changed.sum(-1, keepdim=True).clamp(min=1e-30)
            return (weights @ value).transpose(1, 2)

        return edit

    return {layer: of(layer) for layer in {head.layer for head in heads}}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("heads", [None, HEADS])
@torch.no_grad()
def test_each_relative_equals_its_formula_in_prefill_and_decode(
    name: str, relative: str, heads: list[Head] | None
) -> None:
    model, ids = tiny(name, sharpen=2.0), tokens(2, 40)
    steer, change = RELATIVES[relative]

    def run() -> tuple[Tensor, Tensor, Tensor]:
        made = model.generate(ids, attention_mask=PADDED, **NEW)
        return model(ids).logits, torch.stack(made.logits), made.sequences

    plain = run()
    with attach(model, by_hand(change, heads or ALL)):
        wanted = run()
    with steer(model, SPANS, heads=heads):
        ours = run()
    for a, b in zip(ours, wanted, strict=True):
        close(a, b)
    assert (plain[0] - wanted[0]).abs().max() > 0.01
    assert state_of(model) == ("sdpa", [])


@pytest.mark.parametrize(
    "steer",
    [
        partial(instaboost, multiplier=1),
        partial(additive_bias, bias=0.0),
        partial(split_softmax, exponent=1),
    ],
)
@torch.no_grad()
def test_the_degenerate_case_is_bit_equal_to_plain(steer: Method) -> None:
    model, ids = tiny("llama"), tokens(2, 40)
    plain = model(ids).logits
    with steer(model, SPANS):
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "opt"])
@pytest.mark.parametrize("relative", RELATIVES)
def test_verify_proves_that_steering_is_on_and_exact(name: str, relative: str) -> None:
    model, ids = tiny(name, sharpen=2.0), tokens(2, 40)
    steering = RELATIVES[relative][0](model, SPANS, heads=HEADS)
    found = verify(model, ids, steering, attention_mask=PADDED)
    assert found.error < 1e-4 < 1e-2 < found.effect


def test_verify_sees_what_is_wrong_or_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), tokens(2, 40)
    with pytest.raises(ValueError, match=r"effect on a logit is 0.0: .*neutral"):
        verify(model, ids, emphasise(model, SPANS, HEADS, alpha=1.0))

    in_bfloat16 = tiny("llama").bfloat16()
    found = verify(in_bfloat16, ids, emphasise(in_bfloat16, SPANS, HEADS))
    assert 0 < found.error < 0.2 * found.effect
    wrong = key_bias.attend_biased
    monkeypatch.setattr(key_bias, "attend_biased", lambda call, on, bias: wrong(call, on, bias / 2))
    assert verify(model, ids, emphasise(model, SPANS, HEADS)).error > 1e-2


@torch.no_grad()
def test_pasta_is_an_additive_bias_until_something_is_generated() -> None:
    model, ids = tiny("llama"), tokens(2, 40)
    with emphasise(model, SPANS, ALL, alpha=0.05):
        pasta = model.generate(ids, **NEW)
    with additive_bias(model, SPANS, -torch.tensor(0.05).log().item()):
        bias = model.generate(ids, **NEW)
    close(pasta.logits[0], bias.logits[0])
    assert not torch.allclose(pasta.logits[1], bias.logits[1], atol=1e-2)


@torch.no_grad()
def test_sharp_attention_keeps_the_strengths_finite() -> None:
    model, ids = tiny("llama", sharpen=16.0), tokens(2, 40)
    for steer in (spotlight(model, SPANS), split_softmax(model, SPANS, exponent=0.01)):
        with steer:
            assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (partial(instaboost, multiplier=0.5), "multiplier=0.5: .* >= 1"),
        (partial(instaboost, multiplier="5"), "multiplier=5"),
        (partial(additive_bias, bias=float("inf")), "bias=inf: expected a finite"),
        (partial(spotlight, target=1.0), "target=1.0: .* 0 < target < 1"),
        (partial(split_softmax, exponent=1.5), "exponent=1.5"),
        (partial(split_softmax, exponent=None), "exponent=None"),
    ],
)
def test_bad_input_is_one_clear_error(steer: Method, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message), steer(model, SPANS):
        pass
    assert state_of(model) == ("sdpa", [])
