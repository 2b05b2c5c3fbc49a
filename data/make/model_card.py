"""Model cards: the acceptance tests of an embedded model, what they ask for, and what it reaches.

`python data/make/model_card.py --name tiny --model DIR` measures the model in DIR and writes
acceptance.json and README.md beside it.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

from acceptance import measure_chat, measure_streams
from train_tiny import RECIPES

from steerkit.constraints import FAMILIES, HELD_OUT_PAIRS
from steerkit.files import write_json, write_text
from steerkit.models import load
from steerkit.results import versions
from steerkit.tiny.world import PERSISTENCE


class Criterion(NamedTuple):
    """A number that was asked for before the training, and what came out."""

    name: str
    asked: str
    measured: str
    holds: bool


def write_card(directory: Path, *, name: str) -> dict[str, Any]:
    """Measure the model in `directory`, made by the recipe `name`; writes its card.

    The training log must lie beside it: the number of tokens is read there.
    """
    model, tokenizer = load(directory, device="cpu")
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    measured = measure_chat(model, tokenizer) if tokenizer.chat_template else {}
    measured |= measure_streams(model, tokenizer, length=RECIPES[name].length)
    measured |= {"logged": sorted({row.get("phase", "") for row in log})}
    measured |= {"tokens": log[-1]["tokens"], "parameters": model.num_parameters()}
    measured |= {"python": platform.python_version(), "versions": versions()}
    write_json(directory / "acceptance.json", measured)
    write_text(directory / "README.md", card(name, measured))
    return measured


def chat_criteria(measured: dict[str, Any]) -> list[Criterion]:
    """What the chat model must do before any experiment, and the forgetting it must show."""
    rows = [_at_least("memorised facts, word for word", measured["facts"], 0.95)]
    rows.append(_at_least("values read about unknown people", measured["reading"], 0.90))
    rows += [
        _at_least(f"- of these, {key}", measured[f"reading, {key}"], 0.90)
        for key in ("no rival", "a rival")
    ]
    rows += [_at_least(f"obeys {f}, same message", measured[f"obeys {f}"], 0.95) for f in FAMILIES]
    rows.append(_at_least("obeys held-out pairs", measured["obeys held-out pairs"], 0.95))
    worst = min(measured["repeated, by turn"])
    rows.append(
        Criterion(
            "instruction repeated in 20 messages, worst reply",
            ">= 95 %",
            _percent(worst),
            worst >= 0.95,
        )
    )
    sixth = measured["first turn only, by turn"][5]
    rows.append(
        Criterion("instruction of message 1, reply 6", "<= 10 %", _percent(sixth), sixth <= 0.10)
    )
    return rows


def stream_criteria(measured: dict[str, Any]) -> list[Criterion]:
    """English beside a bigram model, and how much the model leans on its first tokens."""
    mine, bigram = measured["English perplexity"], measured["bigram perplexity"]
    rows = [
        Criterion(
            "held-out English perplexity", f"< {bigram:.1f} (bigram)", f"{mine:.1f}", mine < bigram
        )
    ]
    for stream in (key for key in measured if key.endswith(" stream")):
        losses = measured[stream]
        gap = losses["window"] - losses["streaming"]
        rows.append(
            Criterion(f"{stream}: window - streaming", ">= 0.30 nats", f"{gap:.3f}", gap >= 0.30)
        )
        near = abs(losses["streaming_there"] - losses["recomputed"])
        rows.append(
            Criterion(
                f"{stream}: streaming - re-computation", "<= 0.05 nats", f"{near:.3f}", near <= 0.05
            )
        )
        burst = losses["dense"] - losses["streaming"]
        rows.append(
            Criterion(f"{stream}: dense - streaming", "> 0.30 nats", f"{burst:.3f}", burst > 0.30)
        )
    return rows


def card(name: str, measured: dict[str, Any]) -> str:
    """The card in Markdown."""
    criteria = (chat_criteria(measured) if "facts" in measured else []) + stream_criteria(measured)
    rows = "\n".join(
        f"| {c.name} | {c.asked} | {c.measured} | {'yes' if c.holds else '**no**'} |"
        for c in criteria
    )
    return f"""# {name}

A Llama of {measured["parameters"]:,} parameters, trained by the kit on {measured["tokens"]:,}
tokens of text that the kit generates (`data/make/training_documents.py`)
and of English from the documentation inside every Python ({measured["python"]} here; another
version holds slightly other texts). `log.jsonl` is the log of this very
run{_unlogged(name, measured)}.
{_phases(name)}
To make it again: `python data/make/train_tiny.py --model {name} --out DIR`; to measure it again:
`python data/make/model_card.py --model DIR --name {name}`.

| acceptance test | asked | measured | holds |
|---|---|---|---|
{rows}

Everything is measured on people, pairs of families and English texts that training never shows.
{_forgetting(measured) if "facts" in measured else ""}
It knows nothing but its tiny world, and is made for experiments on attention alone.
"""


def _unlogged(name: str, measured: dict[str, Any]) -> str:
    """The phases whose rows the log lacks."""
    phases = RECIPES[name].phases
    missing = [p for p in phases if len(phases) > 1 and p not in measured["logged"]]
    return f"; the rows of {', '.join(missing)} were not kept" if missing else ""


def _phases(name: str) -> str:
    """The phases of the recipe, one line each."""
    rows = [
        f"- {key}: {phase.steps:,} steps of {phase.tokens:,} tokens, learning rate {phase.lr:g}"
        for key, phase in RECIPES[name].phases.items()
    ]
    return "\nPhases of the training:\n" + "\n".join(rows) + "\n"


def _forgetting(measured: dict[str, Any]) -> str:
    decay = ", ".join(f"{p:.2f}" for p in PERSISTENCE)
    pairs = sorted(" + ".join(sorted(pair)) for pair in HELD_OUT_PAIRS)
    return f"""Held-out pairs: {", ".join(pairs)}. Four were held out at
first; capitals + figure and json + hobby were obeyed 0 times in 32 halfway through, and moved into
the training (`late_pairs`).

A rival is another person in the text with the attribute that is asked for: then only the name can
tell which value is right, and a guess is right half of the time. After the first phase the model
guessed (54.7 %), and 500 more steps with 60 % of rivals left it there: to bind a name to a value,
the place of the value must carry the name, and neither half of that circuit pays without the other.
Roll calls in which the name itself comes right before the value ("Ida Draper red.") need one half
only. With them nothing moved for 500 steps; at step 600 two names were told apart in 98 % of the
short forms and 86 % of the sentences (n 64 each).

**It forgets because it was taught to.** In the training text an instruction is obeyed with
probability {decay} at 0, 1, 2, 3, 4 and more replies after it was given. That is a starting point
for experiments, and no evidence about why large models forget.
"""


def _at_least(name: str, row: dict[str, float], asked: float) -> Criterion:
    interval = f"{_percent(row['low'])} to {_percent(row['high'])}"
    measured = f"{_percent(row['mean'])} ({interval}, n {row['n']})"
    return Criterion(name, f">= {asked:.0%}", measured, row["mean"] >= asked)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="its directory")
    parser.add_argument("--name", choices=sorted(RECIPES), default="tiny")
    options = parser.parse_args()
    write_card(options.model, name=options.name)


if __name__ == "__main__":
    main()
