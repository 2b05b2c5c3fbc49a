"""The measurements behind notebook 06: every lever, strength, history and model, and side effects.

`python data/make/lever_results.py run --out DIR` makes them, one CSV file per model and seed, and
passes over those that are there. `collect` joins them into data/levers.csv. Heads and strengths are
chosen on seed 0, whose dialogues are not reported.
"""

import argparse
import random
from pathlib import Path

import pandas as pd
import torch

from steerkit.attention.hook import Head, layer_and_head_counts
from steerkit.files import DATA, write_text
from steerkit.models import Model, Tokenizer, load
from steerkit.steering.head_search import every_head, score_heads
from steerkit.tiny.bench import FIXED, levers, measure, search_prompts, side_effects
from steerkit.tiny.gatt import HISTORIES, evaluation_plans

PROFILE, SEEDS = 0, (3, 4, 5)
MODELS = ("tiny", "tiny-gatt", "tiny-gatt-mixed")
TURNS = (3, 8, 20)
HEADS = 4  # searched, and as many random ones
COLUMNS = ["model", "part", "lever", "strength", "seed", "split", "history", "family", "turn"]


def searched_heads(model: Model, tokenizer: Tokenizer) -> tuple[list[Head], list[Head]]:
    """The heads that raise the obeying reply most where it is forgotten, and random ones."""
    prompts = search_prompts(tokenizer, evaluation_plans(PROFILE, 4, held_out=False), turn=3)
    top = score_heads(model, prompts).top(HEADS)
    others = [head for head in every_head(*layer_and_head_counts(model)) if head not in top]
    return top, random.Random(PROFILE).sample(others, HEADS)


def sweep(model: Model, tokenizer: Tokenizer, seed: int) -> pd.DataFrame:
    """Every lever at every strength among neutral replies, and what it breaks."""
    plans, tables = evaluation_plans(seed, 3, held_out=False), []
    arms = [(name, 0.0, lever) for name, lever in FIXED.items()]
    for name, (strengths, make) in levers(*searched_heads(model, tokenizer)).items():
        arms += [(name, strength, make(strength)) for strength in strengths]
    for name, strength, lever in arms:
        table = measure(model, tokenizer, lever, plans, kind="neutral", turns=TURNS)
        broken = {}
        if not name.startswith("repeat"):  # without an instruction there is nothing to repeat
            broken = side_effects(model, tokenizer, lever, n=48, seed=seed)
        tables.append(counted(table).assign(lever=name, strength=strength, split="seen", **broken))
        print(name, strength, flush=True)
    return pd.concat(tables).assign(part="sweep")


def table_of_histories(
    model: Model, tokenizer: Tokenizer, seed: int, chosen: dict[str, float]
) -> pd.DataFrame:
    """Every lever at its chosen strength on every kind of history, seen and held-out values."""
    arms = {(name, 0.0): lever for name, lever in FIXED.items()}
    for name, (_, make) in levers(*searched_heads(model, tokenizer)).items():
        arms[name, chosen[name]] = make(chosen[name])
    tables = []
    for (name, strength), lever in arms.items():
        for split in ("seen", "held-out"):
            plans = evaluation_plans(seed, 2, held_out=split == "held-out")
            for kind in HISTORIES:
                table = measure(model, tokenizer, lever, plans, kind=kind, turns=TURNS)
                tables.append(counted(table).assign(lever=name, strength=strength, split=split))
        print(name, flush=True)
    return pd.concat(tables).assign(part="histories")


def counted(replies: pd.DataFrame) -> pd.DataFrame:
    """By history, family and turn: how many replies, how many obeyed, how many were right."""
    scores = replies.groupby(["history", "family", "turn"])[["obeyed", "right"]]
    return scores.sum().assign(n=scores.size()).reset_index()


def choose(swept: pd.DataFrame) -> dict[str, float]:
    """Of each lever the strength that obeys most where little breaks.

    Little: at least 95 % of the facts are right, and 80 % of the other instructions are kept that
    are kept without a lever. Where no strength is that mild, the weakest one is taken.
    """
    chosen, kept = {}, swept.loc[swept["lever"].eq("nothing"), "other"].iloc[0]
    for name, arms in swept.query("strength > 0").groupby("lever"):
        rows = arms.groupby("strength", sort=False).agg(
            obeyed=("obeyed", "sum"),
            right=("right", "sum"),
            n=("n", "sum"),
            other=("other", "first"),
        )
        mild = rows[(rows["right"] >= 0.95 * rows["n"]) & (rows["other"] >= 0.8 * kept)]
        chosen[name] = mild["obeyed"].idxmax() if len(mild) else rows.index[0]
    return chosen


def run(name: str, seed: int, out: Path) -> None:
    """Measure one model with one seed, unless its file is in `out`."""
    path = out / f"{name}-{seed}.csv"
    if path.exists():
        return
    model, tokenizer = load(name)
    swept = sweep(model, tokenizer, seed).assign(seed=seed)
    if seed != PROFILE:
        run(name, PROFILE, out)
        chosen = choose(pd.read_csv(out / f"{name}-{PROFILE}.csv"))
        others = table_of_histories(model, tokenizer, seed, chosen)
        swept = pd.concat([swept, others.assign(seed=seed)])
    table = swept.assign(model=name)
    scores = [column for column in table.columns if column not in COLUMNS]
    write_text(path, table[COLUMNS + scores].to_csv(index=False, lineterminator="\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "collect"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a model this small is no faster on two
    parts = [(name, seed) for seed in options.seeds for name in options.models]
    if options.command == "run":
        for name, seed in parts:
            run(name, seed, options.out)
    else:
        tables = [pd.read_csv(options.out / f"{name}-{seed}.csv") for name, seed in parts]
        text = pd.concat(tables).to_csv(index=False, lineterminator="\n")
        write_text(DATA / "levers.csv", text)


if __name__ == "__main__":
    main()
