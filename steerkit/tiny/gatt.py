"""The arms of notebook 01 on the embedded model: sampled, trained, measured, and stored.

`python -m steerkit.tiny.gatt run --out DIR` makes all of them, one JSON file per arm and seed, and
goes on where it was stopped; `collect` joins the files that are there into
data/gatt_results.json, `ship` copies one seed's GAtt adapter to data/tiny-gatt.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.constraints import FAMILIES, REAL_FAMILIES, Constraint, Question
from steerkit.files import DATA, data_file, write_bytes, write_json
from steerkit.gatt import dialogues as gatt
from steerkit.gatt import evaluation as gatt_eval
from steerkit.gatt.training import Settings, train
from steerkit.models import load
from steerkit.results import versions
from steerkit.statistics import bootstrap
from steerkit.tiny import gates
from steerkit.tiny.world import repeat_question

ARMS = ("base", "every turn", "all turns", "gatt", "dpo", "unseen families")
UNSEEN = ("hobby", "json")  # kept out of the arm "unseen families", and measured there
PROBE_TURNS = (2, 4, 6, 20)  # Table 30
_FAMILIES = {"world": FAMILIES, "real": REAL_FAMILIES}
_EVALUATED: dict[str, gatt.Ask] = {"world": gates.question_for, "real": gatt.real_question}
SETTINGS = Settings()
DIALOGUES = 160
CANDIDATES = 2
SEEDS = (3, 4, 5)  # fresh ones: the recipe was chosen on 0, 1 and 2
N = {"gatt": 22, "unseen families": 22}  # dialogues per family and split of one seed; others: 6


def settings_of(arm: str, seed: int) -> Settings:
    """DPO reads each dialogue eight times (two replies, two models, forth and back): fewer rows."""
    if arm == "dpo":
        return replace(SETTINGS, lr=1e-3, steps=120, batch=4, sft_weight=1.0, seed=seed)
    return replace(SETTINGS, seed=seed)


def training_question(rng: random.Random, constraints: Sequence[Constraint]) -> Question:
    """A quarter asks to repeat a sentence about her or him, whatever the instruction.

    If only those did that say "they", the question alone would teach to say "they".
    """
    return repeat_question(rng) if rng.random() < 0.25 else gates.question_for(rng, constraints)


def training_plans(
    seed: int, *, dialogues: int = DIALOGUES, turns: int = 20, table: str = "world"
) -> list[gatt.Plan]:
    """What is sampled for one seed: one dialogue in eight has no instruction at all."""
    # Languages twice: to hold one that was never trained on is the hardest of what is asked.
    families = [*_FAMILIES[table], "language"]
    rng = random.Random(f"plans {seed}")
    values = {f: gatt.split_values(f, table)[0] for f in _FAMILIES[table]}
    # Each value equally often: the commonest one would become the guess of a late reply.
    turns_of = {f: cycle(rng.sample(v, len(v))) for f, v in values.items()}
    given = []
    for i in range(dialogues):
        drawn = gatt.draw(rng, families=families, table=table) if i % 8 else ()
        given.append(tuple(c._replace(value=next(turns_of[c.family])) for c in drawn))
    tiny = table == "world"  # a real model's words for "no instruction" are not known
    ask = training_question if tiny else gatt.real_question
    return [gatt.make_plan(rng, c, turns=turns, probes=bool(c) or tiny, ask=ask) for c in given]


def without_families(
    samples: Sequence[gatt.Sample], families: Sequence[str] = UNSEEN
) -> list[gatt.Sample]:
    """The dialogues that neither instruct by these families nor ask for them."""
    probes = {p.question for f in families if (p := Constraint(f, "").probe)}
    return [
        s
        for s in samples
        if not {c.family for c in s.plan.constraints} & set(families)
        and not {q.text for q in s.plan.questions} & probes
    ]


def rows_of(
    arm: str,
    model: gatt.Model,
    tokenizer: gatt.Tokenizer,
    samples: Sequence[gatt.Sample],
    seed: int,
) -> list[gatt.Row]:
    """Training rows of an arm, from the same dialogues and the same turns."""
    if arm == "unseen families":
        samples = without_families(samples)
    if arm == "dpo":
        return gatt.make_pairs(model, tokenizer, samples, seed=seed)
    rows = gatt.make_rows(samples, seed=seed)
    return gatt.make_all_turns_rows(rows) if arm == "all turns" else rows


def evaluation_plans(
    seed: int,
    n: int,
    *,
    held_out: bool,
    families: Sequence[str] | None = None,
    turns: int = 20,
    table: str = "world",
) -> list[gatt.Plan]:
    """`n` dialogues of one instruction for each family that has such values."""
    rng = random.Random(f"evaluation {seed} {held_out}")
    fit = [f for f in families or _FAMILIES[table] if gatt.split_values(f, table)[held_out]]
    options = {"held_out": held_out, "table": table}
    drawn = [gatt.draw(rng, families=[f], **options) for f in fit for _ in range(n)]
    return [gatt.make_plan(rng, given, turns=turns, ask=_EVALUATED[table]) for given in drawn]


def measure(
    arm: str,
    model: gatt.Model,
    tokenizer: gatt.Tokenizer,
    seed: int,
    *,
    n: int,
    side: bool = False,
    turns: int = 20,
    table: str = "world",
    max_new_tokens: int = 48,
) -> dict[str, Any]:
    """One record of what notebook 01 shows of a model: 0/1 rows as strings, to be resampled there.

    `n` dialogues per family and split; `side` adds side effects and foreign histories.
    """
    families = UNSEEN if arm == "unseen families" else None
    every = arm == "every turn"
    found: dict[str, Any] = {"arm": arm, "seed": seed, "cells": {}}
    for split in ("seen", "held-out"):
        options = {"families": families, "turns": turns, "table": table}
        plans = evaluation_plans(seed, n, held_out=split == "held-out", **options)
        rows = gatt_eval.adherence_by_turn(
            model,
            tokenizer,
            plans,
            every=every,
            probe_turns=[t for t in PROBE_TURNS if t <= turns],
            max_new_tokens=max_new_tokens,
        )
        found["cells"][split] = {
            "family": [p.constraints[0].family for p in plans],
            "obeyed": pack(rows.obeyed),
            "right": pack(rows.right),
            "recalled": pack(rows.recalled),
        }
    if side:
        found |= _side_effects(model, tokenizer, seed)
        if arm in ("base", "gatt"):
            found |= _foreign_histories(model, tokenizer, seed)
    return found


def _side_effects(model: gatt.Model, tokenizer: gatt.Tokenizer, seed: int) -> dict[str, Any]:
    return {
        "facts": pack(gates.facts(model, tokenizer)[:, None]),
        "leak": pack(gatt_eval.leak(model, tokenizer, n=32, seed=seed)),
        "untold": pack(gatt_eval.untold(model, tokenizer, seed=seed)[:, None]),
        "perplexity": gates.english_perplexity(model, tokenizer, tokens=8192),
    }


def _foreign_histories(model: gatt.Model, tokenizer: gatt.Tokenizer, seed: int) -> dict[str, Any]:
    found = {}
    for name, forced in (("neutral", gatt_eval.neutral), ("competing", gatt_eval.competing)):
        families = [f for f in FAMILIES if name == "neutral" or len(gatt.values(f)) > 1]
        plans = evaluation_plans(seed, 24 // len(families), held_out=False, families=families)
        rows = gatt_eval.adherence_by_turn(model, tokenizer, plans, forced=forced)
        found[name] = pack(rows.obeyed)
    return found


def kl_by_turn(
    model: gatt.Model, teacher: gatt.Model, tokenizer: gatt.Tokenizer, seed: int, *, n: int = 2
) -> list[float]:
    """Mean KL (nats per reply token) to the base that reads the instruction in every message."""
    plans = evaluation_plans(seed, n, held_out=False)
    samples = gatt.sample_dialogues(teacher, tokenizer, plans, candidates=1, seed=seed)
    return gatt_eval.teacher_kl(model, teacher, tokenizer, samples).mean(0).tolist()


def pack(rows: Tensor) -> list[str]:
    """(N, T) of 0, 1 and NaN -> one string a row: "0", "1", "-"."""
    return ["".join("-" if x != x else str(int(x)) for x in row) for row in rows.tolist()]


def unpack(rows: Sequence[str]) -> Tensor:
    """The inverse of `pack`."""
    return torch.tensor([[torch.nan if x == "-" else float(x) for x in row] for row in rows])


def run_arm(arm: str, seed: int, out: Path) -> dict[str, Any]:
    """One arm with one seed, its record written to `out`; read from there if it is complete."""
    path = out / f"{arm.replace(' ', '-')}-{seed}.json"
    base, tokenizer = load("tiny")
    trained = arm not in ("base", "every turn")
    settings = settings_of(arm, seed)
    wanted: dict[str, Any] = {"arm": arm, "seed": seed, "base": fingerprint(base)}
    if trained:
        wanted |= {"settings": asdict(settings), "dialogues": DIALOGUES}
        wanted |= {"candidates": CANDIDATES}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(record.get(k) == v for k, v in wanted.items()):
            return record
    start, log = time.perf_counter(), []
    model = base
    if trained:
        plans, file = training_plans(seed), out / f"samples-{seed}.jsonl"
        samples = gatt.sample_dialogues(
            base, tokenizer, plans, out=file, candidates=CANDIDATES, seed=seed
        )
        wanted["sampled_s"] = time.perf_counter() - start
        rows = rows_of(arm, base, tokenizer, samples, seed)
        folder = out / path.stem
        model, log = train(base, tokenizer, rows, out=folder, settings=settings)
        wanted |= {"rows": len(rows), "good": sum(sum(s.good) for s in samples)}
    before = time.perf_counter() - start
    side = arm not in ("every turn", "unseen families")
    found = measure(arm, model, tokenizer, seed, n=N.get(arm, 6), side=side)
    if side:
        teacher, _ = load("tiny")
        found["kl"] = kl_by_turn(model, teacher, tokenizer, seed)
    seconds = {"trained_s": before, "measured_s": time.perf_counter() - start - before}
    record = wanted | seconds | {"log": log, "versions": versions()} | found
    write_json(path, record)
    return record


def fingerprint(model: gatt.Model) -> str:
    """A short name for a model's weights: the norms of its first and last matrix."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return " ".join(f"{p.double().norm().item():.6f}" for p in (matrices[0], matrices[-1]))


