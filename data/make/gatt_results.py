"""The trainings behind notebook 01: every arm and seed sampled, trained, measured, and stored.

`python data/make/gatt_results.py run --out DIR` makes them, one JSON and one CSV file per arm and
seed, and passes over those that are there (three hours on one core). `collect` joins the files into
data/gatt_replies.csv and data/gatt_runs.json; `ship` copies one seed's adapters to data/tiny-gatt
and data/tiny-gatt-mixed.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from acceptance import english_perplexity, facts
from torch import Tensor

from steerkit.chat import Message, dialogue_ids, prompt_ids, reply
from steerkit.constraints import FAMILIES, Constraint, values
from steerkit.files import DATA, write_bytes, write_json, write_text
from steerkit.gatt.dialogues import (
    Model,
    Plan,
    Row,
    Sample,
    Tokenizer,
    choose_replies,
    competing_plans,
    history,
    make_rows,
    neutral_plans,
    sample_dialogues,
)
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.gatt.training import Settings, train
from steerkit.models import load
from steerkit.results import versions
from steerkit.tiny.gatt import (
    DIALOGUES,
    HISTORIES,
    evaluation_plans,
    judged,
    measure,
    obeying,
    training_plans,
)
from steerkit.tiny.world import answer, fact_question, repeat_question

SEEDS = (3, 4, 5)  # fresh ones: the recipe was chosen on 0, 1 and 2
UNSEEN = ("hobby", "json")  # kept out of the arm "unseen families", and measured there
CANDIDATES = 2
FOREIGN = 4  # dialogues per family, split and seed on each history that is not the model's own
WRITTEN = tuple(name for name, forced in HISTORIES.items() if forced)


@dataclass(frozen=True)
class Dialogues:
    """What one seed's trainings are made of. The questions are the same, dialogue by dialogue."""

    own: list[Sample]  # sampled with the instruction in every message, and verified
    neutral: list[Sample]  # sampled without any instruction
    competing: list[Sample]  # sampled under another dialogue's instruction


@cache
def sampled(seed: int) -> Dialogues:
    """The dialogues of one seed, the same for all arms."""
    base, tokenizer = load("tiny")
    plans = training_plans(seed)
    own = sample_dialogues(base, tokenizer, plans, candidates=CANDIDATES, seed=seed)
    others = neutral_plans(plans), competing_plans(plans, seed=seed)
    once = partial(sample_dialogues, base, tokenizer, candidates=1)
    return Dialogues(own, *(once(kind, seed=seed + i) for i, kind in enumerate(others, 100)))


# Training data of an arm: (base, tokenizer, dialogues, seed) -> rows
MakeRows = Callable[[Model, Tokenizer, Dialogues, int], list[Row]]


def last_turn(*kinds: str, templates: bool = False) -> MakeRows:
    """GAtt's rows behind these `kinds` of histories, sampled or by `templates`."""

    def rows(_: Model, __: Tokenizer, dialogues: Dialogues, seed: int) -> list[Row]:
        histories = [getattr(dialogues, kind) for kind in kinds]
        if templates:
            texts = HISTORIES | {"own": obeying}
            histories = [written(dialogues.own, texts[kind]) for kind in kinds]
        return make_rows(dialogues.own, histories=histories, seed=seed)

    return rows


def written(samples: Sequence[Sample], forced: Callable[[Plan, int], str]) -> list[Sample]:
    """The same dialogues with replies by a template; at a probe it knows of no instruction."""
    unstated = {p.question: p.answer_without for f in FAMILIES if (p := Constraint(f, "").probe)}
    return [
        s._replace(
            replies=tuple(
                unstated.get(question.text) or forced(s.plan, turn)
                for turn, question in enumerate(s.plan.questions)
            )
        )
        for s in samples
    ]


def all_turns(*kinds: str) -> MakeRows:
    """The same dialogues as whole messages: TRL then puts the loss on every assistant turn.

    This is the ablation that the paper argues against and does not measure.
    """

    def rows(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, seed: int) -> list[Row]:
        cut = last_turn(*kinds)(model, tokenizer, dialogues, seed)
        return [{"messages": row["prompt"] + row["completion"]} for row in cut]

    return rows


