"""The four tasks on real data: biographies of Bias in Bios (1901.09451), as PASTA's own evaluation
reads them, and counterfactuals of ROME (2202.05262). Prompts follow the paper's appendix.

The hub's "LabHC/bias_in_bios" will not do: it lacks names, and the sentence that is the span.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from steerkit.chat import Message
from steerkit.steering.tasks import Example, Task, exact, first_words

Record = Mapping[str, Any]


def load_task(task: Task, records: Iterable[Record]) -> tuple[Task, list[Example]]:
    """The task with real examples, and with the metrics that fit them.

    A file's records are read by `datasets.load_dataset("json", data_files=path, split="train")`;
    `rename_columns` of the result serves data whose columns have other names. The answer of
    Pronouns Changing is not in the data.
    """
    try:
        examples = [_MAKE[task.name](record) for record in records]
    except KeyError as error:
        raise ValueError(
            f"no column {error} for task {task.name}: use Dataset.rename_columns of `datasets`"
        ) from error
    if task.name == "biasbios":
        occupations = tuple(sorted({example.value for example in examples}))
        examples = [example._replace(candidates=occupations) for example in examples]
    strict = first_words if task.strict is exact else task.strict
    return replace(task, strict=strict), examples


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
