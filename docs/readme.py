"""Write those parts of README.md that are numbers, from the results that lie in the repository.

    python docs/readme.py      (or: make readme)

Between `<!-- NAME -->` and `<!-- end -->` stands what `PARTS[NAME]()` returns; tests/test_readme.py
fails when the file differs from that.
"""

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.files import ROOT, write_text
from steerkit.results import paper_result

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
TASKS = ("JSON", "Pronouns", "BiasBios", "CounterFact")
TURNS = ("2", "4", "6", "20")
BASE = "gatt.table30.baseline"
LLAMA = "Llama 2, [2307.09288](https://arxiv.org/abs/2307.09288)"
RATIOS = ("re-computation / streaming", "map, max / plain")  # in the table without a goal, too


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def claim(notebook: str, name: str) -> dict[str, Any]:
    return read(f"figures/cpu/{notebook}/{name}.claim.json")


def forgetting(notebook: str) -> str:
    ours = claim(notebook, "forgetting")["ours"]
    return f"adherence at replies 1 / 3: {ours['reply 1']:.0%} / {ours['reply 3']:.0%}"


def gatt(notebook: str) -> str:
    def row(name: str, factor: int) -> str:
        ours = claim(notebook, name)["ours"]
        return " / ".join(f"{factor * ours[turn]:.0f}" for turn in TURNS)

    recall = f"base {row('table30_baseline', 1)}, GAtt {row('table30_gatt', 1)} %"
    lasts = f"seen values {row('lasts_seen', 100)}, held-out values {row('lasts_held_out', 100)} %"
    return f"recall probe: {recall}; adherence with GAtt: {lasts}"


def weights(notebook: str) -> str:
    follow, forget = (
        claim(notebook, f"late_turns_{text}")["ours"] for text in ("following", "forgetting")
    )
    return (
        "largest weight on the instruction, mean of turns 8 to 20, base / GAtt: "
        f"{follow['base']:.2f} / {follow['GAtt']:.2f} on replies that follow, "
        f"{forget['base']:.2f} / {forget['GAtt']:.2f} on replies that forget"
    )


def tasks(notebook: str) -> str:
    found = {task: claim(notebook, task.lower())["ours"] for task in TASKS}
    rows = (
        f"{task} {ours['task-specific'] - ours['gain']:.0%} / {ours['task-specific']:.0%}"
        for task, ours in found.items()
    )
    return "best prompt / four searched heads: " + ", ".join(rows)


def streams(notebook: str) -> str:
    def nats(stream: str, setting: str) -> str:
        (found,) = claim(notebook, f"{stream}_{setting}")["ours"].values()
        return f"{setting} {found:+.2f}"

    settings = ("dense", "window", "re-computation")
    english, market = (", ".join(nats(s, x) for x in settings) for s in ("English", "market"))
    return f"nats per token above StreamingLLM, English: {english}; market: {market}"


def sinks(notebook: str) -> str:
    ours = claim(notebook, "table3_learnable_sink")["ours"]
    numbers = f"{ours['0+64']:.0f} / {ours['1+63']:.1f}"
    return f"learnable sink, three seeds, perplexity at 0+64 / 1+63: {numbers}"


def published(key: str, names: Sequence[str]) -> str:
    values = paper_result(key)["values"]
    return " / ".join(f"{values[name]:.4g}" for name in names)


def published_tasks() -> str:
    few, own = (
        paper_result(f"pasta.llama_7b.{way}")["values"] for way in ("few_shot", "task_specific")
    )
    columns = dict(zip(TASKS, ("json_f", "pronouns", "biasbios", "counterfact_es"), strict=True))
    return ", ".join(f"{task} {few[c]:.0f} / {own[c]:.0f}" for task, c in columns.items()) + " %"


def published_streams() -> str:
    names = {"dense": "dense", "window": "window", "re-computation": "recomputation"}
    names |= {"streaming": "streaming"}
    values = {name: paper_result(f"streaming.table1.{k}")["value"] for name, k in names.items()}
    return "perplexity " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())


ROWS = {  # notebook -> paper, the paper's number, ours
    "00_start_here": (
        f"{LLAMA}, Table 30",
        f"recall of an instruction at turns 2 / 4 / 6: {published(BASE, TURNS[:3])} %",
        forgetting,
    ),
    "01_gatt_training": (
        f"{LLAMA}, section 3.3, Table 30",
        f"recall probe at turns 2 / 4 / 6 / 20: base {published(BASE, TURNS)}, "
        f"GAtt {published('gatt.table30.gatt', TURNS)} %",
        gatt,
    ),
    "02_attention_heatmaps": (
        f"{LLAMA}, Figure 10",
        "one dialogue, no numbers: larger activations on the instruction for longer",
        weights,
    ),
    "03_pasta_head_search": (
        "PASTA, [2311.02262](https://arxiv.org/abs/2311.02262), main table",
        f"LLaMA-7B, few-shot / task-specific heads: {published_tasks()}",
        tasks,
    ),
    "04_streaming_llm": (
        "StreamingLLM, [2309.17453](https://arxiv.org/abs/2309.17453)",
        published_streams(),
        streams,
    ),
    "05_sink_from_scratch": (
        "Active-dormant heads, [2410.13835](https://arxiv.org/abs/2410.13835); "
        "StreamingLLM Table 3",
        "learnable sink, perplexity at caches 0+1024 / 1+1023: "
        + published("streaming.table3.learnable_sink", ("0+1024", "1+1023")),
        sinks,
    ),
}


