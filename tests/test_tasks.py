"""The four tasks: what is drawn, the metrics by hand, other ways to ask, real files."""

import json
import math
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import real_tasks
import torch

from steerkit.chat import Message, prompt_ids
from steerkit.spans import find_span
from steerkit.statistics import wilson
from steerkit.steering.pasta import emphasise
from steerkit.steering.tasks import (
    Example,
    compare,
    consistency,
    evaluate,
    exact,
    few_shot,
    first_words,
    fluency,
    generate,
    json_paper,
    json_strict,
    json_value_paper,
    kept,
    marked,
    pronouns_paper,
    pronouns_strict,
    read_examples,
    states_value,
    to_prompts,
)
from steerkit.tiny.tasks import TASKS

EVERY = pytest.mark.parametrize("name", list(TASKS))
FORMS = pytest.mark.parametrize("conflict", [False, True], ids=["easy", "conflict"])
STEER = partial(emphasise, heads=[(0, 1), (2, 0), (2, 3)], alpha=0.01)


def example(**changes) -> Example:
    row = {"messages": (Message("user", "?"),), "span": "?", "answer": "", "value": "nurse"}
    return Example(**row | changes)


# --- what is drawn -----------------------------------------------------------------------------


@EVERY
@FORMS
def test_the_right_answer_is_right_by_every_metric_and_an_empty_reply_by_no_strict_one(
    name, conflict
):
    task = TASKS[name]
    for e in task.examples(30, seed=0, conflict=conflict):
        assert task.strict(e.answer, e) == 1, e
        assert all(metric(e.answer, e) == 1 for metric in task.paper.values()), e
        assert kept(e.answer, e) == 1, e
        assert task.strict("", e) == 0
        assert kept("", e) == 0


@EVERY
def test_profiling_and_test_examples_share_nothing_that_is_asked(name):
    drawn = {s: TASKS[name].examples(200, seed=0, split=s) for s in ("profile", "test")}
    seen = {
        "json": lambda e: e.messages[-1].content,
        "pronouns": lambda e: e.source.split(maxsplit=1)[1],  # the sentence
        "biasbios": lambda e: e.kept[0],  # the stranger
        "counterfact": lambda e: (e.kept[0], e.candidates[1]),  # the memorised fact
    }[name]
    profile, test = ({seen(e) for e in rows} for rows in drawn.values())
    assert not profile & test


@EVERY
def test_nothing_competes_in_the_easy_form(name):
    for e in TASKS[name].examples(50, seed=0, conflict=False):
        text = " ".join(m.content for m in e.messages)
        rivals = [c for c in e.candidates if c != e.value]
        assert not any(f" {r}." in text for r in rivals if r not in e.kept)
        assert "capital" not in text
        assert len(e.messages) <= 2


@EVERY
@FORMS
def test_each_span_is_found_in_its_prompt(tiny, name, conflict):
    _, tokenizer = tiny
    rows = TASKS[name].examples(20, seed=3, conflict=conflict)
    for e, p in zip(rows, to_prompts(tokenizer, rows), strict=True):
        ((start, end),) = p.spans
        assert tokenizer.decode(p.ids[start:end]).strip() == e.span
        assert tokenizer.decode(p.answer) == e.answer + tokenizer.eos_token


# --- metrics by hand ---------------------------------------------------------------------------


def test_the_papers_json_metric_takes_any_object_in_the_reply_and_the_strict_one_does_not():
    e = example(answer='{"answer": "a nurse"}')
    inside = 'Sure! {"answer": "a nurse"} Is that all?'
    assert (json_paper(inside, e), json_value_paper(inside, e), json_strict(inside, e)) == (1, 1, 0)
    other = '{"answer": "a judge"}'
    assert (json_paper(other, e), json_value_paper(other, e), json_strict(other, e)) == (1, 0, 0)
    assert json_strict('{ "Answer" : "A nurse"}\n', e) == 1
    assert json_paper('{"answer": "a nurse', e) == json_strict("", e) == 0


def test_the_papers_pronoun_metric_rewards_silence_and_the_strict_one_does_not():
    e = example(source="She is a nurse and he likes her soup.")
    assert pronouns_paper("", e) == 1
    assert pronouns_strict("", e) == 0
    assert pronouns_paper("They are a nurse and he likes soup.", e) == 0.5
    assert pronouns_strict("They are a nurse and they like their soup.", e) == 1
    assert pronouns_strict("They are a nurse and they like her soup.", e) == 0
    assert pronouns_strict("They are here.", e) == 0  # content lost


