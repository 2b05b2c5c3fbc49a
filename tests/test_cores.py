"""What learners write in notebooks 00 and 03: wrong answers that look right are refused."""

import json
import math
from functools import partial
from typing import Any

import pytest
import torch

import steerkit
from steerkit.attention.heads import Head
from steerkit.files import NOTEBOOKS
from steerkit.lab.exercises import compare, exercise

SAILOR = "Figure: Plato. Paul Hilton works as a sailor. Paul Hilton works as a judge. Who is he?"
BIAS = "bias[:, indices, :, : len(inside)] = torch.where(inside, 0.0, math.log(alpha))"
WRONG = {  # notebook, the line of the solution, what stands there instead
    "the future is seen": ("03", ".masked_fill(future, -torch.inf)", ""),
    "all heads are steered": ("03", "bias[:, indices", "bias[:, :"),
    "the span is muted": ("03", "0.0, math.log(alpha)", "math.log(alpha), 0.0"),
    "what comes after the prompt is muted": (
        "03",
        BIAS,
        "every = torch.cat([inside, torch.zeros(K - len(inside)).bool()])\n"
        "    bias[:, indices] = torch.where(every, 0.0, math.log(alpha))",
    ),
    "nothing is steered": ("03", "(mask=bias.masked_fill(future, -torch.inf))", "()"),
    "rows do not sum to one": ("00", " / products.sum(-1, keepdim=True)", ""),
    "the span is multiplied": (
        "00",
        "factor[slice(*span)] = 1",
        "factor[slice(*span)] = 1 / alpha",
    ),
}


def core(number: str) -> str:
    """The source of a notebook's first exercise, with its solution."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if "exercise" in c["metadata"].get("tags", []))


@pytest.fixture
def given(tiny: tuple) -> dict[str, Any]:
    """What stands above the exercises."""
    model, tokenizer = tiny
    text = "Hobby: chess. Where does Anna Adler live?"
    names = {"math": math, "torch": torch, "partial": partial, "compare": compare}
    names |= {name: getattr(steerkit, name) for name in ("Message", "attach", "emphasise")}
    names |= {name: getattr(steerkit, name) for name in ("attention_weights", "find_span")}
    names |= {"model": model, "tokenizer": tokenizer, "exercise": exercise, "PLAY": SAILOR}
    ids = tokenizer(text, return_tensors="pt").input_ids
    return names | {"ids": ids, "head": Head(2, 1), "hobby": 3}


@pytest.mark.parametrize("number", ["00", "03"])
def test_the_solution_is_right(given: dict[str, Any], number: str) -> None:
    exec(core(number), given)


@pytest.mark.parametrize(("number", "line", "instead"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_refused(
    given: dict[str, Any], number: str, line: str, instead: str
) -> None:
    source = core(number)
    assert line in source
    with pytest.raises(AssertionError, match="case"):
        exec(source.replace(line, instead), given)
