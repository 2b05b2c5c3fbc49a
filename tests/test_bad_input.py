"""One table of wrong requests: each is refused with one line that says what is wrong.

To add a row: (a name, a call of the kit `k`, a pattern of the message, and the exception if it is
not ValueError).
"""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import write_notebook

import steerkit
from steerkit import (
    constraints,
    files,
    models,
    recomputed_losses,
    results,
    spans,
    statistics,
    token_losses,
)
from steerkit.attention import hook as attention
from steerkit.attention import maps, record
from steerkit.lab import exercises as student
from steerkit.lab import runner
from steerkit.spans import find_span
from steerkit.steering import head_search as heads
from steerkit.steering.pasta import emphasise
from steerkit.steering.real_data import load_task
from steerkit.streaming import backcopy
from steerkit.streaming import latency as timing
from steerkit.streaming import stream_eval as streameval
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.sink_cache import SinkCache
from steerkit.tiny import streams, world
from steerkit.tiny.tasks import TASKS
from steerkit.viz import html as view
from steerkit.viz import plots

Kit = SimpleNamespace
CLAIM = {
    "claim": "c", "paper": None, "ours": {}, "holds": True, "n": 1, "interval": None,
    "seeds": [0], "profile": "cpu", "model": "tiny",
}  # fmt: skip
WORDS = {"caption": "What it shows.", "alt": "A line.", "values": {}}


@pytest.fixture
def k(tiny, tmp_path: Path) -> Kit:
    """What the calls need: a model, its tokenizer, ids, axes, an empty folder, a notebook."""
    model, tokenizer = tiny
    figure, axes = plt.subplots()
    plt.close(figure)
    parts = {"model": model, "tokenizer": tokenizer, "axes": axes, "folder": tmp_path}
    notebook = write_notebook(tmp_path, "01_kit", [])
    return Kit(ids=torch.arange(32).view(1, -1), notebook=notebook, figure=figure, **parts)


def text_file(k: Kit, content: bytes) -> Path:
    path = k.folder / "book.txt"
    path.write_bytes(content)
    return path


def csv_file(k: Kit) -> Path:
    return text_file(k, b"a,b\n1,2\n").rename(k.folder / "book.csv")


def steer(k: Kit, spans: object, **options: Any) -> None:
    """One forward with the spans emphasised."""
    with torch.no_grad(), emphasise(k.model, spans, **{"heads": [(0, 0)], **options}):
        k.model(input_ids=k.ids)


def phrase(k: Kit, text: str, **options: int) -> tuple[int, int]:
    return find_span(k.tokenizer, "From Oslo to Oslo it is not far.", text, **options)


def eval_stream(k: Kit, **options: Any) -> streameval.EvalStream:
    return streameval.eval_stream(k.tokenizer, fact=streams.note_fact, **options)


def read(k: Kit, path: object) -> list[int]:
    return streams.file_stream(k.tokenizer, path, 10, least=5)


