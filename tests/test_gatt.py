"""Ghost Attention's data and measurements: which words stand where, which reply is chosen."""

import random
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from steerkit.chat import CHATML, BatchedChat, Message, check_template, reply
from steerkit.constraints import FAMILIES, Constraint, values
from steerkit.gatt import dialogues as gatt
from steerkit.gatt.evaluation import adherence_by_turn, forgetting, survival
from steerkit.tiny import gatt as tiny_gatt
from steerkit.tiny.world import fact_question

FRENCH = Constraint("language", "French")
CHESS = Constraint("hobby", "chess")


def plan_of(seed=0, turns=4, family="hobby", **options):
    rng = random.Random(seed)
    constraints = tiny_gatt.draw_constraints(rng, families=[family])
    return tiny_gatt.make_plan(rng, constraints, turns=turns, **options)


def a_sample(turns=4, verified=None):
    plan = gatt.Plan((CHESS,), "Hobby: chess.", tuple(f"Q{t}?" for t in range(turns)))
    replies = tuple(f"R{t}. I love chess." for t in range(turns))
    return gatt.Sample(plan, replies, tuple(verified or [True] * turns))


# Plans


def test_the_instruction_leads_every_message_or_the_first_one_only():
    plan = a_sample(2).plan
    every, once = ([plan.message(t, every=e) for t in range(2)] for e in (True, False))
    assert every == ["Hobby: chess. Q0?", "Hobby: chess. Q1?"]
    assert once == ["Hobby: chess. Q0?", "Q1?"]


def test_values_held_out_are_a_quarter_and_never_drawn():
    rng = random.Random(0)
    for family in FAMILIES:
        seen, held_out = tiny_gatt.split_values(family)
        assert sorted(seen + held_out) == sorted(values(family))
        assert len(held_out) == len(values(family)) // 4
        drawn = [tiny_gatt.draw_constraints(rng, families=[family])[0] for _ in range(100)]
        assert {c.value for c in drawn} <= set(seen)
    drawn = [tiny_gatt.draw_constraints(rng, held_out=True, numbers=[1])[0] for _ in range(300)]
    pools = {(f, v) for f in FAMILIES for v in tiny_gatt.split_values(f)[1]}
    assert {(c.family, c.value) for c in drawn} == pools


def test_training_plans_give_no_instruction_away():
    """Every family asks for sentences to be repeated; no value is commoner than another."""
    plans = tiny_gatt.training_plans(0)
    repeats = [p for p in plans if "Repeat:" in str(p.questions[1:])]
    assert {c.family for p in repeats for c in p.constraints} == set(FAMILIES)
    assert any(not p.constraints for p in repeats)
    counts = Counter(c for p in plans for c in p.constraints)
    for family in FAMILIES:
        seen = [counts[Constraint(family, v)] for v in tiny_gatt.split_values(family)[0]]
        assert max(seen) - min(seen) <= 1
    short = Counter(
        p.instruction == p.constraints[0].short for p in plans if len(p.constraints) == 1
    )
    assert 0.3 < short[True] / short.total() < 0.7  # appendix A.3.5: half of them in short form


def test_a_probe_is_verified_by_what_is_recalled():
    users = ("Q?", CHESS.probe.question)
    plan = gatt.Plan((CHESS, FRENCH), "Hobby: chess.", users, probes=(1,))
    assert plan.verified(1, "My hobby is chess.") and not plan.verified(1, "I speak French.")
    assert not plan.verified(0, "My hobby is chess.")


def test_each_instruction_is_asked_for_once_rather_late_and_never_at_first():
    """Turns 2, 3, 4 in proportion to 1, 2, 3, to three sigmas."""
    plans = [plan_of(seed, turns=4, probes=True) for seed in range(600)]
    for plan in plans:
        asked = [t for t, q in enumerate(plan.questions) if q.text == CHESS.probe.question]
        assert tuple(asked) == plan.probes and len(asked) == 1
    at = Counter(plan.probes[0] for plan in plans)
    assert [abs(at[t] / 600 - t / 6) < 0.06 for t in range(4)] == [True] * 4
    both = tiny_gatt.make_plan(random.Random(0), [CHESS, FRENCH], turns=9, probes=True)
    asked = {both.questions[t].text for t in both.probes}
    assert asked == {CHESS.probe.question, FRENCH.probe.question}