def records(path: Path | None = None) -> list[dict[str, Any]]:
    """The stored records: one per arm and seed."""
    path = data_file("gatt_results.json") if path is None else path
    return json.loads(path.read_text(encoding="utf-8"))


def rows(
    found: Sequence[dict[str, Any]],
    arm: str,
    split: str,
    key: str = "obeyed",
    *,
    family: str | None = None,
) -> Tensor:
    """All dialogues of an arm, seeds one after the other: (N, T) of 0, 1 and NaN."""
    cells = [r["cells"][split] for r in found if r["arm"] == arm]
    kept = [
        row
        for cell in cells
        for name, row in zip(cell["family"], cell[key], strict=True)
        if family in (None, name)
    ]
    if not kept:
        raise ValueError(f"no dialogues of {arm!r}, {split}, {family}: is the arm in the records?")
    return unpack(kept)


def by_turn(
    found: Sequence[dict[str, Any]], arm: str, split: str = "seen", key: str = "obeyed"
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 95 % interval over an arm's dialogues: three (T,)."""
    return bootstrap(rows(found, arm, split, key))


def histories(
    found: Sequence[dict[str, Any]], arm: str
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """`by_turn` on the model's own history, and on histories that it did not write."""
    curves = {"own history": by_turn(found, arm)}
    for kind in ("neutral", "competing"):
        rows_of_kind = [unpack(r[kind]) for r in found if r["arm"] == arm and kind in r]
        curves[f"{kind} history"] = bootstrap(torch.cat(rows_of_kind))
    return curves


def recall(found: Sequence[dict[str, Any]], arm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 95 % interval of the recall probe at `PROBE_TURNS`, all values; families without a
    probe are left out."""
    both = torch.cat([rows(found, arm, split, "recalled") for split in ("seen", "held-out")])
    return bootstrap(both[~both.isnan().any(1)])


def mean_of(found: Sequence[dict[str, Any]], arm: str, key: str) -> list[float]:
    """One number per seed: the mean of a side effect's rows, or the number itself."""
    values = [r[key] for r in found if r["arm"] == arm and key in r]
    return [unpack(v).mean().item() if isinstance(v, list) else v for v in values]


def ship(folder: Path, target: Path) -> None:
    """Copy a trained adapter and its parameters to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        write_bytes(target / name, (folder / name).read_bytes())
    write_bytes(target / "training.json", (folder / "run.json").read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m steerkit.tiny.gatt run | collect | ship --out DIR`."""
    parser = argparse.ArgumentParser(prog="python -m steerkit.tiny.gatt", description=__doc__)
    parser.add_argument("command", choices=("run", "collect", "ship"))
    parser.add_argument("--out", type=Path, required=True, help="samples, adapters and records")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    if args.command == "ship":
        ship(args.out / f"gatt-{args.seeds[0]}", DATA / "tiny-gatt")
        return
    for seed in args.seeds:
        for arm in args.arms:
            if args.command == "run":
                run_arm(arm, seed, args.out)
            elif (path := args.out / f"{arm.replace(' ', '-')}-{seed}.json").exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    if found:
        text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in found)
        (DATA / "gatt_results.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
