"""The recipe of an embedded model: phases one after another, resumable, one log."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from steerkit.files import DATA
from steerkit.tiny import recipe
from steerkit.tiny.recipe import Phase, Recipe, llama

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


def batches(low: int, high: int) -> recipe.Batches:
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
    monkeypatch.setitem(recipe.RECIPES, "small", made)


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_phases_follow_each_other_in_one_log(small, tmp_path):
    recipe.train("small", tmp_path, device="cpu")
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [25, 50, 75, 80]
    assert [row["phase"] for row in rows] == ["low", "low", "high", "high"]
    assert rows[-1]["tokens"] == recipe.RECIPES["small"].tokens == 80 * 16
    # The second phase began with the first one's weights: a model of the low tokens, surprised.
    assert rows[1]["loss"] < rows[0]["loss"] < rows[2]["loss"]


def test_a_training_that_stopped_between_phases_ends_with_the_same_weights(
    small, tmp_path, monkeypatch
):
    recipe.train("small", tmp_path / "whole", device="cpu")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_continued", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.train("small", tmp_path / "torn", device="cpu")
    assert not (tmp_path / "torn" / "high").exists()
    recipe.train("small", tmp_path / "torn", device="cpu")
    whole, torn = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "torn")
    )
    assert all(torch.equal(whole[key], torn[key]) for key in whole)


def test_a_number_of_tokens_scales_every_phase(small, tmp_path):
    recipe.train("small", tmp_path, tokens=40 * 16, device="cpu")
    assert [row["step"] for row in logged(tmp_path)] == [25, 40]


def test_too_few_tokens_for_a_phase_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="tokens=16: expected at least one batch in each of"):
        recipe.train("small", tmp_path, tokens=16, device="cpu")


def test_the_shipped_models_saw_the_tokens_of_their_recipes():
    for name, made in recipe.RECIPES.items():
        if (DATA / name).exists():
            assert logged(DATA / name)[-1]["tokens"] == made.tokens