def test_an_instruction_that_was_never_stated_is_asked_for_and_must_be_denied():
    plan = tiny_gatt.make_plan(random.Random(0), (), turns=9, probes=True)
    assert len(plan.probes) == 2
    for t in plan.probes:
        assert plan.verified(t, plan.questions[t].value)
        assert not plan.verified(t, "My hobby is chess.")


# Training data


def test_a_row_is_the_history_with_one_instruction_and_the_last_reply():
    rows = gatt.make_rows([a_sample()], per_dialogue=3)
    assert sorted(len(row["prompt"]) for row in rows) == [3, 5, 7]
    for row in rows:
        t = len(row["prompt"]) // 2
        texts = [m["content"] for m in row["prompt"]]
        plain = [x for k in range(t) for x in (f"Q{k}?", f"R{k}. I love chess.")] + [f"Q{t}?"]
        assert texts == ["Hobby: chess. " + plain[0], *plain[1:]]
        assert row["completion"] == [{"role": "assistant", "content": f"R{t}. I love chess."}]


def test_only_verified_replies_are_taught_and_the_other_arm_has_the_same_dialogues():
    rows = gatt.make_rows([a_sample(verified=[True, False, True, False])], per_dialogue=9)
    assert [len(row["prompt"]) for row in rows] == [5]
    whole = rows[0]["prompt"] + rows[0]["completion"]
    assert gatt.make_all_turns_rows(rows) == [{"messages": whole}]


