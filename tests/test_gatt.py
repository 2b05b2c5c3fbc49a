"""Ghost Attention's data: which words stand where, which reply is chosen, what a kill costs."""

import random
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from steerkit.chat import (
    CHATML,
    BatchedChat,
    Message,
    chat_batch,
    check_template,
    dialogue_ids,
    prompt_ids,
    reply,
)
from steerkit.constraints import FAMILIES, Constraint, Question, values
from steerkit.gatt import dialogues as gatt
from steerkit.gatt import evaluation as gatt_eval
from steerkit.tiny import gatt as gatt_arms
from steerkit.tiny.world import fact_question

FRENCH = Constraint("language", "French")
CHESS = Constraint("hobby", "chess")


def questions(*texts):
    return tuple(Question(text, "", "", "") for text in texts)


def plan_of(seed=0, turns=4, family="hobby", **options):
    rng = random.Random(seed)
    return gatt.make_plan(rng, gatt.draw(rng, families=[family]), turns=turns, **options)


def a_sample(turns=4, good=None):
    plan = gatt.Plan((CHESS,), "Hobby: chess.", questions(*[f"Q{t}?" for t in range(turns)]))
    replies = tuple(f"R{t}. I love chess." for t in range(turns))
    return gatt.Sample(plan, replies, tuple(good or [True] * turns))


# Plans and rows


def test_the_instruction_leads_every_message_or_the_first_one_only():
    plan = a_sample().plan
    assert [plan.message(t, every=True) for t in range(2)] == [
        "Hobby: chess. Q0?",
        "Hobby: chess. Q1?",
    ]
    assert [plan.message(t, every=False) for t in range(2)] == ["Hobby: chess. Q0?", "Q1?"]


def test_a_row_is_the_history_with_one_instruction_and_the_last_reply():
    rows = gatt.make_rows([a_sample()], per_dialogue=3)
    assert sorted(len(row["prompt"]) for row in rows) == [3, 5, 7]
    for row in rows:
        t = len(row["prompt"]) // 2
        texts = [m["content"] for m in row["prompt"]]
        wanted = [x for k in range(t) for x in (f"Q{k}?", f"R{k}. I love chess.")] + [f"Q{t}?"]
        assert texts == ["Hobby: chess. " + wanted[0], *wanted[1:]]
        assert row["completion"] == [{"role": "assistant", "content": f"R{t}. I love chess."}]


def test_only_verified_replies_are_taught_and_the_other_arm_has_the_same_dialogues():
    rows = gatt.make_rows([a_sample(good=[True, False, True, False])], per_dialogue=9)
    assert [len(row["prompt"]) for row in rows] == [5]
    assert gatt.make_all_turns_rows(rows) == [
        {"messages": rows[0]["prompt"] + rows[0]["completion"]}
    ]


def test_pairs_reject_what_the_model_said_and_failed(tiny):
    """Chosen obeys, rejected does not; where the base did not lapse there is no pair."""
    plans = [plan_of(seed, turns=5, family="emoji") for seed in range(3)]
    samples = gatt.sample_dialogues(*tiny, plans, candidates=1)
    pairs = gatt.make_pairs(*tiny, samples, first=0, per_dialogue=5)
    assert 3 <= len(pairs) <= 12  # at turn 1 it obeys
    by_prompt = {s.plan.message(0, every=False): s.plan for s in samples}
    for row in pairs:
        plan, t = by_prompt[row["prompt"][0]["content"]], len(row["prompt"]) // 2
        assert plan.good(t, row["chosen"][0]["content"])
        assert not plan.good(t, row["rejected"][0]["content"])


def test_pairs_without_an_instruction_reject_obedience(tiny):
    """Chosen is the plain reply; rejected is what the same message gets once it is instructed."""
    told = plan_of(0, turns=2, family="emoji")
    quiet = gatt.make_plan(random.Random(0), (), turns=6, ask=lambda rng, _: fact_question(rng))
    samples = gatt.sample_dialogues(*tiny, [told, quiet], candidates=1)
    pairs = gatt.make_pairs(*tiny, samples, first=0, per_dialogue=6)
    of_quiet = [p for p in pairs if told.instruction not in str(p["prompt"])]
    assert len(of_quiet) == 6
    for row in of_quiet:
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert told.constraints[0].obeyed(rejected) and not told.constraints[0].obeyed(chosen)


