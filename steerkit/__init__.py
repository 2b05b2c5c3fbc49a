"""Notebooks that reproduce four results about steering a language model's attention."""

from steerkit.attention.hook import attach, softmax_off_by_one, use_attention_function
from steerkit.attention.maps import attention_map, attention_received, span_attention, span_share
from steerkit.attention.record import (
    attention_weights,
    mean_weight_on_key,
    sink_metric,
    value_norms,
)
from steerkit.chat import Message, chat_batch, reply
from steerkit.models import load
from steerkit.results import figures_dir, paper_result, save_claim
from steerkit.spans import find_span, find_spans, message_span, read_marks
from steerkit.statistics import bootstrap
from steerkit.steering.other_methods import additive_bias, instaboost, split_softmax, spotlight
from steerkit.steering.pasta import Head, emphasise
from steerkit.streaming.losses import recomputed_losses, stream_chat, token_hits, token_losses
from steerkit.streaming.sink_cache import SinkCache
from steerkit.streaming.stream_eval import Fact, accuracy_by_distance, eval_hits, eval_stream

__all__ = [
    "Fact",
    "Head",
    "Message",
    "SinkCache",
    "accuracy_by_distance",
    "additive_bias",
    "attach",
    "attention_map",
    "attention_received",
    "attention_weights",
    "bootstrap",
    "chat_batch",
    "emphasise",
    "eval_hits",
    "eval_stream",
    "figures_dir",
    "find_span",
    "find_spans",
    "instaboost",
    "load",
    "mean_weight_on_key",
    "message_span",
    "paper_result",
    "read_marks",
    "recomputed_losses",
    "reply",
    "save_claim",
    "sink_metric",
    "softmax_off_by_one",
    "span_attention",
    "span_share",
    "split_softmax",
    "spotlight",
    "stream_chat",
    "token_hits",
    "token_losses",
    "use_attention_function",
    "value_norms",
]
