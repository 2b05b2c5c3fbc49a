"""One table of wrong requests: each is refused with one line that says what is wrong.

To add a row: (a name, a call of the kit `k`, the exception, a pattern of its message).
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
    attention,
    backcopy,
    gates,
    plots,
    recomputed_losses,
    results,
    runner,
    streameval,
    student,
    timing,
    token_losses,
    training,
)
from steerkit.sink_cache import SinkCache
from steerkit.streaming import stream_chat

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


def read(k: Kit, path: object) -> list[int]:
    return gates.file_stream(k.tokenizer, path, 10, least=5)


Row = tuple[str, Callable[[Kit], Any], type[Exception], str]
ROWS: list[Row] = [
    # Streams
    ("a list", lambda k: token_losses(k.model, [[1, 2]]), ValueError, "ids are a list: expected a"),
    ("text", lambda k: token_losses(k.model, "Hi there"), ValueError, "ids are a str: expected a"),
    ("one axis", lambda k: token_losses(k.model, k.ids[0]), ValueError, r"\(32,\).*ids\[None\]"),
    ("floats", lambda k: token_losses(k.model, k.ids / 2), ValueError, "float32: expected integer"),
    ("no ids", lambda k: token_losses(k.model, k.ids[:, :0]), ValueError, r"\(1, 0\).*two tokens"),
    ("one id", lambda k: token_losses(k.model, k.ids[:, :1]), ValueError, r"\(1, 1\).*two tokens"),
    ("no rows", lambda k: token_losses(k.model, k.ids[:0]), ValueError, r"\(0, 32\).*two tokens"),
    ("unknown ids", lambda k: token_losses(k.model, k.ids + 4090), ValueError, "is 0 .. 4095"),
    ("negative ids", lambda k: token_losses(k.model, k.ids - 1), ValueError, "-1 to 30.*is 0 .. "),
    (
        "window 0",
        lambda k: token_losses(k.model, k.ids, window=0),
        ValueError,
        "window=0: .* 1 rec",
    ),
    ("window -1", lambda k: token_losses(k.model, k.ids, window=-1), ValueError, "window=-1: exp"),
    ("window 2.5", lambda k: SinkCache(k.model, window=2.5), ValueError, "2.5: expected a whole"),
    ("sinks None", lambda k: SinkCache(k.model, sinks=None), ValueError, "None: expected a whole"),
    ("sinks -1", lambda k: SinkCache(k.model, sinks=-1), ValueError, r"sinks=-1: expected 0 \(win"),
    (
        "block 0",
        lambda k: token_losses(k.model, k.ids, window=4, block=0),
        ValueError,
        "block=0: expected at least 1",
    ),
    (
        "length 0",
        lambda k: recomputed_losses(k.model, k.ids, length=0),
        ValueError,
        "length=0: expected a window of at least 1",
    ),
    (
        "batch 0",
        lambda k: recomputed_losses(k.model, k.ids, length=4, batch=0),
        ValueError,
        "batch=0: expected at least 1 window",
    ),
    *(
        (
            f"positions {where}",
            lambda k, where=where: recomputed_losses(k.model, k.ids, length=4, positions=where),
            ValueError,
            "positions: expected a non-empty list of 0 .. 30",
        )
        for where in ([], [31], [-1], [[1]])
    ),
    (
        "no new tokens",
        lambda k: next(stream_chat(k.model, k.tokenizer, ["Hi."], max_new_tokens=0)),
        ValueError,
        "max_new_tokens=0: expected at least 1",
    ),
    (
        "one text for messages",
        lambda k: next(stream_chat(k.model, k.tokenizer, "Hi.")),
        ValueError,
        "messages='Hi.': expected several texts",
    ),
    (
        "no lines",
        lambda k: streameval.eval_stream(k.tokenizer, lines=0, every=1, back=(1,)),
        ValueError,
        "lines=0, .*: expected numbers from 1 up",
    ),
    (
        "nothing to look back to",
        lambda k: streameval.eval_stream(k.tokenizer, lines=9, every=1, back=()),
        ValueError,
        r"back=\(\): expected numbers from 1 up",
    ),
    (
        "no question",
        lambda k: streameval.eval_hits(
            k.model,
            streameval.eval_stream(k.tokenizer, lines=2, every=1, back=(5,)),
            sinks=4,
            window=8,
        ),
        ValueError,
        "no question in this stream: take more lines",
    ),
    (
        "a missing file",
        lambda k: read(k, k.folder / "x.txt"),
        ValueError,
        "x.txt: No such file.*gi",
    ),
    ("a folder", lambda k: read(k, k.folder), ValueError, "Is a directory; give the path of a tex"),
    ("an empty file", lambda k: read(k, text_file(k, b" \n")), ValueError, "book.txt: .* is empty"),
    (
        "not UTF-8",
        lambda k: read(k, text_file(k, b"ab\xff\xfe")),
        ValueError,
        "not UTF-8.*near byte 2",
    ),
    (
        "a short file",
        lambda k: read(k, text_file(k, b"Hi.")),
        ValueError,
        "expected at least 5; tak",
    ),
    (
        "more English than there is",
        lambda k: gates.english_stream(k.tokenizer, 10**9),
        ValueError,
        "tokens=1000000000: the held-out English has .*; ask for fewer",
    ),
    # Models
    ("a typo", lambda k: steerkit.load("tiny-sream"), ValueError, "no such embedded model"),
    ("a path to nowhere", lambda k: steerkit.load("./nowhere"), ValueError, "no such directory"),
    ("an empty folder", lambda k: steerkit.load(k.folder), ValueError, r"no config\.json"),
    (
        "cuda:99",
        lambda k: steerkit.load("tiny", device="cuda:99"),
        ValueError,
        'device="cuda:99": ',
    ),
    ("a device", lambda k: steerkit.load("tiny", device="gpu"), ValueError, 'device="gpu"'),
    (
        "a dtype",
        lambda k: steerkit.load("tiny", dtype="int4"),
        ValueError,
        '"int4": expected "auto"',
    ),
    # Attention
    (
        "a layer too high",
        lambda k: attention.attach(k.model, {6: lambda call: call.attend()}).__enter__(),
        ValueError,
        r"layers \[6\]: expected 0 <= layer < 6",
    ),
    (
        "weights of a million pairs",
        lambda k: attention.attention_weights(k.model, torch.zeros(1, 10**5, dtype=torch.long)),
        ValueError,
        r"ask for .* weights: expected \(1, T\) and at most",
    ),
    (
        "key 32",
        lambda k: attention.key_mass(k.model, k.ids, k=32),
        ValueError,
        "k=32.* < 32 tokens",
    ),
    (
        "key -1",
        lambda k: attention.key_mass(k.model, k.ids, k=-1),
        ValueError,
        "k=-1.* expected 0 <=",
    ),
    (
        "eps 2",
        lambda k: attention.sink_metric(k.model, k.ids, eps=2),
        ValueError,
        "eps=2: expected 0 < eps < 1",
    ),
    (
        "more tokens than there are",
        lambda k: attention.sink_metric(k.model, k.ids, tokens=33),
        ValueError,
        "tokens=33: expected k=0 < tokens <= 32",
    ),
    (
        "values of one axis",
        lambda k: attention.value_norms(k.model, k.ids[0, :1]),
        ValueError,
        r"ids of shape \(1,\): expected \(B, T\)",
    ),
    # Figures and results
    (
        "no caption",
        lambda k: plots.show(k.figure, "a", out=k.folder, **WORDS | {"caption": " "}),
        ValueError,
        "figure 'a' has an empty caption",
    ),
    (
        "no alt text",
        lambda k: plots.show(k.figure, "a", out=k.folder, **WORDS | {"alt": ""}),
        ValueError,
        "figure 'a' has an empty alt",
    ),
    (
        "a figure elsewhere",
        lambda k: plots.show(k.figure, "../a", out=k.folder / "b", **WORDS),
        ValueError,
        r"name='\.\./a': expected a plain file name",
    ),
    ("one row", lambda k: plots.heat_map(k.axes, [1.0]), ValueError, r"\(1,\): expected \(Q, K\)"),
    (
        "one layer",
        lambda k: plots.head_grid(k.axes, [1.0], bar="weight"),
        ValueError,
        r"\(1,\): expected \(L, H\)",
    ),
    (
        "curves of other lengths",
        lambda k: plots.curves(k.axes, [1, 2], {"a": [1]}, xlabel="x", ylabel="y"),
        ValueError,
        r"curve 'a' has shape \(1,\), x has \(2,\)",
    ),
    *(
        (
            f"a claim named {name!r}",
            lambda k, name=name: results.save_claim(k.folder, name, **CLAIM),
            ValueError,
            "expected a plain file name without folders",
        )
        for name in ("", "..", "../a", "/tmp/a", "a/b")
    ),
    *(
        (
            f"figures of {names}",
            lambda k, names=names: results.figures_dir(*names),
            ValueError,
            "expected a plain file name without folders",
        )
        for names in (("../..", "04"), ("cpu", "../../04"), ("/", "04"), ("cpu", ""))
    ),
    (
        "an unknown paper result",
        lambda k: results.paper_result("streaming.tabel1"),
        KeyError,
        "tabel1.*is not in data/paper_results.json; near: .*streaming.table1",
    ),
    (
        "one value",
        lambda k: results.bootstrap(torch.ones(1)),
        ValueError,
        r"\(1,\): exp.* at least 2",
    ),
    ("a data file", lambda k: results.data_file("x.json"), FileNotFoundError, "runs from a clone"),
    # Recipes and trainings
    ("an arm", lambda k: backcopy.Recipe(arm="x"), ValueError, "arm='x': expected one of vanilla"),
    (
        "no triggers",
        lambda k: backcopy.Recipe(triggers=0),
        ValueError,
        "triggers=0: expected 0 < tri",
    ),
    (
        "a run",
        lambda k: backcopy.load_run("vanila"),
        ValueError,
        "'vanila': expected one of vanilla",
    ),
    (
        "a training",
        lambda k: backcopy.train("vanila", 0, k.folder),
        ValueError,
        "'vanila': expected one of vanilla",
    ),
    (
        "a step",
        lambda k: backcopy.load_run("learnable sink", step=7),
        FileNotFoundError,
        "has no step 7; train it with",
    ),
    (
        "no sequence",
        lambda k: backcopy.sample(backcopy.Recipe(), 0, 8, seed=0),
        ValueError,
        "B=0, T=8: expected at least one sequence",
    ),
    (
        "no step at all",
        lambda k: training.fit(k.model, None, steps=0),
        ValueError,
        "steps=0.* expected steps >= 1",
    ),
    (
        "no round",
        lambda k: timing.interleaved({"a": random.random}, repeats=0),
        ValueError,
        "repeats=0: expected at least one round",
    ),
    (
        "a cache of sinks only",
        lambda k: timing.decode_pace(k.model, cache=4),
        ValueError,
        "cache=4: expected more than the 4 sinks",
    ),
    # Notebooks
    (
        "no notebooks",
        lambda k: runner.find(k.folder / "figures"),
        FileNotFoundError,
        "no notebooks in .*figures: run steerkit from its clone",
    ),
    (
        "an unknown notebook",
        lambda k: runner.find(k.notebook.parent, ["07"]),
        ValueError,
        "no notebook starts with '07'; there are 01_kit",
    ),
    (
        "an unknown parameter",
        lambda k: runner.overrides(k.notebook, profile="cpu", extra={"TEXT": "x"}),
        ValueError,
        "01_kit has no parameter TEXT; it has PROFILE, N",
    ),
    (
        "a parameter of another type",
        lambda k: runner.overrides(k.notebook, profile="cpu", extra={"N": "many"}),
        ValueError,
        "-p N many: expected int, like 2",
    ),
    (
        "a notebook without exercises",
        lambda k: student.grade(k.notebook, profile="smoke", timeout=9),
        ValueError,
        "no cell is tagged exercise: make a copy with",
    ),
]
NAMES = [row[0] for row in ROWS]


@pytest.mark.parametrize(("name", "call", "error", "message"), ROWS, ids=NAMES)
def test_it_is_refused_in_one_line(
    k: Kit, name: str, call: Callable[[Kit], Any], error: type[Exception], message: str
) -> None:
    before = sorted(p for p in k.folder.rglob("*") if p.name != "book.txt")
    with pytest.raises(error, match=message) as caught:
        call(k)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert sorted(p for p in k.folder.rglob("*") if p.name != "book.txt") == before


def test_the_table_is_long_and_each_row_has_its_name() -> None:
    assert len(ROWS) >= 40 and len(set(NAMES)) == len(NAMES)


def test_a_refusal_leaves_the_model_as_it_was(k: Kit) -> None:
    plain = token_losses(k.model, k.ids)
    for name, call, error, _ in ROWS:
        if name.startswith(("window", "block", "positions", "a layer", "key", "eps")):
            with pytest.raises(error):
                call(k)
    assert torch.equal(token_losses(k.model, k.ids), plain)