def test_an_instruction_that_no_verifier_knows_is_an_instruction(tiny, monkeypatch):
    """Nothing is slipped into a dialogue that has one, nor where there is none to slip in."""
    told = a_sample()._replace(plan=replace(a_sample().plan, constraints=()))
    quiet = told._replace(plan=replace(told.plan, instruction=""))
    asked = []

    def reply(model, tokenizer, dialogues, **_):
        asked.extend(m[-1].content for m in dialogues)
        return ["No."] * len(dialogues)

    monkeypatch.setattr(gatt, "reply", reply)
    gatt.make_pairs(*tiny, [told], first=1, per_dialogue=3)
    gatt.make_pairs(*tiny, [quiet], first=1, per_dialogue=3)
    assert set(asked) == {"Q1?", "Q2?", "Q3?"}
    asked.clear()
    gatt.make_pairs(*tiny, [told, quiet], first=1, per_dialogue=3)
    assert {a for a in asked if "chess" in a} == {f"Hobby: chess. Q{t}?" for t in (1, 2, 3)}
    assert len(asked) == 6


def test_values_held_out_are_a_quarter_and_never_drawn():
    rng = random.Random(0)
    for family in FAMILIES:
        seen, held_out = gatt.split_values(family)
        assert sorted(seen + held_out) == sorted(values(family))
        assert len(held_out) == len(values(family)) // 4
        drawn = {gatt.draw(rng, families=[family])[0].value for _ in range(100)}
        assert drawn <= set(seen)
    pools = {
        (c.family, c.value) for _ in range(300) for c in gatt.draw(rng, held_out=True, numbers=[1])
    }
    assert pools == {(f, v) for f in FAMILIES for v in gatt.split_values(f)[1]}


def test_half_of_the_instructions_are_short():
    rng = random.Random(1)
    short = Counter(
        gatt.make_plan(rng, [CHESS], turns=1).instruction == CHESS.short for _ in range(400)
    )
    assert 160 < short[True] < 240


def test_what_the_user_asks_does_not_give_the_instruction_away():
    """Sentences to be repeated stand in dialogues of every family, and in those of none."""
    plans = gatt_arms.training_plans(0)
    asked = {c.family for p in plans for c in p.constraints if "Repeat:" in str(p.questions[1:])}
    assert asked == set(FAMILIES)
    assert any("Repeat:" in str(p.questions) for p in plans if not p.constraints)


def test_no_value_is_trained_much_more_often_than_another():
    counts = Counter(c for p in gatt_arms.training_plans(0) for c in p.constraints)
    for family in FAMILIES:
        found = [counts[Constraint(family, v)] for v in gatt.split_values(family)[0]]
        assert max(found) - min(found) <= 1


def test_probes_are_judged_by_what_is_recalled():
    plan = gatt.Plan((CHESS, FRENCH), "Hobby: chess.", questions("Q?", CHESS.probe.question), (1,))
    assert plan.good(1, "My hobby is chess.") and not plan.good(1, "I speak French.")
    assert not plan.good(0, "My hobby is chess.")


def test_each_instruction_is_asked_for_once_and_never_in_the_first_message():
    """A second question would find the answer in the history."""
    for seed in range(40):
        plan = plan_of(seed, turns=6, probes=True)
        assert [t for t, q in enumerate(plan.questions) if q.text == CHESS.probe.question] == list(
            plan.probes
        )
        assert len(plan.probes) == 1 and plan.probes[0] > 0
    both = gatt.make_plan(random.Random(0), [CHESS, FRENCH], turns=9, probes=True)
    assert {both.questions[t].text for t in both.probes} == {
        CHESS.probe.question,
        FRENCH.probe.question,
    }
    assert gatt.make_plan(random.Random(0), [CHESS, FRENCH], turns=2, probes=True).probes == (1,)


def test_late_turns_are_asked_at_in_proportion_to_their_number():
    """Weights 1, 2, 3: the third turn after the first half of the time, to three sigmas."""
    at = Counter(plan_of(seed, turns=4, probes=True).probes for seed in range(600))
    assert [abs(at[(t,)] / 600 - t / 6) < 0.06 for t in (1, 2, 3)] == [True] * 3


def test_what_was_never_told_is_asked_for_too_and_must_be_denied():
    plan = gatt.make_plan(random.Random(0), (), turns=9, probes=True)
    assert len(plan.probes) == 2
    for t in plan.probes:
        assert plan.good(t, plan.questions[t].value) and not plan.good(t, "My hobby is chess.")