def test_rows_are_cut_at_every_probe():
    plan = tiny_gatt.make_plan(random.Random(0), [CHESS, FRENCH], turns=20, probes=True)
    sample = gatt.Sample(plan, ("R.",) * 20, (True,) * 20)
    for seed in range(20):
        cuts = [len(r["prompt"]) // 2 for r in gatt.make_rows([sample], per_dialogue=3, seed=seed)]
        assert len(set(cuts)) == 3 and set(plan.probes) < set(cuts)


def test_pairs_reject_what_the_model_said_and_failed(tiny):
    """Chosen obeys, rejected does not; without an instruction rejected obeys a slipped one."""
    instructed = [plan_of(seed, turns=5, family="emoji") for seed in range(2)]
    ask = lambda rng, _: fact_question(rng)  # noqa: E731
    quiet = tiny_gatt.make_plan(random.Random(0), (), turns=5, ask=ask)
    samples = gatt.sample_dialogues(*tiny, [*instructed, quiet], candidates=1)
    pairs = gatt.make_pairs(*tiny, samples, first=0, per_dialogue=5)
    plans = {s.plan.message(0, every=False): s.plan for s in samples}
    counts = Counter()
    for row in pairs:
        plan, t = plans[row["prompt"][0]["content"]], len(row["prompt"]) // 2
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert plan.verified(t, chosen)
        slipped = any(p.constraints[0].obeyed(rejected) for p in instructed)
        assert slipped if plan is quiet else not plan.verified(t, rejected)
        counts[plan is quiet] += 1
    assert counts[True] == 5 and 2 <= counts[False] <= 8  # at turn 1 the base does not fail


def test_an_instruction_that_no_verifier_knows_is_an_instruction(tiny, monkeypatch):
    """Nothing is slipped into a dialogue that has one, nor where there is none to slip in."""
    told = a_sample()._replace(plan=replace(a_sample().plan, constraints=()))
    quiet = told._replace(plan=replace(told.plan, instruction=""))
    asked = []

    def no(model, tokenizer, dialogues, **_):
        asked.append({m[-1].content for m in dialogues})
        return ["No."] * len(dialogues)

    monkeypatch.setattr(gatt, "reply", no)
    for samples in ([told], [quiet], [told, quiet]):
        gatt.make_pairs(*tiny, samples, first=1, per_dialogue=3)
    plain, slipped = {"Q1?", "Q2?", "Q3?"}, {f"Hobby: chess. Q{t}?" for t in (1, 2, 3)}
    assert asked == [plain, plain, plain | slipped]


# Rejection sampling


def test_the_best_candidate_goes_on_by_verifier_then_by_reward(tiny, monkeypatch):
    """Two dialogues, K = 3: verified before unverified, then the higher reward, then the first."""
    plain, short, long = "No.", "I love chess.", "Yes, yes. I love chess."
    script = [[plain, short, long, long, plain, short], [plain, plain, plain, short, long, long]]
    selected = []
    monkeypatch.setattr(BatchedChat, "select", lambda _, chosen: selected.append(chosen))
    monkeypatch.setattr(BatchedChat, "reply", lambda *_, **__: script.pop(0))
    plan = gatt.Plan((CHESS,), "Hobby: chess.", ("A?", "B?"))
    options = {"candidates": 3, "reward": lambda _, text: len(text)}
    samples = gatt.sample_dialogues(*tiny, [plan, plan], **options)
    assert [s.replies for s in samples] == [(long, plain), (long, long)]
    assert [s.verified for s in samples] == [(True, False), (True, True)]
    assert selected == [[2, 2, 2, 3, 3, 3]]


def test_another_model_gives_other_samples(tiny, tmp_path, monkeypatch):
    """Nothing is read back from an earlier run, of this model or another."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(turns=1)
    first = gatt.sample_dialogues(*tiny, [plan], candidates=1)
    monkeypatch.setattr(BatchedChat, "reply", lambda *_, **__: ["Another model."])
    again = gatt.sample_dialogues(*tiny, [plan], candidates=1)
    assert again[0].replies == ("Another model.",) != first[0].replies
    assert not list(tmp_path.iterdir())


def test_sampling_depends_on_the_seed_alone_and_restores_torchs_generator(tiny):
    before = torch.get_rng_state()
    first, again, other = (
        gatt.sample_dialogues(*tiny, [plan_of(turns=1)], temperature=3.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state()) and first == again != other


# Measurements


def test_survival_and_forgetting_on_a_worked_example():
    """The last dialogue ended after two turns, and had obeyed till then."""
    nan = torch.nan
    obeyed = torch.tensor(
        [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, nan, nan]]
    )
    assert survival(obeyed).tolist() == [3, 5, 1, 2, 3]
    assert forgetting(obeyed).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_dialogues_of_unequal_length_are_measured_as_each_alone(tiny, order):
    """Own dialogues never have one length: NaN stands after the end, and no turn is lost."""
    plans = [plan_of(n, turns=n, family=f) for n, f in ((1, "hobby"), (2, "json"), (4, "emoji"))]
    plans = [plans[i] for i in order]
    options = {"probe_turns": [1, 3]}
    together = adherence_by_turn(*tiny, plans, batch=2, **options)
    assert together.obeyed.shape == together.right.shape == together.recalled.shape == (3, 4)
    for i, plan in enumerate(plans):
        alone, turns = adherence_by_turn(*tiny, [plan], **options), len(plan.questions)
        assert together.replies[i] == alone.replies[0] and len(alone.replies[0]) == turns
        for name in ("obeyed", "right", "recalled"):
            whole = getattr(together, name)[i]
            torch.testing.assert_close(whole[:turns], getattr(alone, name)[0], equal_nan=True)
            assert whole[turns:].isnan().all()


def test_adherence_of_the_models_own_dialogue(tiny):
    """Each reply follows the one before; the probe is asked on a fork that is thrown away."""
    plans = [plan_of(seed, turns=3, family=f) for seed, f in enumerate(("hobby", "emoji", "json"))]
    measured = adherence_by_turn(*tiny, plans, probe_turns=[2], batch=2)
    users = [[p.message(t, every=False) for t in range(3)] for p in plans]
    dialogues: list[list[Message]] = [[] for _ in plans]
    for t in range(3):
        for messages, texts in zip(dialogues, users, strict=True):
            messages.append(Message("user", texts[t]))
        for messages, text in zip(dialogues, reply(*tiny, dialogues), strict=True):
            messages.append(Message("assistant", text))
    assert measured.replies == [[m.content for m in messages[1::2]] for messages in dialogues]
    for plan, obeyed, texts in zip(plans, measured.obeyed, measured.replies, strict=True):
        assert obeyed.tolist() == [plan.constraints[0].obeyed(text) for text in texts]
    asked = measured.recalled[:, 1]
    assert asked.isnan().tolist() == [False, False, True]  # json has no probe
    assert measured.recalled[:, [0, 2]].isnan().all()
    for i in (0, 1):
        constraint = plans[i].constraints[0]
        fork = [Message("user", users[i][0]), Message("assistant", measured.replies[i][0])]
        fork.append(Message("user", constraint.probe.question))
        assert asked[i] == float(constraint.recalled(reply(*tiny, [fork])[0]))


@pytest.mark.parametrize("forced", [tiny_gatt.neutral, tiny_gatt.competing])
def test_a_forced_history_is_what_the_model_reads(tiny, monkeypatch, forced):
    """The model's own reply is judged, and then replaced."""
    plan, read = plan_of(turns=2), []

    def record(_, dialogues, **__):
        read.append([m.content for m in dialogues[0]])
        return ["Its own."]

    monkeypatch.setattr(BatchedChat, "reply", record)
    assert adherence_by_turn(*tiny, [plan], forced=forced).replies == [["Its own."] * 2]
    text, (mine,) = forced(plan, 0), plan.constraints
    assert read[1] == [plan.message(0, every=False), text, plan.message(1, every=False)]
    rivals = [Constraint("hobby", v) for v in values("hobby") if v != mine.value]
    assert plan.right(0, text) and not mine.obeyed(text)
    assert sum(c.obeyed(text) for c in rivals) == (forced is tiny_gatt.competing)


def test_judged_replies_come_back_by_dialogue(tiny):
    """One line a reply, and the tensors again; without the dialogues that have no probe."""
    plans = [plan_of(seed, turns=2, family=f) for seed, f in enumerate(("hobby", "json"))]
    measured = adherence_by_turn(*tiny, plans, probe_turns=[2])
    table = tiny_gatt.judged(plans, measured).assign(split="seen", seed=3)
    assert list(table["family"]) == ["hobby", "hobby", "json", "json"]
    assert torch.equal(tiny_gatt.by_dialogue(table).float(), measured.obeyed)
    assert tiny_gatt.by_dialogue(table, "recalled").tolist() == [[measured.recalled[0, 1]]]


# Bad input


def with_template(tokenizer, template):
    other = deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_template_that_instructs_is_refused_and_quoted(tiny):
    own = "<|system|>You are a helpful assistant.<|end|>" + tiny[1].chat_template
    with pytest.raises(ValueError, match=r"text of its own .*You are a helpful assistant"):
        check_template(with_template(tiny[1], own))
    with pytest.raises(ValueError, match="no chat template: take a chat model"):
        gatt.sample_dialogues(tiny[0], with_template(tiny[1], None), [plan_of(turns=1)])
    check_template(tiny[1])
    plain = with_template(tiny[1], CHATML)
    check_template(plain)
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    text = plain.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gatt.Plan((CHESS,), " ", ("Q?",)), "the instruction is empty"),
        (lambda: gatt.Plan((CHESS,), "Hobby: chess.", ()), "without a user message"),
        (
            lambda: gatt.Plan((Constraint("json", ""), Constraint("capitals", "")), "x", ("Q?",)),
            "contradict each other",
        ),
        (lambda: gatt.sample_dialogues(None, None, [], candidates=0), "candidates=0: expected at"),
    ],
)
def test_bad_input_gets_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
