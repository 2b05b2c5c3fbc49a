"""The exported names, for editors and type checkers: `__init__.py` imports them when asked for."""

from steerkit.attention.heads import Head as Head
from steerkit.attention.hook import attach as attach
from steerkit.attention.maps import attention_map as attention_map
from steerkit.attention.maps import span_share as span_share
from steerkit.attention.record import attention_weights as attention_weights
from steerkit.attention.record import sink_metric as sink_metric
from steerkit.chat import Message as Message
from steerkit.chat import reply as reply
from steerkit.gatt.dialogues import make_rows as make_rows
from steerkit.gatt.dialogues import sample_dialogues as sample_dialogues
from steerkit.gatt.evaluation import adherence_by_turn as adherence_by_turn
from steerkit.gatt.training import train as train
from steerkit.models import load as load
from steerkit.spans import find_span as find_span
from steerkit.steering.head_search import score_heads as score_heads
from steerkit.steering.other_methods import additive_bias as additive_bias
from steerkit.steering.pasta import emphasise as emphasise
from steerkit.streaming.conversation import stream_chat as stream_chat
from steerkit.streaming.losses import recomputed_losses as recomputed_losses
from steerkit.streaming.losses import token_losses as token_losses
from steerkit.streaming.sink_cache import SinkCache as SinkCache