def cost(profile: str, notebook: str) -> str:
    """CPU time and peak memory, `17 s, 0.6 GiB`, or a dash for what was never run."""
    path = f"figures/{profile}/{notebook}/run.json"
    if not (ROOT / path).exists():
        return "-"
    run = read(path)
    memory = run.get("memory")
    clock = "" if "cpu_seconds" in run else " (clock)"
    held = f", {memory['peak_gib']:.1f} GiB" if memory else ""
    return f"{seconds(run):.0f} s{clock}{held}"


def seconds(run: dict[str, Any]) -> float:
    """CPU time, on which a busy machine has little influence; else by the clock."""
    return run.get("cpu_seconds", run["seconds"])


def notebooks() -> Iterator[str]:
    """Notebook -> paper -> our number -> time and peak memory."""
    yield "| notebook | paper | the paper's number | ours (cpu profile) | cpu | smoke |"
    yield "|---|---|---|---|---|---|"
    for name in NOTEBOOKS:
        paper, number, ours = ROWS[name]
        cells = [f"[{name}](notebooks/{name}.ipynb)", paper, number, ours(name)]
        cells += [cost("cpu", name), cost("smoke", name)]
        yield "| " + " | ".join(cells) + " |"


def machine() -> Iterator[str]:
    """Where and how long, and each claim that does not hold."""
    runs = [read(f"figures/cpu/{name}/run.json") for name in NOTEBOOKS]
    here, minutes = runs[0]["machine"], sum(map(seconds, runs)) / 60
    on_gpu = list((ROOT / "figures" / "gpu").glob("*/run.json"))
    never = "" if on_gpu else " The gpu profile was never run."
    yield from wrapped(
        f"The last two columns: CPU time and peak memory of the notebook's process, measured on "
        f"{here['cores']} shared cores of an {here['cpu']} server with {here['memory_gib']} GiB of "
        f"memory and {here['gpu'] or 'no GPU'}; {minutes:.0f} minutes in all at cpu.{never} "
        "`steerkit doctor --model ID_OR_DIR` computes the memory that a model needs on a GPU."
    )
    claims = [read(path) for path in sorted((ROOT / "figures" / "cpu").glob("*/*.claim.json"))]
    failed = [row["claim"] for row in claims if not row["holds"]]
    yield ""
    yield from wrapped(
        f"{len(claims)} claims with n, intervals and seeds lie in `figures/cpu/*/*.claim.json`; "
        f"`make run` prints them. {len(failed)} do not hold here, and the notebooks say why:"
    )
    yield ""
    for text in failed:
        yield from wrapped(text, first="- ")


def ratios() -> Iterator[str]:
    """The ratios of benchmarks/results.json that have a goal, and some more."""
    found = read("benchmarks/results.json")
    here, used = found["machine"], found["versions"]
    scripts = found["scripts"].values()
    dates, load = sorted({s["date"] for s in scripts}), max(max(s["load"]) for s in scripts)
    yield from wrapped(
        f"Ratios side by side in one process, one thread (`make bench`; {here['cores']} shared "
        f"cores of an {here['cpu']} server, {here['memory_gib']} GiB, torch {used['torch']}, "
        f"{' and '.join(dates)}, load up to {load:.0f}); all rows, and the times behind "
        "them, are in [benchmarks/results.md](benchmarks/results.md)."
    )
    yield ""
    yield "| benchmark | what | measured | goal |"
    yield "|---|---|---|---|"
    for name, script in found["scripts"].items():
        for row in script["rows"]:
            if row["goal"].startswith((">=", "<=")) or row["what"].startswith(RATIOS):
                goal = row["goal"] + ("" if met(row) else " **missed**")
                yield f"| {name} | {row['what']} | {row['shown']} | {goal} |"


def met(row: dict[str, Any]) -> bool:
    """Is the number, before it was rounded, on the goal's side?"""
    if not row["goal"].startswith((">=", "<=")):
        return True
    limit = float(re.search(r"[\d.]+", row["goal"])[0])
    return row["value"] >= limit if row["goal"].startswith(">=") else row["value"] <= limit


def wrapped(text: str, *, first: str = "") -> list[str]:
    later = " " * len(first)
    options = {"initial_indent": first, "subsequent_indent": later, "break_on_hyphens": False}
    return textwrap.wrap(text, 100, break_long_words=False, **options)


PARTS = {"notebooks": notebooks, "machine": machine, "ratios": ratios}


def render(text: str) -> str:
    """The README with its parts made anew."""
    for name, lines in PARTS.items():
        part = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(part.findall(text)) != 1:
            raise ValueError(f"README.md: expected one part <!-- {name} --> ... <!-- end -->")
        body = "\n".join(lines()) + "\n"
        text = part.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    write_text(path, render(path.read_text(encoding="utf-8")))