def pairs(model: Model, tokenizer: Tokenizer, dialogues: Dialogues, seed: int) -> list[Row]:
    """DPO's rows {"prompt", "chosen", "rejected"}, with GAtt's prompts.

    Chosen is the verified reply that was sampled with the instruction repeated. Rejected is the
    model's reply when it reads the instruction in the first message only, if that reply fails.
    Without an instruction nothing fails. There the rejected reply follows the instruction of
    another dialogue, slipped into the last message; otherwise DPO would only ever learn to obey.
    """
    rng, samples = random.Random(seed), dialogues.own
    instructions = [s.plan.instruction for s in samples if s.plan.instruction]
    chosen, rows = choose_replies(samples, seed=seed), make_rows(samples, seed=seed)
    replies = [(samples[i], turn) for i, turn in chosen]
    prompts = []
    for (sample, _), row in zip(replies, rows, strict=True):
        *before, last = row["prompt"]
        if instructions and not sample.plan.instruction:
            last = last | {"content": f"{rng.choice(instructions)} {last['content']}"}
        prompts.append([*before, last])
    lapses = reply(model, tokenizer, prompts, max_new_tokens=48, batch=32)
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [{"role": "assistant", "content": lapse}],
        }
        for (sample, turn), row, lapse in zip(replies, rows, lapses, strict=True)
        if lapse != sample.replies[turn]
        and not (sample.plan.constraints and sample.plan.verified(turn, lapse))
    ]


def seen_families(_: Model, __: Tokenizer, dialogues: Dialogues, seed: int) -> list[Row]:
    return make_rows(without_families(dialogues.own), seed=seed)


def without_families(samples: Sequence[Sample], families: Sequence[str] = UNSEEN) -> list[Sample]:
    """The dialogues that neither instruct by these families nor ask for them."""
    probes = {p.question for f in families if (p := Constraint(f, "").probe)}
    return [
        s
        for s in samples
        if not {c.family for c in s.plan.constraints} & set(families)
        and not {q.text for q in s.plan.questions} & probes
    ]


@dataclass(frozen=True)
class Arm:
    """What is trained (nothing without `rows`), and what is measured."""

    rows: MakeRows | None = None
    settings: Settings = Settings()  # noqa: RUF009
    n: int = 6  # dialogues per family and split of one seed
    every: bool = False  # the instruction in each message
    families: Sequence[str] | None = None  # measured; None: all
    side_effects: bool = True
    histories: Sequence[str] = ()  # measured beside the model's own


# DPO reads each dialogue eight times (two replies, two models, forth and back): fewer rows.
DPO = Settings(lr=1e-3, steps=120, batch=4, sft_weight=1.0)
ARMS = {
    "base": Arm(histories=WRITTEN),
    "every turn": Arm(every=True, histories=WRITTEN, side_effects=False),
    "gatt": Arm(last_turn("own"), n=22, histories=WRITTEN),
    "gatt mixed": Arm(last_turn("own", "neutral", "competing"), n=22, histories=WRITTEN),
    "all turns": Arm(all_turns("own"), histories=WRITTEN),
    "all turns mixed": Arm(all_turns("own", "neutral", "competing"), histories=WRITTEN),
    "dpo": Arm(pairs, DPO, histories=WRITTEN),
    # Each kind of history left out once, and the same kinds by templates.
    "without competing": Arm(last_turn("own", "neutral"), histories=WRITTEN),
    "without neutral": Arm(last_turn("own", "competing"), histories=WRITTEN),
    "without own": Arm(last_turn("neutral", "competing"), histories=WRITTEN),
    "templates": Arm(last_turn("own", "neutral", "competing", templates=True), histories=WRITTEN),
    "unseen families": Arm(seen_families, n=22, families=UNSEEN, side_effects=False),
}


# Measurements