@pytest.mark.parametrize(
    ("metric", "reply", "score"),
    [
        (states_value, "Ida is a Nurse.", 1),
        (states_value, "Ida is a nurse or a judge.", 0),
        (states_value, "Ida is a nursery.", 0),
        (exact, "a  nurse", 1),
        (exact, "a nurse today", 0),
        (first_words, "a nurse today", 1),
        (first_words, "nurse", 0),
    ],
)
def test_short_answers_are_scored(metric, reply, score):
    assert metric(reply, example(answer="a nurse", candidates=("nurse", "judge"))) == score


def test_fluency_is_the_weighted_entropy_of_bigrams_and_trigrams():
    words = ["a", "b", "a", "b", "c", "a", "b", "a", "b", "c", "d"]

    def entropy(n):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        p = [k / len(grams) for k in Counter(grams).values()]
        return sum(-x * math.log2(x) for x in p)

    expected = (2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2
    assert fluency(" ".join(words)) == pytest.approx(expected)
    assert fluency("no no no no no no") == 0 == fluency("")


def test_consistency_is_one_for_the_reference_and_zero_for_other_words():
    references = ["Ida likes soup", "Paul likes fish"]
    same, other = consistency(references, references), consistency(["x", ""], references)
    assert same == pytest.approx([1, 1])
    assert other == [0, 0]
    assert consistency(["Ida likes soup zebra", ""], references)[0] < 0.9  # strange words count
    # The word that both references share tells less than the one that is theirs alone.
    common, own = consistency(["likes", "Paul"], references)
    assert common < own


def test_wilsons_interval_holds_the_chance_and_is_open_at_the_ends():
    assert wilson(torch.ones(100)) == pytest.approx((100 / (100 + 1.96**2), 1.0))
    assert wilson(torch.zeros(100)) == pytest.approx((0.0, 1 - 100 / (100 + 1.96**2)))
    # Its ends are the chances p for which the mean is just 1.96 standard errors away.
    mean, n = 0.3, 50
    for p in wilson(torch.tensor([1.0] * 15 + [0.0] * 35)):
        assert abs(mean - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-6)


# --- other ways to ask -------------------------------------------------------------------------


def test_marks_stand_around_the_span_in_the_prompt_and_its_paraphrases():
    e = TASKS["counterfact"].examples(1, seed=0)[0]
    m = marked(e, '"')
    asked, marks = (e.messages, *e.paraphrases), (m.messages, *m.paraphrases)
    for before, after in zip(asked, marks, strict=True):
        assert after[-1].content == before[-1].content.replace(e.span, f'"{e.span}"')
    assert m.span == f'"{e.span}"'


@EVERY
def test_few_shots_are_whole_exchanges_in_front_of_the_question(name):
    e, *shots = TASKS[name].examples(4, seed=0)
    f = few_shot(e, shots)
    assert f.messages[-1] == e.messages[-1]
    systems, own = ([m for m in x.messages if m.role == "system"] for x in (f, e))
    assert systems == own
    assert all(m.role != "system" for m in f.messages[1:])
    spoken = [m.role for m in f.messages if m.role != "system"]
    assert spoken == ["user", "assistant"] * (len(spoken) // 2) + ["user"]
    replies = [m.content for m in f.messages if m.role == "assistant"]
    assert [r for r in replies if r in {s.answer for s in shots}] == [s.answer for s in shots]
    assert all(any(s.span in m.content for m in f.messages) for s in shots)


# --- a model on examples -----------------------------------------------------------------------


def test_steered_replies_do_not_depend_on_the_batch(tiny):
    model, tokenizer = tiny
    examples = [e for name in TASKS for e in TASKS[name].examples(2, seed=0)]
    together = generate(model, tokenizer, examples, steer=STEER)
    alone = [generate(model, tokenizer, [e], steer=STEER)[0] for e in examples]
    assert together == alone
    assert together != generate(model, tokenizer, examples)


@pytest.mark.parametrize("steer", [None, STEER], ids=["plain", "steered"])
def test_compare_is_the_loop_over_single_prompts(tiny, steer):
    model, tokenizer = tiny
    *examples, shot = TASKS["biasbios"].examples(9, seed=0)
    examples[1] = few_shot(examples[1], [shot])  # the others are padded to its length
    expected = []
    for e in examples:
        before = e.answer[: e.answer.rindex(e.value)].rstrip()
        asked, said = prompt_ids(tokenizer, e.messages), tokenizer(before)["input_ids"]
        ids = torch.tensor([asked + said])
        inside = torch.zeros(ids.shape, dtype=torch.bool)
        start, end = find_span(tokenizer, e.messages, e.span)
        inside[0, start:end] = True
        inside[0, len(asked) :] = True  # what is generated keeps its weight
        with torch.no_grad(), steer(model, inside) if steer else nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
        words = {c: logits[0, -1, tokenizer(" " + c)["input_ids"][0]].item() for c in e.candidates}
        expected.append(float(max(words, key=words.get) == e.value))
    assert compare(model, tokenizer, examples, steer=steer).tolist() == expected


def test_evaluate_gives_one_number_per_example_and_score(tiny):
    model, tokenizer = tiny
    task = TASKS["counterfact"]
    found = evaluate(model, tokenizer, task, task.examples(3, seed=0, conflict=False))
    assert {k: len(v) for k, v in found.items()} == dict.fromkeys(
        ["strict", "value", "kept", "fluency", "consistency", "ES", "PS"], 3
    )
    assert found["strict"].tolist() == [1, 1, 1]


def test_an_example_without_answer_cannot_be_scored_by_its_answer(tiny):
    with pytest.raises(ValueError, match="example without answer: 'Hello'"):
        to_prompts(tiny[1], [example(answer=" ", messages=(Message("user", "Hello"),))])


# --- the real data -----------------------------------------------------------------------------

BIOS = [
    {"raw": "Ida Fox is a nurse. She likes soup.", "title": "nurse", "name": ["Ida", "", "Fox"]},
    {"raw": "Dr. Bo Lee writes. He is tall.", "title": "poet", "name": ["Bo", "", "Lee"]},
]
FACTS = [
    {
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Ida Fox",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
        },
        "paraphrase_prompts": ["Ida Fox was born. Ida Fox speaks", "Ida Fox's language is"],
    }
]


def written_and_read(folder, name, records):
    """Through the script's files, as notebook 03 reads them."""
    records_file = folder / "records.jsonl"
    records_file.write_text("\n".join(map(json.dumps, records)))
    with patch.object(sys, "argv", ["real_tasks.py", name, str(records_file), str(folder)]):
        real_tasks.main()
    examples = read_examples(folder / f"{name}.jsonl")
    assert examples == real_tasks.make_examples(name, records)
    return examples


@pytest.mark.parametrize("name", ["json", "pronouns", "biasbios"])
def test_biographies_become_examples(tmp_path, name):
    ida, bo = written_and_read(tmp_path, name, BIOS)
    assert ida.span in ida.messages[0].content
    assert "Ida Fox" in ida.messages[0].content
    assert (ida.value, bo.value) == ("nurse", "poet")
    if name == "biasbios":
        assert ida.span == "Ida Fox is a nurse."
        assert ida.candidates == ("nurse", "poet")
        assert first_words("nurse. She", ida) == 1
    if name == "json":
        assert TASKS[name].strict('{"name": "Ida Fox", "occupation": "nurse"}', ida) == 1
    if name == "pronouns":
        assert TASKS[name].strict("Ida Fox is a nurse. They like soup.", ida) == 1


def test_counterfactuals_become_examples(tiny, tmp_path):
    (fact,) = written_and_read(tmp_path, "counterfact", FACTS)
    assert fact.span == "Currently, The mother tongue of Ida Fox is English."
    assert fact.messages[0].content == (
        "Previously, The mother tongue of Ida Fox is French. "
        f"{fact.span} The mother tongue of Ida Fox is"
    )
    assert fact.candidates == ("English", "French")
    assert len(fact.paraphrases) == 2
    measured = evaluate(
        *tiny, TASKS["counterfact"], [fact], max_new_tokens=2
    )  # runs on any chat model
    assert measured["PS"].item() in (0, 0.5, 1)


@pytest.mark.parametrize(
    ("name", "column"), [("json", "title"), ("counterfact", "requested_rewrite")]
)
def test_a_missing_column_is_one_clear_error(name, column):
    with pytest.raises(ValueError, match=f"no column '{column}' .*rename"):
        real_tasks.make_examples(name, [{"raw": "x", "name": "y"}])
