"""A small kit behind notebooks that reproduce four results about steering a model's attention.

The names below are the four results; everything else is imported from its module.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {  # module -> its names; a module is imported when one of its names is asked for
    # a model and its text
    "models": ["load"],
    "chat": ["reply", "Message"],
    "spans": ["find_span"],
    # look: attention weights and heat maps
    "attention.heads": ["Head"],
    "attention.hook": ["attach"],
    "attention.record": ["attention_weights", "sink_metric"],
    "attention.maps": ["attention_map", "span_share"],
    # steer: PASTA
    "steering.pasta": ["emphasise"],
    "steering.other_methods": ["additive_bias"],
    "steering.head_search": ["score_heads"],
    # stream: StreamingLLM
    "streaming.sink_cache": ["SinkCache"],
    "streaming.losses": ["token_losses", "recomputed_losses"],
    "streaming.conversation": ["stream_chat"],
    # keep an instruction: Ghost Attention, whose training needs TRL and PEFT
    "gatt.dialogues": ["sample_dialogues", "make_rows"],
    "gatt.training": ["train"],
    "gatt.evaluation": ["adherence_by_turn"],
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"steerkit.{_MODULES[name]}"), name)
