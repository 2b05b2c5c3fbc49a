"""Intervals: of means over independent things, and of shares."""

import math

import torch
from torch import Tensor


def bootstrap(
    values: Tensor, *, block: int = 1, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float] | tuple[Tensor, Tensor, Tensor]:
    """Mean and 95 % percentile interval over the first axis: (N,) -> floats, (N, ...) -> (...).

    The first axis must hold independent things (dialogues, streams, seeds). For tokens of one text
    take a `block` so long that blocks are: (T,) -> means of T // block blocks, NaN left out.
    """
    values = torch.as_tensor(values).double().cpu()
    if block < 1:
        raise ValueError(f"block={block}: expected at least 1")
    if block > 1 and values.ndim:
        values = values[: len(values) // block * block].unflatten(0, (-1, block)).nanmean(1)
        values = values[~values.isnan()]
    if values.ndim == 0 or len(values) < 2:
        raise ValueError(f"values of shape {tuple(values.shape)}: expected at least 2 along axis 0")
    draw = torch.Generator().manual_seed(seed)
    n = len(values)
    means = torch.stack(
        [values[torch.randint(n, (n,), generator=draw)].mean(0) for _ in range(resamples)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    triple = values.mean(0), low, high
    return triple if values.ndim > 1 else tuple(x.item() for x in triple)


def wilson(scores: Tensor) -> tuple[float, float]:
    """95 % interval of a mean of 0/1 scores (N,): Wilson's, which all-right does not shrink."""
    n, mean, z = len(scores), scores.float().mean().item(), 1.96
    centre, width = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / 2 / n) ** 2)
    return tuple((centre + side * width) / (1 + z * z / n) for side in (-1, 1))
