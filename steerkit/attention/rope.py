"""Infers how a model rotates its keys with position (RoPE), by running it at two positions.

A key in the cache is rotated already, so moving it by some positions means rotating it by the
*difference*. The rotation alone is inferred: constant factors on cos and sin (static yarn) are in
the key already. No list of class names is needed.

Axes: B batch, Hkv key heads, T tokens, D head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.attention.hook import AttentionCall, trace_attention
from steerkit.models import Model

_STEPS = 3  # positions between the two runs: few, so that float32 angles are exact


class Rotation(NamedTuple):
    """Radians per position of each rotated pair (float64); pairs are (0, 1) or (0, D/2)."""

    frequencies: Tensor
    interleaved: bool

    def table(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for rotations by `steps` positions: (T,) -> (T, pairs) each.

        Angles are computed in float64, which is exact to 1e9 positions.
        """
        angles = steps.double()[:, None] * self.frequencies.to(steps.device)
        return angles.cos().float(), angles.sin().float()

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate vectors (..., T, D) by a table's angles; the rest of D passes (partial RoPE)."""
        cos, sin = table
        pairs = cos.shape[-1]
        shape, axis = ((pairs, 2), -1) if self.interleaved else ((2, pairs), -2)
        a, b = x[..., : 2 * pairs].float().unflatten(-1, shape).unbind(axis)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2).to(x.dtype)
        rest = x[..., 2 * pairs :]
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def rope_kinds(model: Model) -> set[str]:
    """The RoPE types of the model's rotary modules, for example {"default"} or {"yarn"}."""
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, dict) else [kind] if kind else [])
    return kinds


def learn_rotations(model: Model) -> tuple[list[AttentionCall], list[Rotation | None]]:
    """One traced call and one rotation per layer (None: the layer ignores positions).

    Each of a few tokens is run alone at position 0 and at position 3. One token has one key, whose
    weight is 1 wherever it stands, so both runs have the same hidden states, and a layer's keys
    differ by the rotation alone. Raises ValueError where no rotation explains them.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([min(1, vocabulary - 1), vocabulary // 2, vocabulary - 1])
    positions = torch.tensor([0, _STEPS]).repeat_interleave(len(tokens))[:, None].to(model.device)
    ids = tokens.repeat(2)[:, None]
    traced = trace_attention(model, ids, position_ids=positions, every_layer=True)
    candidates = [
        Rotation(buffer.detach().double(), interleaved)
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
        for interleaved in (False, True)
    ]
    calls = list(traced.values())
    return calls, [_rotation_of(layer, call.key, candidates) for layer, call in enumerate(calls)]


def _rotation_of(layer: int, keys: Tensor, candidates: list[Rotation]) -> Rotation | None:
    """The rotation that takes the first half of `keys` (2 tokens, Hkv, 1, D) to the second.

    It is the best candidate, not any within the tolerance: in half precision one dimension far
    larger than the others widens the tolerance for all of them.
    """
    fitting = [r for r in candidates if 2 * r.frequencies.numel() <= keys.shape[-1]]
    best = min([None, *fitting], key=lambda rotation: _error(rotation, keys).sum().item())
    tolerance = 1e-4 if keys.dtype == torch.float32 else 3e-2
    allowed = tolerance * keys.chunk(2)[0].float().norm(dim=-1, keepdim=True)
    if candidates and (_error(best, keys) <= allowed).all():
        return best

    why = (
        "its keys do not rotate with position in a way that steerkit can read (learned positions, "
        "ALiBi, custom rotary code)"
    )
    for rotation in fitting:
        rotary = 2 * rotation.frequencies.numel()
        if (_error(rotation, keys[..., -rotary:]) <= allowed).all():
            why = f"only the last {rotary} dimensions of each key are rotary (MLA)"
    raise ValueError(
        f"layer {layer}: {why}, so cached keys cannot be moved; use a rotary model such as Llama, "
        "Qwen or GPT-NeoX"
    )


def _error(rotation: Rotation | None, keys: Tensor) -> Tensor:
    """How far the first half of `keys`, rotated, is from the second: (tokens,Hkv,1,D)."""
    before, after = keys.float().chunk(2)
    if rotation is not None:
        steps = torch.tensor([_STEPS], device=keys.device)
        before = rotation.rotate(before, rotation.table(steps))
    return (before - after).abs()
