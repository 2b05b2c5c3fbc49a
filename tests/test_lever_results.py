"""The recipe behind notebook 06: what it stores is what the package computes."""

from functools import partial

import lever_results as bench
import pandas as pd
import pytest

from steerkit.files import DATA
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.steering.levers import plain, steered
from steerkit.steering.other_methods import additive_bias
from steerkit.tiny.gatt import evaluation_plans, neutral, obeying


@pytest.mark.parametrize("pin", [False, True])
def test_an_endless_dialogue_that_fits_the_cache_replies_as_without_one(tiny, pin):
    (plan,) = evaluation_plans(7, 1, held_out=False, families=["language"], turns=4)
    for forced in (neutral, obeying):
        streamed = bench.replies_among(*tiny, plan, pin=pin, every=2, forced=forced)
        (whole,) = adherence_by_turn(*tiny, [plan], forced=forced).replies
        assert streamed == {2: whole[1], 4: whole[3]}
    own = bench.own_replies(*tiny, plan, pin=pin, every=1)
    (whole,) = adherence_by_turn(*tiny, [plan]).replies
    assert list(own.values()) == whole


def test_the_divergence_of_a_lever_is_zero_without_strength_and_grows_with_it(tiny):
    plans = evaluation_plans(7, 1, held_out=False, families=["language", "hobby"])
    dialogues = [bench.dialogue_at(plan, 3, "neutral") for plan in plans]
    wanted, answers = [plan.instruction for plan in plans], plain(*tiny, dialogues)
    at = {
        nats: bench.divergence(*tiny, partial(additive_bias, bias=nats), dialogues, wanted, answers)
        for nats in (0, 3, 8)
    }
    assert at[0] == 0 < at[3] < at[8]


def test_no_lever_breaks_nothing_and_a_violent_one_does(tiny):
    method = partial(additive_bias, bias=12.0)
    calm = bench.side_effects(*tiny, plain, None, n=8, seed=7)
    violent = bench.side_effects(*tiny, steered(method), method, n=8, seed=7)
    assert calm["changed"] == calm["leak"] == 0 and calm["other"] > 0.8
    assert violent["changed"] > 0.5 and violent["other"] < 0.2


def test_the_chosen_strength_obeys_most_within_the_budget():
    """Of strengths 1 (mild), 2 (mild, obeys more), 3 (facts lost), 4 (others lost): 2."""
    rows = [("nothing", 0, 0, 10, 0.8), ("x", 1, 3, 10, 0.8), ("x", 2, 5, 9, 0.4)]
    rows += [("x", 3, 9, 8, 0.8), ("x", 4, 9, 10, 0.3), ("y", 1, 1, 0, 0.8), ("y", 2, 9, 0, 0.0)]
    swept = pd.DataFrame(rows, columns=["lever", "strength", "obeyed", "right", "other"])
    assert bench.choose(swept.assign(n=10)) == {"x": 2, "y": 1}


def test_no_divergence_is_stored_of_a_span_that_was_moved():
    """It would be that of the span where it stood."""
    stored = pd.read_csv(DATA / "levers.csv").query("part == 'sweep'")
    moved = stored["lever"].isin(bench.WHERE)
    assert moved.any() and stored.loc[moved, "kl"].isna().all()
    assert stored.loc[stored["lever"].eq("SpotLight"), "kl"].notna().all()
