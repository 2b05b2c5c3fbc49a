"""A small kit behind notebooks that reproduce four results about steering a model's attention.

These names are the four results; everything else is imported from its module.
"""

from typing import Any

from steerkit.attention.hook import Head, attach
from steerkit.attention.maps import attention_map, span_share
from steerkit.attention.record import attention_weights, sink_metric
from steerkit.chat import Message, reply
from steerkit.gatt.dialogues import make_rows, sample_dialogues
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.models import load
from steerkit.spans import find_span
from steerkit.steering.head_search import score_heads
from steerkit.steering.other_methods import additive_bias
from steerkit.steering.pasta import emphasise
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.losses import recomputed_losses, token_losses
from steerkit.streaming.sink_cache import SinkCache

__all__ = [  # noqa: RUF022
    # a model and its text
    "load", "reply", "find_span", "Message",
    # look: attention weights and heat maps
    "attach", "attention_weights", "attention_map", "span_share", "sink_metric",
    # steer: PASTA
    "emphasise", "additive_bias", "Head", "score_heads",
    # stream: StreamingLLM
    "SinkCache", "token_losses", "recomputed_losses", "stream_chat",
    # keep an instruction: Ghost Attention
    "sample_dialogues", "make_rows", "train", "adherence_by_turn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`train` is imported when it is asked for: TRL and PEFT are an extra, and slow to import."""
    if name == "train":
        from steerkit.gatt.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
