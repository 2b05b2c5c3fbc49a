"""Bigram-Backcopy: the task's rules, the readings, and what the shipped runs promise."""

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from steerkit import attention_weights, recomputed_losses, token_losses
from steerkit.streaming import backcopy
from steerkit.streaming.backcopy import CACHE, RUNS, Recipe

RECIPE = Recipe()
SMALL = Recipe(tokens=16, triggers=2, width=8, inner=8, steps=4)
SEEDS = (0, 1, 2)
MAKE = Path(__file__).parent.parent / "data" / "make" / "backcopy_runs.py"


# The task


def test_after_a_trigger_comes_the_token_before_it_and_else_one_the_chain_allows() -> None:
    ids = backcopy.crops(RECIPE, 256, 60, seed=5)
    for before, now, following in zip(ids.T, ids.T[1:], ids.T[2:], strict=False):
        trigger = now < RECIPE.triggers
        assert torch.equal(following[trigger], before[trigger])
        assert (backcopy.chain(RECIPE)[now, following][~trigger] > 0).all()
    trigger = backcopy.is_trigger(RECIPE, ids)
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    # An idle token is followed by a trigger with probability f, a trigger never: f / (1 + f).
    assert abs(trigger.float().mean() - RECIPE.often / (1 + RECIPE.often)) < 0.01


def test_best_losses_are_those_of_the_true_probabilities() -> None:
    ids = backcopy.held_out(RECIPE, 8, 300)[:, 2:]
    losses = backcopy.best_losses(RECIPE, ids)
    for b, t in [(0, 5), (3, 17), (7, 250)]:
        p = backcopy.chain(RECIPE)[ids[b, t], ids[b, t + 1]]
        known = ids[b, t] < RECIPE.triggers
        assert losses[b, t].item() == pytest.approx(0 if known else -p.log().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arm", "everywhere"), [("common first token", True), ("learnable sink", False)]
)
def test_arms_put_the_same_idle_token_before_the_crop(arm: str, everywhere: bool) -> None:
    crop = backcopy.sequences(replace(RECIPE, arm="vanilla"), 5, 19, seed=1)
    ids = backcopy.sequences(replace(RECIPE, arm=arm), 5, 20, seed=1)
    assert torch.equal(ids[:, 1:], crop)
    assert (ids[:, 0] == ids[0, 0]).all() and ids[0, 0] >= RECIPE.triggers
    assert (ids[0, 0] in backcopy.crops(RECIPE, 50, 500, seed=2)) == everywhere


def test_batches_depend_on_step_and_seed_alone_and_no_stream_is_held_in() -> None:
    one, again, other = (partial(backcopy.batch, replace(RECIPE, seed=s)) for s in (0, 0, 1))
    assert torch.equal(one(7), again(7)) and one(7).shape == (64, CACHE + 2)
    assert not torch.equal(one(7), one(8)) and not torch.equal(one(7), other(7))
    held = backcopy.held_out(RECIPE, 64, CACHE + 2)
    assert not any(torch.equal(held, one(step)) for step in range(5))


# The model and its readings


def test_attention_stats_are_read_off_the_attention_weights() -> None:
    model, recipe = backcopy.load_run("learnable sink", 1)
    ids = backcopy.held_out(recipe, 1, 40)
    w = attention_weights(model, ids)[0, 0]  # (T, T)
    expected = torch.stack([w[:, 0], torch.special.entr(w).sum(-1).exp()])
    torch.testing.assert_close(backcopy.attention_stats(model, ids)[:, 0], expected)


@pytest.mark.parametrize("name", ["learnable sink", "vanilla", "capacity to spare"])
def test_in_one_layer_window_is_recomputation_and_streaming_is_recomputation_behind_the_sink(
    name: str,
) -> None:
    model, recipe = backcopy.load_run(name)
    ids = backcopy.held_out(recipe, 1, 200)
    at = torch.arange(CACHE, 199)
    window = token_losses(model, ids, sinks=0, window=CACHE)[0, at]
    fresh = recomputed_losses(model, ids, length=CACHE + 1, positions=at)[0]
    assert torch.allclose(window, fresh, atol=1e-3)
    streaming = token_losses(model, ids, sinks=1, window=CACHE - 1)[0, at]
    windows = ids[0, 1:].unfold(0, CACHE + 1, 1)[at - CACHE]
    behind = torch.cat([ids[:, :1].expand(len(windows), 1), windows], 1)
    assert torch.allclose(streaming, token_losses(model, behind)[:, -1], atol=1e-3)
    assert name == "vanilla" or not torch.equal(streaming, window)