def test_rows_are_cut_at_every_probe():
    plan = gatt.make_plan(random.Random(0), [CHESS, FRENCH], turns=20, probes=True)
    sample = gatt.Sample(plan, ("R.",) * 20, (True,) * 20)
    for seed in range(20):
        rows = gatt.make_rows([sample], per_dialogue=3, seed=seed)
        cuts = {len(row["prompt"]) // 2 for row in rows}
        assert len(rows) == len(cuts) == 3 and set(plan.probes) < cuts
    assert len(gatt.make_rows([sample], per_dialogue=1)) == 1


# Sampling


class Scripted(gatt.BatchedChat):
    """Candidates by script; records which rows were kept."""

    script: ClassVar[list] = []
    kept: ClassVar[list] = []

    def start(self, rows):
        pass

    def select(self, rows):
        self.kept.append(list(rows))

    def reply(self, messages, **_):
        return self.script.pop(0)


def test_the_best_candidate_goes_on_by_verifier_then_by_reward(monkeypatch):
    """Two dialogues, K = 3: verified before unverified, then reward, then the first."""
    plain, short, long = "No.", "I love chess.", "Yes, yes. I love chess."
    Scripted.script = [
        [plain, short, long, long, plain, short],
        [plain, plain, plain, short, long, long],
    ]
    Scripted.kept = []
    monkeypatch.setattr(gatt, "BatchedChat", Scripted)
    tokenizer = type("T", (), {})()
    monkeypatch.setattr(gatt, "check_template", lambda _: None)
    plan = gatt.Plan((CHESS,), "Hobby: chess.", questions("A?", "B?"))
    found = gatt.sample_dialogues(
        None,
        tokenizer,
        [plan, plan],
        candidates=3,
        reward=lambda _, text: len(text),
    )
    assert [s.replies for s in found] == [(long, plain), (long, long)]
    assert [s.good for s in found] == [(True, False), (True, True)]
    assert Scripted.kept == [[2, 2, 2, 3, 3, 3]]


def test_a_torn_samples_file_goes_on_and_ends_the_same(tiny, tmp_path):
    """Cut in the middle of a line, as a kill does: at most that line is made again."""
    plans = [plan_of(seed, turns=2) for seed in range(5)]
    options = {"candidates": 2, "batch": 2}
    whole = gatt.sample_dialogues(*tiny, plans, out=tmp_path / "a.jsonl", **options)
    text = (tmp_path / "a.jsonl").read_bytes()
    assert len(whole) == 5 and gatt.read_samples(tmp_path / "a.jsonl") == whole
    for cut in (len(text) - 40, text.index(b"\n") + 30, 20):
        (tmp_path / "b.jsonl").write_bytes(text[:cut])
        assert gatt.sample_dialogues(*tiny, plans, out=tmp_path / "b.jsonl", **options) == whole
        assert (tmp_path / "b.jsonl").read_bytes() == text


def test_complete_lines_are_not_sampled_again(tiny, tmp_path, monkeypatch):
    plans = [plan_of(seed, turns=2) for seed in range(4)]
    options = {"candidates": 1, "batch": 2, "out": tmp_path / "a.jsonl"}
    gatt.sample_dialogues(*tiny, plans, **options)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:3]))
    batches = []
    inner = gatt._sample_batch
    monkeypatch.setattr(gatt, "_sample_batch", lambda *a: batches.append(a[1]) or inner(*a))
    gatt.sample_dialogues(*tiny, plans, **options)
    assert batches == [plans[2:]]


def test_a_complete_file_is_only_read(tiny, tmp_path, monkeypatch):
    plans = [plan_of(seed, turns=1) for seed in range(3)]
    options = {"candidates": 1, "batch": 2, "out": tmp_path / "a.jsonl"}
    whole = gatt.sample_dialogues(*tiny, plans, **options)
    monkeypatch.setattr(gatt, "_sample_batch", lambda *_: pytest.fail("sampled again"))
    assert gatt.sample_dialogues(*tiny, plans, **options) == whole


def test_a_samples_file_of_other_parameters_is_refused(tiny, tmp_path):
    options = {"out": tmp_path / "a.jsonl"}
    gatt.sample_dialogues(*tiny, [plan_of(turns=1)], candidates=1, **options)
    with pytest.raises(ValueError, match="sampled with"):
        gatt.sample_dialogues(*tiny, [plan_of(turns=1)], candidates=2, **options)


# The kept cache


