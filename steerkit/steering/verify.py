"""Is steering on, and is it exact? `verify` compares it with the equation, written on weights."""

from contextlib import AbstractContextManager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from steerkit.attention.hook import AttentionCall
from steerkit.attention.record import softmax
from steerkit.models import Model
from steerkit.steering import key_bias


class Verified(NamedTuple):
    """Largest differences of a logit over all tokens of one forward.

    `error`: steered against the equation. `effect`: steered against not steered.
    """

    error: float
    effect: float


@torch.no_grad()
def verify(
    model: Model, ids: Tensor, steering: AbstractContextManager, **inputs: Tensor
) -> Verified:
    """Steer one forward over prompts `ids` (B,T), and once more by `reweighted`: slow, and plain.

    `steering` is what stands in the `with`, of any method. The error is rounding: below 1e-4 in
    float32 (it grows with the logits), in bfloat16 far below the effect. The weights need memory
    for T * T numbers per head of a layer. `inputs` for padded prompts: `attention_mask`,
    `position_ids`. Raises ValueError if steering changes nothing.

    >>> from steerkit import emphasise, load
    >>> from steerkit.steering.verify import verify
    >>> model, tokenizer = load("tiny")
    >>> ids = tokenizer("Clara lives in Oslo. Clara lives in Rome.", return_tensors="pt").input_ids
    >>> found = verify(model, ids, emphasise(model, [[(0, 5)]], heads=[(2, 0), (2, 3)]))
    >>> found.error < 1e-4 < found.effect
    True
    """

    def logits() -> Tensor:
        return model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits.float()

    plain = logits()
    with steering:
        steered = logits()
        with patch.object(key_bias, "attend_biased", reweighted):
            wanted = logits()
    error, effect = ((steered - other).abs().max().item() for other in (wanted, plain))
    if not effect > 0:
        raise ValueError(
            f"the largest effect on a logit is {effect}: choose a strength other than the neutral "
            "one, and spans that leave a part of the prompt outside"
        )
    return Verified(error, effect)


def reweighted(call: AttentionCall, strength: Tensor, bias: Tensor) -> Tensor:
    """`attend_biased` as the papers write it: a factor on the weights, then renormalised.

    In PASTA (2311.02262, equation 2) the factor is alpha outside the spans, in the steered heads.
    """
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (call.key, call.value))
    scores = call.query.float() @ key.mT * call.scaling  # (B,H,Q,K)
    causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if call.causal else call.mask
    sink = None if call.sink is None else call.sink[:, None, None]
    weights = softmax(key_bias.add_mask(scores, causal), sink).nan_to_num()  # pads see no key
    on_sink = 1 - weights.sum(-1, keepdim=True)  # 0 where the architecture has no sink

    weights = weights * (strength[..., None] * bias[:, None, None]).exp()
    weights = weights / (weights.sum(-1, keepdim=True) + on_sink)
    return (weights @ value).to(call.value.dtype).transpose(1, 2)
