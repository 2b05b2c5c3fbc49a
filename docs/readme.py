"""Draw the picture of all results, and write the tables of README.md and docs/teaching.md, from the
committed results and the notebooks' heads.

    python docs/readme.py      (or: make readme)

A table stands between `<!-- its name -->` and `<!-- end -->`; tests/test_readme.py fails when it is
not what this file would write.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from overview import draw

from steerkit.files import ROOT, write_text
from steerkit.results import paper_result, read_claims

LLAMA = "Llama 2, [2307.09288](https://arxiv.org/abs/2307.09288)"
PASTA = "PASTA, [2311.02262](https://arxiv.org/abs/2311.02262)"
STREAMING = "StreamingLLM, [2309.17453](https://arxiv.org/abs/2309.17453)"
DORMANT = "Active-dormant heads, [2410.13835](https://arxiv.org/abs/2410.13835)"
TASKS = {  # claim -> label, column of the paper's tables
    "json": ("JSON", "json_f"),
    "pronouns": ("Pronouns", "pronouns"),
    "biasbios": ("BiasBios", "biasbios"),
    "counterfact": ("CounterFact", "counterfact_es"),
}


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def ours(notebook: str, claim: str) -> dict[str, float]:
    return read(f"figures/cpu/{notebook}/{claim}.claim.json")["ours"]


def side_by_side(values: dict[str, float], names: str, form: str = "{:.0f}") -> str:
    return " / ".join(form.format(values[name]) for name in names.split())


def start_here(notebook: str) -> tuple[str, str, str]:
    table = paper_result("gatt.table30.baseline")["values"]
    published = f"recall at turns 2 / 4 / 6: {side_by_side(table, '2 4 6')} %"
    replies = ours(notebook, "forgetting")
    first, third = replies["reply 1"], replies["reply 3"]
    return f"{LLAMA}, Table 30", published, f"adherence at replies 1 / 3: {first:.0%} / {third:.0%}"


def gatt(notebook: str) -> tuple[str, str, str]:
    turns = "2 4 6 20"
    arms = {"base": "baseline", "GAtt": "gatt"}
    tables = {arm: paper_result(f"gatt.table30.{key}")["values"] for arm, key in arms.items()}
    paper = ", ".join(f"{arm} {side_by_side(table, turns)}" for arm, table in tables.items())
    measured = {arm: ours(notebook, f"table30_{key}") for arm, key in arms.items()}
    recall = ", ".join(f"{arm} {side_by_side(row, turns)}" for arm, row in measured.items())
    where = f"{LLAMA}, section 3.3, Table 30"
    return where, f"recall at turns 2 / 4 / 6 / 20: {paper} %", f"recall: {recall} %"


def maps(notebook: str) -> tuple[str, str, str]:
    weights = (
        f"{side_by_side(ours(notebook, f'late_turns_{text}'), 'base GAtt', '{:.2f}')} ({text})"
        for text in ("following", "forgetting")
    )
    published = "one dialogue, no numbers: larger activations on the instruction for longer"
    our_text = f"largest weight on the instruction, base / GAtt: {', '.join(weights)}"
    return f"{LLAMA}, Figure 10", published, our_text


def pasta(notebook: str) -> tuple[str, str, str]:
    ways = ("few_shot", "task_specific")
    few, chosen = (paper_result(f"pasta.llama_7b.{way}")["values"] for way in ways)
    published, our_text = [], []
    for claim, (label, column) in TASKS.items():
        measured = ours(notebook, claim)
        best_prompt = measured["task-specific"] - measured["gain"]
        published.append(f"{label} {few[column]:.0f} / {chosen[column]:.0f}")
        our_text.append(f"{label} {best_prompt:.0%} / {measured['task-specific']:.0%}")
    paper = f"LLaMA-7B, few-shot / searched heads: {', '.join(published)} %"
    return (
        f"{PASTA}, main table",
        paper,
        f"best prompt / four searched heads: {', '.join(our_text)}",
    )


def streams(notebook: str) -> tuple[str, str, str]:
    settings = ("dense", "window", "recomputation", "streaming")
    published = ", ".join(
        f"{name} {paper_result(f'streaming.table1.{name}')['value']:.4g}" for name in settings
    )
    above = []
    for stream in ("English", "market"):
        dense, window = (*ours(notebook, f"{stream}_dense").values(),
                         *ours(notebook, f"{stream}_window").values())  # fmt: skip
        above.append(f"{stream} dense {dense:+.2f}, window {window:+.2f}")
    our_text = f"nats per token above StreamingLLM: {'; '.join(above)}"
    return f"{STREAMING}, Table 1", f"perplexity: {published}", our_text


def from_scratch(notebook: str) -> tuple[str, str, str]:
    table = paper_result("streaming.table3.learnable_sink")["values"]
    measured = ours(notebook, "table3_learnable_sink")
    published = f"learnable sink, perplexity at caches 0+1024 / 1+1023: {table['0+1024']:.0f} / "
    our_text = f"at 0+64 / 1+63: {measured['0+64']:.0f} / {measured['1+63']:.1f}"
    return f"{DORMANT}; StreamingLLM, Table 3", f"{published}{table['1+1023']:.1f}", our_text


def which_lever(notebook: str) -> tuple[str, str, str]:
    trained = ours(notebook, "trained_beats_levers")
    pinned = ours(notebook, "pinned_tiny-gatt-mixed_neutral")
    our_text = "among neutral replies at turn 20: levers at equal side effects "
    our_text += f"{trained['best of these']:.0%}, mixed GAtt {trained['GAtt, mixed histories']:.0%}"
    late = side_by_side(pinned, "pinned evicted", "{:.0%}")
    our_text += f"; at turns 151 to 200, pinned / evicted: {late}"
    papers = "PASTA, InstABoost, SpotLight, split-softmax, guidance, GAtt, StreamingLLM"
    return papers, "none: each paper has its own tasks", our_text


ROWS = {  # notebook -> paper, the paper's number, ours
    "00_start_here": start_here,
    "01_gatt_training": gatt,
    "02_attention_heatmaps": maps,
    "03_pasta_head_search": pasta,
    "04_streaming_llm": streams,
    "05_sink_from_scratch": from_scratch,
    "06_which_lever": which_lever,
}


def table() -> Iterator[str]:
    """Notebook -> paper, the paper's number, ours, CPU time in the profiles cpu and smoke."""
    yield "| notebook | paper | the paper's number | ours (cpu profile) | cpu / smoke |"
    yield "|---|---|---|---|---|"
    for name, row in ROWS.items():
        times = (read(f"figures/{p}/{name}/run.json")["cpu_seconds"] for p in ("cpu", "smoke"))
        cost = " / ".join(f"{seconds:.0f} s" for seconds in times)
        yield " | ".join([f"| [{name}](notebooks/{name}.ipynb)", *row(name), f"{cost} |"])


