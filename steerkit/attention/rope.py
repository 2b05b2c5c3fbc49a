"""How a model's keys turn with position, found by asking the model and not by its name.

Rotary embedding is already applied when attention is called, so moving a cached key means turning
it by the *difference* of two positions. A pure turn: constant factors on cos and sin (static yarn)
are in the key already.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention.hook import AttentionCall, trace_attention

_STEPS = 3  # positions between the two probes: small, so that float32 angles are exact


class Rotation(NamedTuple):
    """Radians per position of each rotated pair (float64); pairs are (0, 1) or (0, D/2)."""

    frequencies: Tensor
    interleaved: bool

    def table(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for turns by `steps` positions: (T,) -> (T, pairs) each. Angles in float64,
        exact to 1e9.
        """
        angles = steps.double()[:, None] * self.frequencies.to(steps.device)
        return angles.cos().float(), angles.sin().float()

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate vectors (..., T, D); dimensions beyond the rotated ones pass (partial rotary)."""
        cos, sin = table
        pairs = cos.shape[-1]
        turned, kept = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        out = out.to(x.dtype)
        return torch.cat([out, kept], dim=-1) if kept.shape[-1] else out


def rope_kinds(model: PreTrainedModel) -> set[str]:
    """The RoPE types of the model's rotary modules, for example {"default"} or {"yarn"}."""
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, dict) else [kind] if kind else [])
    return kinds


def learn_rotations(model: PreTrainedModel) -> tuple[list[AttentionCall], list[Rotation | None]]:
    """One probed call and one rotation per layer (None: the layer ignores positions).

    A few single tokens are run at position 0 and at position 3. With one token there is one key, so
    hidden states agree and every layer's keys must differ by a turn alone. Raises ValueError where
    none explains them.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([1, vocabulary // 2, vocabulary - 1]).clamp(max=vocabulary - 1)
    positions = torch.tensor([0, _STEPS]).repeat_interleave(len(tokens))[:, None].to(model.device)
    calls = trace_attention(model, tokens.repeat(2)[:, None], position_ids=positions)
    candidates = _candidates(model)
    return calls, [_explain(layer, call.key, candidates) for layer, call in enumerate(calls)]


def _candidates(model: PreTrainedModel) -> list[Rotation]:
    found = {}
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            frequencies = buffer.detach().double()
            found[tuple(frequencies.tolist())] = frequencies
    return [Rotation(f, interleaved) for f in found.values() for interleaved in (False, True)]


def _explain(layer: int, keys: Tensor, candidates: list[Rotation]) -> Rotation | None:
    before, after = keys.chunk(2)  # (tokens,Hkv,1,D) each
    scale = before.float().norm(dim=-1, keepdim=True)
    tolerance = 1e-4 if keys.dtype == torch.float32 else 3e-2

    def close(guess: Tensor) -> bool:
        return bool(((guess - after).float().abs() <= tolerance * scale).all())

    steps = torch.tensor([_STEPS], device=keys.device)
    for rotation in candidates:
        fits = 2 * rotation.frequencies.numel() <= keys.shape[-1]
        if fits and close(rotation.rotate(before, rotation.table(steps))):
            return rotation
    if candidates and close(before):
        return None
    raise ValueError(
        f"layer {layer}: its keys do not turn with position by a rotary embedding that steerkit "
        "can read (learned positions, ALiBi, custom rotary code), so cached keys cannot be moved; "
        "use a rotary model such as Llama, Qwen or GPT-NeoX"
    )
