"""Names for attention heads, and every way in which a caller may list them.

Layers and heads count from 0. Heads are *query* heads. Axes: L layers, H query heads.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from steerkit.attention.hook import layers_of
from steerkit.models import Model


class Head(NamedTuple):
    """One attention head: `layer` and `index` count from 0, `index` counts *query* heads.

    >>> from steerkit import Head
    >>> str(Head(layer=2, index=3))
    'L2H3'
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


Heads = Iterable[Any] | Mapping[Any, Iterable[int]] | str
"""Heads as (layer, index), `Head`, "L2H3" or rows of an integer tensor or array (n,2); one of them
alone; or the official head files' {"layer": [query heads]}."""


def layer_and_head_counts(model: Model) -> tuple[int, int]:
    """(L, H): layers, and query heads of each."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"{type(model).__name__} has num_attention_heads={heads}: use an architecture with "
            "softmax attention throughout"
        )
    return config.num_hidden_layers, heads


def heads_by_layer(model: Model, heads: Heads | None) -> dict[int, list[int]]:
    """{layer: its query heads} of `heads`, None for all; each head once, layers in order."""
    _, H = layer_and_head_counts(model)
    layers = layers_of(model)
    pairs = product(layers, range(H)) if heads is None else _pairs(heads)
    chosen: dict[int, list[int]] = {}
    for layer, index in sorted(set(pairs)):
        if layer not in layers or not 0 <= index < H:
            raise ValueError(f"{Head(layer, index)}: expected layers in {layers}, {H} query heads")
        chosen.setdefault(layer, []).append(index)
    return chosen


def _pairs(heads: Heads) -> list[tuple[int, int]]:
    """Every form of `Heads` as (layer, index); ValueError for anything else, and for none."""
    try:
        if isinstance(heads, Mapping):
            heads = [(int(layer), index) for layer, some in heads.items() for index in some]
        table = np.array(_plain(heads))
        valid = table.dtype.kind == "i" and table.ndim in (1, 2) and table.shape[-1] == 2
    except (TypeError, ValueError):  # no numbers, or not in pairs
        valid = False
    if not valid:
        raise ValueError(
            f"{heads!r:.80} are no heads: expected (layer, index) pairs of whole numbers, a tensor "
            'of them (n, 2), "L2H3", {"layer": [query heads]}, or None for all heads'
        )
    return [(layer, index) for layer, index in table.reshape(-1, 2).tolist()]


def _plain(heads: Any) -> Any:
    """Names, tensors, arrays and other collections as lists of numbers."""
    if isinstance(heads, str):
        return [int(number) for number in heads.removeprefix("L").split("H")]
    if hasattr(heads, "tolist"):
        return heads.tolist()
    return [_plain(each) for each in heads] if isinstance(heads, Iterable) else heads