def tracks() -> Iterator[str]:
    """The teacher's two tracks: minutes of reading, running and exercises, as the heads say."""
    yield "| track | notebooks | minutes to read | to run | for exercises |"
    yield "|---|---|---|---|---|"
    for name, order in (("sinks", "00 05 04"), ("instructions", "00 01 02 03 06")):
        paths = [path for n in order.split() for path in (ROOT / "notebooks").glob(f"{n}*.ipynb")]
        times = [MINUTES.search(path.read_text(encoding="utf-8")) for path in paths]
        sums = [sum(int(time[n]) for time in times if time) for n in (1, 2, 3)]
        links = ", ".join(f"[{path.stem[:2]}](../notebooks/{path.name})" for path in paths)
        yield f"| {name} | {links} | {sums[0]} | {sums[1]} | {sums[2]} |"


def expected() -> Iterator[str]:
    """Every committed claim, and what was measured."""
    yield "| notebook | claim | measured | holds |"
    yield "|---|---|---|---|"
    for claim in read_claims(sorted((ROOT / "figures" / "cpu").glob("[0-9]*/"))):
        measured = "; ".join(f"{name}: {short(value)}" for name, value in claim["ours"].items())
        holds, number = "yes" if claim["holds"] else "NO", claim["notebook"][:2]
        yield f"| {number} | {claim['claim']} | {measured} | {holds} |".replace("\n", " ")


def short(value: Any) -> str:
    """Three significant digits, as people say them."""
    if isinstance(value, dict):
        return ", ".join(f"{name} = {short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " / ".join(map(short, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


TABLES = {"notebooks": table, "tracks": tracks, "expected": expected}
MINUTES = re.compile(r"\*\*Time:\*\* reading (\d+) minutes, running (\d+), exercises (\d+)")


def render(text: str) -> str:
    """A page with its tables made anew."""
    part = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    if not part.search(text):
        raise ValueError("expected a part <!-- notebooks --> ... <!-- end -->")

    def write(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- {match[1]} -->", *TABLES[match[1]](), "<!-- end -->"])

    return part.sub(write, text)


if __name__ == "__main__":
    draw(ROOT / "figures" / "cpu")
    for page in (ROOT / "README.md", ROOT / "docs" / "teaching.md"):
        write_text(page, render(page.read_text(encoding="utf-8")))
