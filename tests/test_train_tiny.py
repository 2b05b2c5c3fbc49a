"""The recipe of an embedded model: its documents, its phases, and a kill that leaves no trace."""

import json
import os
import random
import signal
import time
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
import train_tiny
import training_documents as documents
from resumable_fit import fit
from train_tiny import RECIPES, Phase, Recipe, llama
from transformers import LlamaForCausalLM

from steerkit.files import DATA

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class NoTokenizer:
    """What `train` asks of a tokenizer."""

    def save_pretrained(self, out: Path) -> None:
        (out / "tokenizer.json").write_text("{}")


def batches(low: int, high: int):
    def make(step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        return torch.randint(low, high, (2, 8), generator=draw)

    return make


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe "small": 50 steps on tokens below 16, then 30 on the others."""
    phases = {
        "low": Phase(lambda *_: batches(0, 16), 16, steps=50, lr=1e-2, warmup=1, decay=0),
        "high": Phase(lambda *_: batches(16, 32), 16, steps=30, lr=1e-4, warmup=1, decay=0.5),
    }
    made = Recipe(llama(**SHAPE), NoTokenizer, length=8, phases=phases)
    monkeypatch.setitem(RECIPES, "small", made)


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_phases_follow_each_other_in_one_log(small, tmp_path):
    train_tiny.train("small", tmp_path, device="cpu")
    log = logged(tmp_path)
    assert [entry["step"] for entry in log] == [25, 50, 75, 80]
    assert [entry["phase"] for entry in log] == ["low", "low", "high", "high"]
    assert log[-1]["tokens"] == RECIPES["small"].tokens == 80 * 16
    # The second phase began with the first one's weights: a model of the low tokens, surprised.
    assert log[1]["loss"] < log[0]["loss"] < log[2]["loss"]


def test_a_number_of_tokens_scales_every_phase_and_too_few_are_refused(small, tmp_path):
    train_tiny.train("small", tmp_path, tokens=40 * 16, device="cpu")
    assert [entry["step"] for entry in logged(tmp_path)] == [25, 40]
    with pytest.raises(ValueError, match="tokens=16: expected at least one batch in each of"):
        train_tiny.train("small", tmp_path, tokens=16, device="cpu")


def test_a_training_that_was_killed_ends_with_the_same_weights_and_log(tmp_path):
    """SIGKILL in the middle of a step; other weights at the start: all come from the checkpoint."""

    def train(out, seed=0):
        model = train_tiny.build_model(llama(**SHAPE), seed)
        options = {"lr": 1e-2, "warmup": 2, "decay": 0.2, "every": 20, "log_every": 10}
        return model, fit(model, batches(0, 32), steps=1000, out=out, **options)

    whole, expected = train(tmp_path / "whole")
    if not (child := os.fork()):
        try:
            train(tmp_path / "killed")
        finally:
            os._exit(1)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it had finished before"
    resumed, log = train(tmp_path / "killed", seed=1)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in expected]
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    options = {"lr": 1e-2, "warmup": 2, "decay": 0.2, "every": 10, "log_every": 5, "out": tmp_path}
    fit(train_tiny.build_model(llama(**SHAPE), 0), batches(0, 32), steps=10, **options)
    other = train_tiny.build_model(llama(**SHAPE | {"hidden_size": 8}), 0)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        fit(other, batches(0, 32), steps=20, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_models_saw_the_tokens_of_their_recipes(name):
    assert logged(DATA / name)[-1]["tokens"] == RECIPES[name].tokens
    model = LlamaForCausalLM.from_pretrained(DATA / name)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    made = train_tiny.build_model(RECIPES[name].config, 0)
    assert shapes == {key: p.shape for key, p in made.named_parameters()}


def test_the_documents_are_those_that_the_shipped_models_read():
    """All kinds but English, which differs from one version of Python to the next.

    The numbers are of the code that trained them.
    """

    def digest(texts):
        return zlib.crc32("\n".join(islice(texts, 60)).encode())

    rng = random.Random
    assert digest(documents.documents(rng(7), english_share=0)) == 1750062478
    assert digest(documents.late_documents(rng(7), long=True, english_share=0)) == 2185297
    assert digest(documents.readings(rng(7), roll_calls=0.7, quizzes=0.3)) == 3091933801
    assert digest(documents.chatter(rng(7), english_share=0)) == 558665842
