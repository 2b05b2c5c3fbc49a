"""Notebooks that reproduce four results about steering a language model's attention."""

from steerkit.attention import sink_metric, softmax_off_by_one, token0_mass
from steerkit.chat import Message, play, reply
from steerkit.models import load
from steerkit.streaming import recomputed_losses, token_losses

__all__ = [
    "Message",
    "load",
    "play",
    "recomputed_losses",
    "reply",
    "sink_metric",
    "softmax_off_by_one",
    "token0_mass",
    "token_losses",
]
