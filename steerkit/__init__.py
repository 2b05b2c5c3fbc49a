"""A small kit behind notebooks that reproduce four results about steering a model's attention.

The names below are the four results; everything else is imported from its module.
"""

from importlib import import_module
from typing import Any

_MODULES = {  # exported name -> its module, which is imported when the name is asked for
    # a model and its text
    "load": "models",
    "reply": "chat",
    "find_span": "spans",
    "Message": "chat",
    # look: attention weights and heat maps
    "attach": "attention.hook",
    "attention_weights": "attention.record",
    "attention_map": "attention.maps",
    "span_share": "attention.maps",
    "sink_metric": "attention.record",
    # steer: PASTA
    "emphasise": "steering.pasta",
    "additive_bias": "steering.other_methods",
    "Head": "attention.hook",
    "score_heads": "steering.head_search",
    # stream: StreamingLLM
    "SinkCache": "streaming.sink_cache",
    "token_losses": "streaming.losses",
    "recomputed_losses": "streaming.losses",
    "stream_chat": "streaming.conversation",
    # keep an instruction: Ghost Attention, whose training needs TRL and PEFT
    "sample_dialogues": "gatt.dialogues",
    "make_rows": "gatt.dialogues",
    "train": "gatt.training",
    "adherence_by_turn": "gatt.evaluation",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"steerkit.{_MODULES[name]}"), name)