def test_a_kept_cache_gives_the_replies_of_fresh_prompts(tiny):
    """Rows of other lengths, a fork, a reply that is replaced, a selection: all as from scratch."""
    users = [
        ["Where does Anna Adler live?", "Hi."],
        ["Hobby: chess. Which pet does Leon Lindt have?", "Ok?"],
    ]
    talk, rows = BatchedChat(*tiny), [[Message("user", u[0])] for u in users]
    texts = talk.reply(rows)
    assert texts == reply(*tiny, rows)
    forced = [
        [*row, Message("assistant", "Oslo, of course."), Message("user", u[1])]
        for row, u in zip(rows, users, strict=True)
    ]
    fork = [
        [*row, Message("assistant", t), Message("user", "What is your hobby?")]
        for row, t in zip(rows, texts, strict=True)
    ]
    assert talk.reply(fork) == reply(*tiny, fork)
    assert talk.reply(forced) == reply(*tiny, forced)
    talk.select([1, 0, 1])
    swapped = [
        [*forced[i], Message("assistant", "Hm."), Message("user", users[0][0])] for i in (1, 0, 1)
    ]
    assert talk.reply(swapped) == reply(*tiny, swapped)


def test_what_the_cache_holds_is_not_read_again(tiny, monkeypatch):
    model, tokenizer = tiny
    read = []
    inner = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: read.append(k["input_ids"].numel()) or inner(*a, **k)
    )
    users = [["Where does Anna Adler live?"] * 4]
    replies = chat_batch(model, tokenizer, users)[0]
    messages = [
        m
        for u, r in zip(users[0], replies, strict=True)
        for m in (Message("user", u), Message("assistant", r))
    ]
    assert sum(read) <= len(dialogue_ids(tokenizer, messages)) + len(users[0])


def test_sampling_draws_from_torchs_generator_and_restores_it(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plans = [plan_of(turns=1)]
    a = gatt.sample_dialogues(*tiny, plans, candidates=2, temperature=3.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert a == gatt.sample_dialogues(*tiny, plans, candidates=2, temperature=3.0, seed=1)
    assert a != gatt.sample_dialogues(*tiny, plans, candidates=2, temperature=3.0, seed=2)


# Measurements


def test_survival_and_forgetting_on_a_worked_example():
    rows = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0.0]])
    assert gatt_eval.survival(rows).tolist() == [3, 5, 1, 2]
    assert gatt_eval.forgetting(rows).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2])


def test_adherence_of_the_models_own_dialogue_is_what_play_says(tiny):
    plans = [plan_of(seed, turns=3, family=f) for seed, f in enumerate(("hobby", "emoji", "json"))]
    found = gatt_eval.adherence_by_turn(*tiny, plans, probe_turns=[2], batch=2)
    replies = chat_batch(*tiny, [[p.message(t, every=False) for t in range(3)] for p in plans])
    assert found.replies == replies
    obeyed = [
        [float(p.constraints[0].obeyed(r)) for r in row]
        for p, row in zip(plans, replies, strict=True)
    ]
    assert found.obeyed.tolist() == obeyed
    assert found.recalled.isnan().squeeze(1).tolist() == [False, False, True]
    for i in (0, 1):
        c = plans[i].constraints[0]
        fork = [
            Message("user", plans[i].message(0, every=False)),
            Message("assistant", replies[i][0]),
            Message("user", c.probe.question),
        ]
        assert found.recalled[i, 0] == float(c.recalled(reply(*tiny, [fork])[0]))


def test_a_forced_history_is_what_the_model_reads(tiny):
    """With a history that obeys, the base obeys longer: the reply follows what was forced."""
    plans = [plan_of(seed, turns=2, family="hobby") for seed in range(4)]
    for forced in (gatt_eval.neutral, gatt_eval.competing):
        found = gatt_eval.adherence_by_turn(*tiny, plans, forced=forced)
        rows = [
            [
                Message("user", p.message(0, every=False)),
                Message("assistant", forced(p, 0)),
                Message("user", p.message(1, every=False)),
            ]
            for p in plans
        ]
        assert [r[1] for r in found.replies] == reply(*tiny, rows)
    p = plans[0]
    assert p.right(0, gatt_eval.neutral(p, 0)) and not p.constraints[0].obeyed(
        gatt_eval.neutral(p, 0)
    )
    rivals = [Constraint("hobby", v) for v in values("hobby") if v != p.constraints[0].value]
    assert sum(c.obeyed(gatt_eval.competing(p, 0)) for c in rivals) == 1