def measure_arm(arm: Arm, model: Model, tokenizer: Tokenizer, seed: int) -> pd.DataFrame:
    """All judged replies of one model, on its own history and on the written ones."""
    tables = []
    for split in ("seen", "held-out"):
        options = {"held_out": split == "held-out", "families": arm.families}
        own = {split: evaluation_plans(seed, arm.n, **options)}
        tables.append(measure(model, tokenizer, own, every=arm.every).assign(history="own"))
        for name in arm.histories:
            plans = evaluation_plans(seed, FOREIGN, **options)
            if name in ("competing", "mixed"):  # no rival of an only value
                plans = [p for p in plans if len(values(p.constraints[0].family)) > 1]
            how = {"every": arm.every, "forced": HISTORIES[name]}
            adherence = adherence_by_turn(model, tokenizer, plans, **how)
            tables.append(judged(plans, adherence).assign(split=split, history=name))
    return pd.concat(tables, ignore_index=True).assign(seed=seed)


def side_effects(model: Model, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Shares of facts right, of replies that obey without instruction, of probes denied; English
    perplexity; mean KL to the teacher by turn."""
    teacher, _ = load("tiny")
    plans = evaluation_plans(seed, 2, held_out=False)
    samples = sample_dialogues(teacher, tokenizer, plans, candidates=1, seed=seed)
    return {
        "facts": facts(model, tokenizer).mean().item(),
        "leak": leak(model, tokenizer, n=32, seed=seed).mean().item(),
        "untold": untold(model, tokenizer, seed=seed).mean().item(),
        "perplexity": english_perplexity(model, tokenizer, tokens=8192),
        "kl": teacher_kl(model, teacher, tokenizer, samples).mean(0).tolist(),
    }


def leak(
    model: Model, tokenizer: Tokenizer, *, turns: int = 20, n: int = 64, seed: int = 0
) -> Tensor:
    """Dialogues without any instruction: (n, turns) of 0/1, does a reply obey some constraint?

    Half of the messages ask for a fact, half for a sentence about her or him to be repeated.
    """
    rng, kinds = random.Random(f"leak {seed}"), (fact_question, repeat_question)
    plans = [Plan((), "", tuple(rng.choice(kinds)(rng) for _ in range(turns))) for _ in range(n)]
    every = [Constraint(f, v) for f in FAMILIES for v in values(f)]
    replies = adherence_by_turn(model, tokenizer, plans).replies
    return torch.tensor(
        [[float(any(c.obeyed(text) for c in every)) for text in texts] for texts in replies]
    )


def untold(model: Model, tokenizer: Tokenizer, *, n: int = 8, seed: int = 0) -> Tensor:
    """False recall: ask for an instruction that was never given, after 0 to n - 1 questions ->
    (families * n,), 1 if the model answers that there is none."""
    rng = random.Random(f"untold {seed}")
    dialogues, expected = [], []
    for family in FAMILIES:
        probe = Constraint(family, "").probe
        for turns in range(n) if probe else ():
            messages = []
            for question in [fact_question(rng) for _ in range(turns)]:
                text = answer(question.subject, question.attribute, question.value)
                messages += [Message("user", question.text), Message("assistant", text)]
            dialogues.append([*messages, Message("user", probe.question)])
            expected.append(probe.answer_without)
    replies = reply(model, tokenizer, dialogues)
    return torch.tensor([float(a == b) for a, b in zip(replies, expected, strict=True)])


@torch.no_grad()
def teacher_kl(
    model: Model, teacher: Model, tokenizer: Tokenizer, samples: Sequence[Sample]
) -> Tensor:
    """KL(teacher || model) in nats per reply token, by turn: (N, T).

    The teacher reads the instruction in every message, the model in the first one only. Both read
    the replies of `samples`, which the teacher gave.
    """
    divergences = []
    for sample in samples:
        taught = _reply_logprobs(teacher, tokenizer, sample, every=True)
        learnt = _reply_logprobs(model, tokenizer, sample, every=False)
        kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(taught, learnt, strict=True)]
        divergences.append(torch.stack(kl))
    return torch.stack(divergences)


def _reply_logprobs(
    model: Model, tokenizer: Tokenizer, sample: Sample, *, every: bool
) -> list[Tensor]:
    """Log-probabilities (tokens of reply t, V) for each turn t of one dialogue."""
    last = len(sample.replies) - 1
    messages = [*history(sample, last, every=every), Message("assistant", sample.replies[last])]
    ids = torch.tensor([dialogue_ids(tokenizer, messages)], device=model.device)
    logprobs = model(ids).logits[0].float().log_softmax(-1).cpu()
    by_turn = []
    for turn, text in enumerate(sample.replies):
        start = len(prompt_ids(tokenizer, history(sample, turn, every=every)))
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        by_turn.append(logprobs[start - 1 : start - 1 + tokens])
    return by_turn


# Runs


def run_arm(name: str, seed: int, out: Path) -> None:
    """Train and measure one arm with one seed, unless its files are in `out`."""
    arm, stem = ARMS[name], f"{name.replace(' ', '-')}-{seed}"
    if (out / f"{stem}.json").exists():
        return
    base, tokenizer = load("tiny")
    run: dict[str, Any] = {"arm": name, "seed": seed, "base": fingerprint(base)}
    start, model = time.perf_counter(), base
    if arm.rows is not None:
        settings = replace(arm.settings, seed=seed)
        dialogues = sampled(seed)
        run |= {"settings": asdict(settings), "dialogues": DIALOGUES, "candidates": CANDIDATES}
        run |= {"verified": sum(sum(s.verified) for s in dialogues.own)}
        run |= {"sampled_s": time.perf_counter() - start}
        rows = arm.rows(base, tokenizer, dialogues, seed)
        model, log = train(base, tokenizer, rows, out=out / stem, settings=settings, resume=True)
        run |= {"rows": len(rows), "log": log}
    run["trained_s"] = time.perf_counter() - start
    replies = measure_arm(arm, model, tokenizer, seed).assign(arm=name)
    if arm.side_effects:
        run |= side_effects(model, tokenizer, seed)
    run["measured_s"] = time.perf_counter() - start - run["trained_s"]
    write_replies(out / f"{stem}.csv", replies)
    write_json(out / f"{stem}.json", run | {"versions": versions()})  # last: the arm is complete


def fingerprint(model: Model) -> str:
    """A short name for a model's weights: the norms of its first and last matrix."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return " ".join(f"{p.double().norm().item():.6f}" for p in (matrices[0], matrices[-1]))


COLUMNS = ["arm", "seed", "split", "history", "family", "dialogue", "turn"]
SCORES = ["obeyed", "right", "recalled"]


def write_replies(path: Path, replies: pd.DataFrame) -> None:
    """One line a reply: arm, seed, split, history, family, dialogue, turn, and its 0/1 scores."""
    whole = replies.astype(dict.fromkeys(SCORES, "Int8"))
    write_text(path, whole[COLUMNS + SCORES].to_csv(index=False, lineterminator="\n"))


def collect(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Join the files of `out` into data/gatt_replies.csv and data/gatt_runs.json."""
    stems = [f"{arm.replace(' ', '-')}-{seed}" for seed in seeds for arm in arms]
    stems = [stem for stem in stems if (out / f"{stem}.json").exists()]
    runs = [json.loads((out / f"{stem}.json").read_text(encoding="utf-8")) for stem in stems]
    write_json(DATA / "gatt_runs.json", runs)
    write_replies(
        DATA / "gatt_replies.csv", pd.concat(pd.read_csv(out / f"{stem}.csv") for stem in stems)
    )


def ship(folder: Path, target: Path) -> None:
    """Copy a trained adapter to `target`; its base gets the name that holds on any machine."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {
        "base_model_name_or_path": "tiny",
        "target_modules": sorted(config["target_modules"]),
    }
    write_json(target / "adapter_config.json", config)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    write_bytes(target / "adapter_model.safetensors", weights)
    run = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    write_json(target / "training.json", {k: run[k] for k in ("base", "rows", "settings")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "collect", "ship"))
    parser.add_argument("--out", type=Path, required=True, help="adapters and records")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "ship":
        for arm in ("gatt", "gatt-mixed"):
            ship(options.out / f"{arm}-{options.seeds[0]}", DATA / f"tiny-{arm}")
    elif options.command == "collect":
        collect(options.out, options.arms, options.seeds)
    else:
        for seed in options.seeds:
            for arm in options.arms:
                run_arm(arm, seed, options.out)


if __name__ == "__main__":
    main()