def test_measure_splits_its_losses_by_the_token_that_predicts() -> None:
    model, recipe = backcopy.load_run("40 triggers")
    ids = backcopy.held_out(recipe, 4, 320)
    numbers = backcopy.measure(model, recipe, ids)
    losses = token_losses(model, ids, sinks=1, window=CACHE - 1)[:, 128:]
    share = (ids[:, 128:-1] < 40).float().mean().item()
    best = backcopy.best_losses(recipe, ids)[:, 128:].mean().item()
    parts = share * numbers["after triggers"] + (1 - share) * numbers["idle, above best"]
    assert parts == pytest.approx(losses.mean().item() - best, abs=1e-4)
    assert backcopy.cache_losses(model, ids, (1,)).mean().item() == numbers["streaming"]
    assert numbers["after triggers"] < 1.5 and numbers["streaming"] == losses.mean().item()


# The stored runs


@pytest.mark.parametrize("name", RUNS)
def test_every_seed_leans_on_its_first_token_or_none_does(name: str) -> None:
    for seed in SEEDS:
        model, recipe = backcopy.load_run(name, seed)
        with backcopy.architecture(recipe, model):
            ids = backcopy.held_out(recipe, 4, 320)
            window, streaming = backcopy.cache_losses(model, ids, (0, 1)).mean(-1).tolist()
        if name in ("learnable sink", "common first token", "slow"):
            assert window - streaming >= 0.3
        elif name in ("vanilla", "zero sink", "capacity to spare", "40 triggers"):
            assert abs(window - streaming) < 0.05


def test_the_zero_sink_is_part_of_its_model() -> None:
    model, recipe = backcopy.load_run("zero sink")
    ids = backcopy.held_out(recipe, 4, 65)
    without = token_losses(model, ids).mean()
    with backcopy.architecture(recipe, model):
        assert token_losses(model, ids).mean() < without - 0.3


# Training


def test_the_recipe_of_the_stored_runs_trains_each_once_and_keeps_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backcopy, "RUNS", {"learnable sink": SMALL})
    monkeypatch.setattr(backcopy, "SNAPSHOTS", (2,))
    monkeypatch.setattr(backcopy, "DATA", tmp_path)
    store_run = runpy.run_path(str(MAKE))["store_run"]
    store_run("learnable sink", 0, tmp_path / "backcopy")
    folder = tmp_path / "backcopy" / "learnable_sink-seed0"
    names = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert set(names) == {"log.jsonl", "step-2.safetensors", "step-4.safetensors"}
    store_run("learnable sink", 0, tmp_path / "backcopy")
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == names
    model, recipe = backcopy.load_run("learnable sink")
    trained = backcopy.new_model(SMALL)
    backcopy.train(trained, SMALL, SMALL.steps, lambda *_: None)
    ids = backcopy.held_out(recipe, 2, 20)
    losses = [token_losses(m, ids) for m in (model, trained)]
    torch.testing.assert_close(*losses, atol=0.01, rtol=0)  # stored in half precision


def test_measurements_are_live_first_and_stored_later() -> None:
    ids = backcopy.held_out(RECIPE, 2, 160)
    new, live, last = backcopy.train_and_measure(RECIPE, ids, live=2, steps=(0, 2, 600))
    stored, recipe = backcopy.load_run("learnable sink")
    assert last == {"seed": 0, "step": 600, **backcopy.measure(stored, recipe, ids)}
    assert (live["seed"], live["step"]) == (0, 2) and live["dense"] != new["dense"]


def test_a_live_training_is_the_stored_one() -> None:
    """The notebook trains what data/backcopy holds: equal after fifty steps, but for rounding."""
    ids = backcopy.held_out(RECIPE, 4, 200)
    live, stored = (
        backcopy.train_and_measure(RECIPE, ids, live=steps, steps=(50,))[0] for steps in (50, 1)
    )
    assert live["streaming"] == pytest.approx(stored["streaming"], abs=0.05)
