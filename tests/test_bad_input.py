"""One table of wrong requests: each is refused with one line that says what is wrong.

To add a row: a call of the kit `k`, a pattern of the message, and the exception if it is not
ValueError. Requests that only one room can refuse stand in that room's test file.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
import torch

import steerkit
from steerkit import SinkCache, recomputed_losses, results, statistics, token_losses
from steerkit.attention import maps, record
from steerkit.attention.hook import attach
from steerkit.chat import BatchedChat
from steerkit.constraints import Constraint, OwnConstraint, Probe, values
from steerkit.gatt.dialogues import Plan, sample_dialogues
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.steering.head_search import score_heads
from steerkit.steering.pasta import emphasise
from steerkit.streaming import backcopy
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.latency import decode_pace
from steerkit.tiny import streams
from steerkit.viz import plots
from steerkit.viz.html import attention_page

Kit = SimpleNamespace
CLAIM = {
    "claim": "c", "paper": None, "ours": {}, "holds": True, "n": 1, "interval": None,
    "seeds": [0], "profile": "cpu", "model": "tiny",
}  # fmt: skip
WORDS = {"caption": "What it shows.", "alt": "A line.", "values": {}}


@pytest.fixture
def k(tiny, tmp_path: Path) -> Kit:
    """What the calls need: a model, its tokenizer, ids, axes, a figure, an empty folder."""
    figure, axes = plt.subplots()
    plt.close(figure)
    ids = torch.arange(32).view(1, -1)
    return Kit(model=tiny[0], tokenizer=tiny[1], ids=ids, axes=axes, figure=figure, folder=tmp_path)


def losses(ids: Callable[[torch.Tensor], Any], **options: Any) -> Callable[[Kit], Any]:
    return lambda k: token_losses(k.model, ids(k.ids), **options)


def recomputed(**options: Any) -> Callable[[Kit], Any]:
    return lambda k: recomputed_losses(k.model, k.ids, **{"length": 4} | options)


def load(name: str = "tiny", **options: str) -> Callable[[Kit], Any]:
    return lambda k: steerkit.load(name, **options)


def steer(spans: object, **options: Any) -> Callable[[Kit], Any]:
    def forward(k: Kit) -> None:
        with torch.no_grad(), emphasise(k.model, spans, **{"heads": [(0, 0)], **options}):
            k.model(input_ids=k.ids)

    return forward


def show(name: str = "a", **words: str) -> Callable[[Kit], Any]:
    return lambda k: plots.show(k.figure, name, out=k.folder / "b", **WORDS | words)


Row = tuple[Callable[[Kit], Any], str] | tuple[Callable[[Kit], Any], str, type[Exception]]
# fmt: off
ROWS: list[Row] = [
    # Token ids
    (losses(lambda ids: [[1, 2]]), "ids are list: expected a tensor"),
    (losses(lambda ids: "Hi there"), "ids are str: expected a tensor"),
    (losses(lambda ids: ids[0]), r"ids are torch.int64 \(32,\): .*ids\[None\]"),
    (losses(lambda ids: ids / 2), "ids are torch.float32 .* as integers"),
    (losses(lambda ids: ids[:, :1]), r"\(1, 1\).* at least 2 tokens"),
    (losses(lambda ids: ids[:0]), r"\(0, 32\).* at least 2 tokens"),
    (losses(lambda ids: ids + 4090), "ids from 4090 .*vocabulary is 0 .. 4095"),
    (losses(lambda ids: ids - 1), "ids from -1 to 30.*vocabulary is 0 .. "),
    # Streams
    (losses(lambda ids: ids, window=0), "window=0: .* 1 or more"),
    (losses(lambda ids: ids, window=4, block=0), "block=0: expected at least 1"),
    (lambda k: SinkCache(k.model, window=2.5), "window=2.5: expected a whole"),
    (lambda k: SinkCache(k.model, sinks=None), "sinks=None: expected a whole"),
    (lambda k: SinkCache(k.model, sinks=-1), "sinks=-1: .* 0 or more"),
    (recomputed(positions=[]), "positions: expected some of 0 .. 30"),
    (recomputed(positions=[31]), "positions: expected some of 0 .. 30"),
    (recomputed(positions=[[1]]), "positions: expected some of 0 .. 30"),
    (lambda k: next(stream_chat(k.model, k.tokenizer, "Hi.")), "'Hi.': expected several texts"),
    (lambda k: decode_pace(k.model, cache=4), "window=0: .* 1 or more"),
    (lambda k: patch.object(streams.world, "english", lambda **_: ["Hi."])(streams.english_stream)(
        k.tokenizer, 99), "held-out English .*; ask for fewer"),
    (lambda k: backcopy.Recipe(arm="x"), "arm='x': expected one of vanilla"),
    (lambda k: backcopy.load_run("vanila"), "'vanila'", KeyError),
    (lambda k: backcopy.load_run("vanilla", step=7), "step-7", FileNotFoundError),
    # Models
    (load("tiny-sream"), "tiny-sream: no such directory, and no embedded model: .*tiny-stream"),
    (load("./nowhere"), "./nowhere: no such directory, and no embedded model"),
    (load("/nowhere/at/all"), "/nowhere/at/all: no such directory, and no"),
    (load("somebody/unknown-model"), r"cannot be loaded \(.*connect.*a hub id, or one of tiny"),
    (lambda k: steerkit.load(k.folder), r"cannot be loaded \(.*config.json.*; a name is a"),
    (load(device="cuda:99"), r'tiny, device="cuda:99": cannot be loaded \(.*CUDA'),
    (load(device="gpu"), r'device="gpu": cannot be loaded \(Expected one of cpu, cuda'),
    (load(dtype="float31"), r"tiny, .* cannot be loaded \(.* no attribute 'float31'"),
    (load(dtype="int8"), r"tiny, .* cannot be loaded \(.*dtype"),
    # Attention
    (lambda k: attach(k.model, {6: lambda call: call.attend()}).__enter__(),
     r"layers \[6\]: expected ints in range\(0, 6\)"),
    (lambda k: record.attention_weights(k.model, torch.zeros(1, 10**5, dtype=torch.long)),
     "100000 tokens have .* weights"),
    (lambda k: record.mean_weight_on_key(k.model, k.ids, k=32), "k=32.* < 32 tokens"),
    (lambda k: record.mean_weight_on_key(k.model, k.ids, k=-1), "k=-1.* expected 0 <="),
    (lambda k: record.sink_metric(k.model, k.ids, eps=2), "eps=2.*: expected 0 < eps < 1"),
    (lambda k: record.sink_metric(k.model, k.ids, tokens=33), "tokens=33: expected .* <= 32"),
    (lambda k: maps.attention_map(k.model, k.ids, bins=33), "bins=33, .* 1 <= bins <= 32"),
    (lambda k: maps.attention_map(k.model, k.ids, bins=4, skip=32), "skip=32: .* 0 <= skip < 32"),
    (lambda k: maps.attention_map(k.model, k.ids, bins=4, reduce="median"),
     'reduce=\'median\': expected "max" or "mean"'),
    # Steering
    (steer([[(2, 4)]], alpha=float("nan")), "alpha=nan: expected 0 < alpha <= 1"),
    (steer([]), "no spans: expected for each row"),
    (steer([[(4, 2)]]), r"row 0 of the spans is \[\(4, 2\)\]"),
    (steer([[(2, 99)]]), "past the end of a prompt of 32"),
    (steer([[(2, 4)]], heads=[(6, 0)]), r"L6H0: expected layers in range\(0, 6\)"),
    (lambda k: steerkit.find_span(k.tokenizer, "Oslo, Oslo.", "Oslo"), "2 times: choose one by"),
    (lambda k: score_heads(k.model, []), "no prompts|no examples"),
    # Instructions and the tiny world
    (lambda k: steerkit.reply(k.model, k.tokenizer, [[]]), "expected at least one message"),
    (lambda k: steerkit.reply(k.model, k.tokenizer, "Hi."), "prompts='Hi.': expected several"),
    (lambda k: steerkit.reply(k.model, k.tokenizer, [""]), "a prompt has no token"),
    (lambda k: steerkit.reply(k.model, k.tokenizer, ["Hi."], max_new_tokens=0), "tokens=0: exp"),
    (lambda k: steerkit.reply(k.model, k.tokenizer, ["Hi."], batch=-1), "batch=-1: expected a w"),
    (lambda k: BatchedChat(k.model, k.tokenizer).reply([]), "dialogues=0: expected a whole"),
    (lambda k: next(stream_chat(k.model, k.tokenizer, ["Hi."], max_new_tokens=0)), "tokens=0: "),
    (lambda k: next(stream_chat(k.model, k.tokenizer, [{"role": "assistant", "content": "No."}])),
     "expected the user's message, or its text"),
    (lambda k: Plan((), "", "Hi."), "questions='Hi.': expected several texts"),
    (lambda k: Plan(("brief",), "Be brief.", ["Hi."]), r"'brief': .* a function \(reply -> obeyed"),
    (lambda k: Plan((OwnConstraint(bool, probe=Probe("?", "", "")),), "Be brief.", ["Hi."]),
     r"with recalled\(reply\) if it has a probe"),
    (lambda k: sample_dialogues(k.model, k.tokenizer, [], candidates=0), "candidates=0: exp"),
    (lambda k: adherence_by_turn(k.model, k.tokenizer, []), "plans=0: expected a whole number"),
    (lambda k: adherence_by_turn(k.model, k.tokenizer, [Plan((), "", ["Hi."])], probe_turns=[0]),
     "probe_turns=0: expected a whole number of 1"),
    (lambda k: Plan((len,), " ", ["Hi."]), "the instruction is empty"),
    (lambda k: values("haiku"), '"haiku" is no family of a table "world"; .*hobby'),
    (lambda k: Constraint("hobby", "x", "nowhere").obeyed("Hi."), 'of a table "nowhere"; .*world'),
    # Pages, figures and results
    (lambda k: attention_page(["a", "b"], [1.0], title="t"), "shorter"),
    (lambda k: attention_page(["a"], [float("nan")], title="t"), "NaN"),
    (lambda k: attention_page(["a"], [-1.0], title="t"), "a value of -1.0: expected 0 or more"),
    (show(caption=" "), "figure 'a' has an empty caption"),
    (show("../a"), r"name='\.\./a': expected a plain file name"),
    (lambda k: plots.head_grid(k.axes, [1.0], bar="weight"), r"shape \(1,\)", TypeError),
    *((lambda k, name=name: results.save_claim(k.folder, name, **CLAIM), "a plain file name")
      for name in ("", "..", "../a", "/tmp/a", "a/b")),
    (lambda k: statistics.bootstrap(torch.tensor(1.0)), r"shape \(\): expected at least 2"),
    (lambda k: statistics.bootstrap(torch.ones(1)), r"\(1,\): exp.* at least 2"),
    (lambda k: statistics.bootstrap(torch.ones(9), block=0), "block=0: expected at least 1"),
]
# fmt: on


@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_it_is_refused_in_one_line_and_writes_nothing(k, row):
    call, message, error = (*row, ValueError)[:3]
    with pytest.raises(error, match=message) as caught:
        call(k)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert not list(k.folder.iterdir())


def test_a_refusal_leaves_the_model_as_it_was(k):
    plain = token_losses(k.model, k.ids)
    for call, message, *_ in ROWS:
        if message.startswith(("window", "block", "positions", "layers", "k=", "eps", "L6H0")):
            with pytest.raises(ValueError):
                call(k)
    assert torch.equal(token_losses(k.model, k.ids), plain)
