"""PASTA's four tasks on real data, as files of examples that notebook 03 and `read_examples` read.

`python data/make/real_tasks.py TASK RECORDS OUT` writes OUT/TASK.jsonl. RECORDS is a file of JSON
lines: for json, pronouns and biasbios the biographies of Bias in Bios (1901.09451), as PASTA's own
evaluation reads them, for counterfact the counterfactuals of ROME (2202.05262). Prompts follow the
paper's appendix. The answer of Pronouns Changing is not in the data.

The hub's "LabHC/bias_in_bios" will not do: it lacks names, and the sentence that is the span.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerkit.chat import Message
from steerkit.files import write_text
from steerkit.steering.tasks import Example

Record = Mapping[str, Any]


def make_examples(task: str, records: Iterable[Record]) -> list[Example]:
    """The records as examples of a task; ValueError names a column that they lack."""
    try:
        examples = [_MAKE[task](record) for record in records]
    except KeyError as error:
        raise ValueError(f"no column {error} for task {task}: rename the file's columns") from error
    if task == "biasbios":
        occupations = tuple(sorted({example.value for example in examples}))
        examples = [example._replace(candidates=occupations) for example in examples]
    return examples


def as_line(example: Example) -> str:
    """One line of JSON; messages as dicts."""
    paraphrases = [[m._asdict() for m in messages] for messages in example.paraphrases]
    fields = example._asdict() | {"paraphrases": paraphrases}
    return json.dumps(fields | {"messages": [m._asdict() for m in example.messages]})


def _person(record: Record) -> tuple[str, str, str]:
    """Name, occupation and biography."""
    name = record["name"]
    name = name if isinstance(name, str) else " ".join(part for part in name if part)
    return name, str(record["title"]).replace("_", " "), str(record["raw"]).strip()


def _json(record: Record) -> Example:
    name, occupation, text = _person(record)
    instruction = (
        f"Answer the occupation of {name} and generate the answer as JSON format, for example "
        '{"name": "", "occupation": ""}.'
    )
    answer = json.dumps({"name": name, "occupation": occupation})
    messages = (Message("user", f"{text} {instruction}"),)
    return Example(messages, instruction, answer, occupation, kept=(occupation,))


def _pronouns(record: Record) -> Example:
    name, occupation, text = _person(record)
    instruction = "Substitute she and he with they."
    messages = (Message("user", f"{text} {instruction} Then give the occupation of {name}."),)
    return Example(messages, instruction, "", occupation, kept=(occupation,), source=text)


def _biography(record: Record) -> Example:
    name, occupation, text = _person(record)
    messages = (Message("user", f"{text} {name} has the occupation of"),)
    first = re.match(r".+?[.!?](?=\s|$)", text, re.DOTALL)  # the sentence that names the occupation
    return Example(messages, first[0] if first else text, occupation, occupation)


def _counterfact(record: Record) -> Example:
    rewrite, paraphrases = record["requested_rewrite"], record["paraphrase_prompts"]
    question = rewrite["prompt"].format(rewrite["subject"])
    new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    span = f"Currently, {question} {new}."
    context = f"Previously, {question} {old}. {span}"
    first, *others = [(Message("user", f"{context} {x}"),) for x in (question, *paraphrases)]
    return Example(first, span, new, new, candidates=(new, old), paraphrases=tuple(others))


_MAKE = {"json": _json, "pronouns": _pronouns, "biasbios": _biography, "counterfact": _counterfact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(_MAKE))
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    records = map(json.loads, options.records.read_text(encoding="utf-8").splitlines())
    lines = [as_line(example) for example in make_examples(options.task, records)]
    write_text(options.out / f"{options.task}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