def test_the_divergence_from_the_teacher_is_the_sum_over_the_vocabulary(tiny):
    """Zero at turn 1, where both read the same; later equal to a loop over single prompts."""
    model, tokenizer = tiny
    s = gatt.sample_dialogues(*tiny, [plan_of(turns=2)], candidates=1)[0]
    found = gatt_eval.teacher_kl(model, model, tokenizer, [s])
    assert found.shape == (1, 2) and found[0, 0] == pytest.approx(0, abs=1e-5)
    ids = tokenizer(s.replies[1], add_special_tokens=False)["input_ids"]
    total = 0.0
    for k in range(len(ids)):
        p, q = (
            model(torch.tensor([prompt_ids(tokenizer, gatt.history(s, 1, every=e)) + ids[:k]]))
            .logits[0, -1]
            .double()
            .softmax(-1)
            for e in (True, False)
        )
        total += (p * (p / q).log()).sum().item()
    assert found[0, 1].item() == pytest.approx(total / len(ids), rel=1e-3)


def test_the_base_names_no_hobby_and_obeys_nothing_without_instruction(tiny):
    assert gatt_eval.leak(*tiny, turns=2, n=8).mean() == 0
    assert gatt_eval.untold(*tiny, n=2).mean() >= 0.8


def test_stored_histories_are_joined_over_seeds():
    """Two seeds of two dialogues each: the mean over all four, by turn."""
    cells = {"seen": {"family": ["hobby"] * 2, "obeyed": ["11", "10"]}}
    records = [
        {"arm": "gatt", "cells": cells, "neutral": rows, "competing": ["00", "00"]}
        for rows in (["10", "10"], ["11", "01"])
    ]
    found = gatt_arms.histories(records, "gatt")
    means = {name: curve[0].tolist() for name, curve in found.items()}
    assert means == {
        "own history": [1, 0.5],
        "neutral history": [0.75, 0.5],
        "competing history": [0, 0],
    }


# Bad input


def test_a_tokenizer_without_a_chat_template_is_refused(tiny, tmp_path):
    from copy import deepcopy

    bare = deepcopy(tiny[1])
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: take a chat model"):
        gatt.sample_dialogues(tiny[0], bare, [plan_of(turns=1)])


def test_a_template_with_a_system_text_of_its_own_is_refused_and_quoted(tiny):
    from copy import deepcopy

    wordy = deepcopy(tiny[1])
    wordy.chat_template = "<|system|>You are a helpful assistant.<|end|>" + wordy.chat_template
    with pytest.raises(ValueError, match=r"text of its own .*You are a helpful assistant"):
        check_template(wordy)
    check_template(tiny[1])


def test_the_plain_template_adds_no_word_of_its_own(tiny):
    from copy import deepcopy

    plain = deepcopy(tiny[1])
    plain.chat_template = CHATML
    check_template(plain)
    rows = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    text = plain.apply_chat_template(rows, tokenize=False)
    assert text == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
    opened = plain.apply_chat_template(rows[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["user", "user"], "messages 0 and 1 are both the user's"),
        (["user", "assistant", "assistant"], "messages 1 and 2 are both the assistant's"),
        (["assistant"], "no user message"),
        ([], "no user message"),
    ],
)
def test_a_dialogue_out_of_turn_is_refused(roles, message):
    with pytest.raises(ValueError, match=message):
        gatt.dialogue_plan([Message(role, "x") for role in roles], [CHESS], "Hobby: chess.")


def test_a_dialogue_of_ones_own_becomes_a_plan():
    messages = [Message("user", "A?"), Message("assistant", "B."), Message("user", "C?")]
    plan = gatt.dialogue_plan(messages, [CHESS], "Hobby: chess.")
    assert [q.text for q in plan.questions] == ["A?", "C?"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gatt.Plan((CHESS,), " ", questions("Q?")), "the instruction is empty"),
        (lambda: gatt.Plan((CHESS,), "Hobby: chess.", ()), "without a user message"),
        (
            lambda: gatt.Plan(
                (Constraint("json", ""), Constraint("capitals", "")), "x", questions("Q?")
            ),
            "contradict each other",
        ),
        (
            lambda: gatt.sample_dialogues(None, None, [], candidates=0),
            "candidates=0: expected at least 1",
        ),
    ],
)
def test_bad_input_gets_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_model_names_its_own_values(tiny, monkeypatch):
    monkeypatch.setattr(BatchedChat, "reply", lambda *_, **__: ["1. Chess\n2. Go", "Go, Tennis"])
    assert gatt.own_values(*tiny, "hobbies", n=3, rounds=2) == ["Chess", "Go", "Tennis"]