Row = tuple[str, Callable[[Kit], Any], str] | tuple[str, Callable[[Kit], Any], str, type[Exception]]
# fmt: off
ROWS: list[Row] = [
    # Streams
    ("a list", lambda k: token_losses(k.model, [[1, 2]]), "ids are a list: expected a"),
    ("text", lambda k: token_losses(k.model, "Hi there"), "ids are a str: expected a"),
    ("one axis", lambda k: token_losses(k.model, k.ids[0]), r"\(32,\).*ids\[None\]"),
    ("floats", lambda k: token_losses(k.model, k.ids / 2), "float32: expected integer"),
    ("no ids", lambda k: token_losses(k.model, k.ids[:, :0]), r"\(1, 0\).*two tokens"),
    ("one id", lambda k: token_losses(k.model, k.ids[:, :1]), r"\(1, 1\).*two tokens"),
    ("no rows", lambda k: token_losses(k.model, k.ids[:0]), r"\(0, 32\).*two tokens"),
    ("unknown ids", lambda k: token_losses(k.model, k.ids + 4090), "is 0 .. 4095"),
    ("negative ids", lambda k: token_losses(k.model, k.ids - 1), "-1 to 30.*is 0 .. "),
    ("window 0", lambda k: token_losses(k.model, k.ids, window=0), "window=0: .* 1 or more"),
    ("window -1", lambda k: token_losses(k.model, k.ids, window=-1), "window=-1: exp"),
    ("window 2.5", lambda k: SinkCache(k.model, window=2.5), "2.5: expected a whole"),
    ("sinks None", lambda k: SinkCache(k.model, sinks=None), "None: expected a whole"),
    ("sinks -1", lambda k: SinkCache(k.model, sinks=-1), "sinks=-1: .* 0 or more"),
    ("block 0", lambda k: token_losses(k.model, k.ids, window=4, block=0),
     "block=0: expected at least 1"),
    ("length 0", lambda k: recomputed_losses(k.model, k.ids, length=0),
     "length=0: expected a window of at least 1"),
    ("batch 0", lambda k: recomputed_losses(k.model, k.ids, length=4, batch=0),
     "batch=0: expected at least 1 window"),
    *(
        (f"positions {at}",
         lambda k, at=at: recomputed_losses(k.model, k.ids, length=4, positions=at),
         "positions: expected a non-empty list of 0 .. 30")
        for at in ([], [31], [-1], [[1]])
    ),
    ("no new tokens", lambda k: next(stream_chat(k.model, k.tokenizer, ["Hi."], max_new_tokens=0)),
     "max_new_tokens=0: expected at least 1"),
    ("one text for messages", lambda k: next(stream_chat(k.model, k.tokenizer, "Hi.")),
     "messages='Hi.': expected several texts"),
    ("no lines", lambda k: eval_stream(k, lines=0, every=1, back=(1,)),
     "lines=0, .*: expected numbers from 1 up"),
    ("nothing to look back to",
     lambda k: eval_stream(k, lines=9, every=1, back=()),
     r"back=\(\): expected numbers from 1 up"),
    ("no question",
     lambda k: streameval.eval_hits(
         k.model, eval_stream(k, lines=2, every=1, back=(5,)), window=8),
     "no question in this stream: take more lines"),
    ("a missing file", lambda k: read(k, k.folder / "x.txt"), "x.txt: No such file.*gi"),
    ("a folder", lambda k: read(k, k.folder), "Is a directory; give the path of a tex"),
    ("an empty file", lambda k: read(k, text_file(k, b" \n")), "book.txt: .* is empty"),
    ("not UTF-8", lambda k: read(k, text_file(k, b"ab\xff\xfe")), "not UTF-8.*near byte 2"),
    ("a short file", lambda k: read(k, text_file(k, b"Hi.")), "expected at least 5; tak"),
    ("more English than there is", lambda k: streams.english_stream(k.tokenizer, 10**9),
     "tokens=1000000000: the held-out English has .*; ask for fewer"),
    ("no token of a stream", lambda k: streams.talk_stream(k.tokenizer, 0),
     "tokens=0: expected at least 1"),
    # The tiny world
    ("an attribute that nobody has", lambda k: world.say("Ida", "shoe", "red"),
     "attribute='shoe': expected one of"),
    ("a language of no one", lambda k: world.say("Ida", world.ATTRIBUTES[0], "red", "Elvish"),
     "language='Elvish': expected one of English"),
    # Models
    *(
        (f"a model {name}", lambda k, name=name: steerkit.load(name), message)
        for name, message in (
            ("tiny-sream", "no such embedded model"),
            ("tinny", "not an embedded model"),
            ("./nowhere", "no such directory"),
            ("/nowhere/at/all", "no such directory"),
            ("somebody/unknown-model", "check the spelling, or the network"),
        )
    ),
    ("an empty folder", lambda k: steerkit.load(k.folder), r"no config\.json"),
    *(
        (f"a device {name}", lambda k, name=name: steerkit.load("tiny", device=name),
         f'device="{name}": ')
        for name in ("cuda:99", "gpu", "cpu:x")
    ),
    *(
        (f"a dtype {name}", lambda k, name=name: steerkit.load("tiny", dtype=name),
         f'dtype="{name}": expected "auto"')
        for name in ("float31", "int8", "Tensor")
    ),
    ("a model to size", lambda k: models.config_of("./nowhere"), "no such directory"),
    # Attention
    ("a layer too high",
     lambda k: attention.attach(k.model, {6: lambda call: call.attend()}).__enter__(),
     r"layers \[6\]: expected 0 <= layer < 6"),
    ("weights of a million pairs",
     lambda k: record.attention_weights(k.model, torch.zeros(1, 10**5, dtype=torch.long)),
     "100000 tokens have .* weights, more than"),
    ("key 32", lambda k: record.mean_weight_on_key(k.model, k.ids, k=32), "k=32.* < 32 tokens"),
    ("key -1", lambda k: record.mean_weight_on_key(k.model, k.ids, k=-1), "k=-1.* expected 0 <="),
    ("eps 2", lambda k: record.sink_metric(k.model, k.ids, eps=2),
     "eps=2: expected 0 < eps < 1"),
    ("more tokens than there are", lambda k: record.sink_metric(k.model, k.ids, tokens=33),
     "tokens=33: expected k=0 < tokens <= 32"),
    ("values of one axis", lambda k: record.value_norms(k.model, k.ids[0, :1]),
     r"ids of shape \(1,\): expected \(B, T\)"),
    # Emphasis, spans, heads
    *(
        (f"alpha {alpha}", lambda k, alpha=alpha: steer(k, [[(2, 4)]], alpha=alpha),
         rf"alpha={alpha}: expected 0 < alpha <= 1")
        for alpha in (0, -1, 1.5, float("nan"))
    ),
    *(
        (f"spans {spans}", lambda k, spans=spans: steer(k, spans), message)
        for spans, message in (
            ([], "no spans: expected for each row"),
            ([[]], "expected a list of at least one"),
            ([[(4, 4)]], r"span \[4, 4\) is empty"),
            ([[(4, 2)]], r"span \[4, 2\) is empty, reversed"),
            ([[(-1, 2)]], "negative: expected 0 <= start < end"),
            ([[(2, 99)]], "past the end of a prompt of 32"),
            ([[(2, 4)]] * 2, "a batch of 1 rows, spans for 2"),
        )
    ),
    ("an empty mask", lambda k: steer(k, torch.zeros(1, 32, dtype=torch.bool)),
     r"rows \[0\] of the mask are empty"),
    ("a mask of numbers", lambda k: steer(k, torch.ones(1, 32)),
     "spans of torch.float32 .*: expected a bool mask"),
    ("a layer that is not there", lambda k: steer(k, [[(2, 4)]], heads=[(6, 0)]),
     "L6H0: expected 0 <= layer < 6"),
    ("a head that is not there", lambda k: steer(k, [[(2, 4)]], heads=[(0, 6)]),
     "L0H6: expected 0 <= index < 6 query heads"),
    ("an absent phrase", lambda k: phrase(k, "Rome"), "'Rome' is not in the prompt"),
    ("an empty phrase", lambda k: phrase(k, " "), "phrase ' ' is empty"),
    ("a phrase twice", lambda k: phrase(k, "Oslo"), "2 times: choose one by occurrence=0"),
    ("a third time", lambda k: phrase(k, "Oslo", occurrence=2),
     "occurrence=2: 'Oslo' stands in the prompt 2 times"),
    ("no examples", lambda k: heads.score_heads(k.model, []),
     "no prompts: the heads are scored on at least one"),
    ("a head table that is cut", lambda k: heads.load_table(text_file(k, b'{"kind": ')),
     "book.txt: not a whole head table .*delete it"),
    ("no random heads", lambda k: heads.random_heads((6, 6), 0, seed=0), "k=0: expected 1 <= k"),
    # Tasks and instructions
    ("an unknown split", lambda k: TASKS["json"].examples(1, seed=0, split="train"),
     'split="train": expected "profile" or "test"'),
    ("a task's missing file", lambda k: load_task(TASKS["json"], k.folder / "x.csv"),
     "x.csv: no such file"),
    ("a task's wrong columns", lambda k: load_task(TASKS["json"], csv_file(k)),
     "no column .* for task json, there are .'a', 'b'.*rename_columns"),
    ("two languages",
     lambda k: constraints.check_together(
         [constraints.Constraint("language", x) for x in ("French", "German")]),
     "contradict each other: no reply obeys both"),
    # Maps and pages
    ("no bins", lambda k: maps.attention_map(k.model, k.ids, bins=0), "bins=0: expected"),
    ("33 bins", lambda k: maps.attention_map(k.model, k.ids, bins=33), "1 <= bins <= 32"),
    ("skipped keys", lambda k: maps.attention_map(k.model, k.ids, bins=4, skip=32),
     "skip=32: expected 0 <= skip < 32"),
    ("a reduction", lambda k: maps.attention_map(k.model, k.ids, bins=4, reduce="median"),
     'reduce=\'median\': expected "max" or "mean"'),
    ("no messages", lambda k: spans.find_turns(k.tokenizer, []), "no messages: give at least"),
    ("no tokens", lambda k: view.attention_page([], [], title="t"),
     "no tokens to show: give at least one"),
    ("values of other tokens", lambda k: view.attention_page(["a", "b"], [1.0], title="t"),
     "1 values for 2 tokens: expected one each"),
    ("a negative value", lambda k: view.attention_page(["a"], [-1.0], title="t"),
     "expected finite numbers, 0 or more"),
    # Figures and results
    ("no caption", lambda k: plots.show(k.figure, "a", out=k.folder, **WORDS | {"caption": " "}),
     "figure 'a' has an empty caption"),
    ("no alt text", lambda k: plots.show(k.figure, "a", out=k.folder, **WORDS | {"alt": ""}),
     "figure 'a' has an empty alt"),
    ("a figure elsewhere", lambda k: plots.show(k.figure, "../a", out=k.folder / "b", **WORDS),
     r"name='\.\./a': expected a plain file name"),
    ("one row", lambda k: plots.heat_map(k.axes, [1.0]), r"\(1,\): expected \(Q, K\)"),
    ("one layer", lambda k: plots.head_grid(k.axes, [1.0], bar="weight"),
     r"\(1,\): expected \(L, H\)"),
    ("curves of other lengths",
     lambda k: plots.curves(k.axes, [1, 2], {"a": [1]}, xlabel="x", ylabel="y"),
     r"curve 'a' has shape \(1,\), x has \(2,\)"),
    *(
        (f"a claim named {name!r}",
         lambda k, name=name: results.save_claim(k.folder, name, **CLAIM),
         "expected a plain file name without folders")
        for name in ("", "..", "../a", "/tmp/a", "a/b")
    ),
    *(
        (f"figures of {names}", lambda k, names=names: results.figures_dir(*names),
         "expected a plain file name without folders")
        for names in (("../..", "04"), ("cpu", "../../04"), ("/", "04"), ("cpu", ""))
    ),
    ("an unknown paper result", lambda k: results.paper_result("streaming.tabel1"),
     "tabel1.*is not in data/paper_results.json; near: .*streaming.table1", KeyError),
    ("a value without an axis", lambda k: statistics.bootstrap(torch.tensor(1.0)),
     r"shape \(\): expected at least 2"),
    ("one value", lambda k: statistics.bootstrap(torch.ones(1)), r"\(1,\): exp.* at least 2"),
    ("a data file", lambda k: files.data_file("x.json"), "runs from a clone", FileNotFoundError),
    # Recipes and trainings
    ("an arm", lambda k: backcopy.Recipe(arm="x"), "arm='x': expected one of vanilla"),
    ("no triggers", lambda k: backcopy.Recipe(triggers=0), "triggers=0: expected 0 < tri"),
    ("a run", lambda k: backcopy.load_run("vanila"), "'vanila': expected one of vanilla"),
    ("a step", lambda k: backcopy.load_run("learnable sink", step=7),
     "has no step 7; train it with", FileNotFoundError),
    ("no sequence", lambda k: backcopy.crops(backcopy.Recipe(), 0, 8, seed=0),
     "B=0, T=8: expected at least one sequence"),
    ("no round", lambda k: timing.interleaved({"a": random.random}, repeats=0),
     "repeats=0: expected at least one round"),
    ("a cache of sinks only", lambda k: timing.decode_pace(k.model, cache=4),
     "cache=4: expected more than the 4 sinks"),
    # Notebooks
    ("no notebooks", lambda k: runner.find(k.folder / "figures"),
     "no notebooks in .*figures: run steerkit from its clone", FileNotFoundError),
    ("an unknown notebook", lambda k: runner.find(k.notebook.parent, ["07"]),
     "no notebook starts with '07'; there are 01_kit"),
    ("an unknown parameter",
     lambda k: runner.overrides(k.notebook, profile="cpu", extra={"TEXT": "x"}),
     "01_kit has no parameter TEXT; it has PROFILE, N"),
    ("a parameter of another type",
     lambda k: runner.overrides(k.notebook, profile="cpu", extra={"N": "many"}),
     "-p N many: expected int, like 2"),
    ("a notebook without exercises",
     lambda k: student.grade(k.notebook, profile="smoke", timeout=9),
     "no cell is tagged exercise: make a copy with"),
]
# fmt: on
NAMES = [row[0] for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_it_is_refused_in_one_line(k: Kit, row: Row) -> None:
    _, call, message, error = (*row, ValueError)[:4]
    before = sorted(p for p in k.folder.rglob("*") if p.stem != "book")
    with pytest.raises(error, match=message) as caught:
        call(k)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert sorted(p for p in k.folder.rglob("*") if p.stem != "book") == before


def test_the_table_is_long_and_each_row_has_its_name() -> None:
    assert len(ROWS) >= 40 and len(set(NAMES)) == len(NAMES)


def test_a_refusal_leaves_the_model_as_it_was(k: Kit) -> None:
    plain = token_losses(k.model, k.ids)
    for name, call, *_ in ROWS:
        if name.startswith(("window", "block", "positions", "a layer", "key", "eps")):
            with pytest.raises(ValueError):
                call(k)
    assert torch.equal(token_losses(k.model, k.ids), plain)
