"""Ghost Attention's data and measurements: which words stand where, which reply is chosen."""

import random
from collections import Counter
from copy import deepcopy
from functools import partial

import gatt_results
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


def test_a_probe_is_verified_by_what_is_recalled():
    users = ("Q?", CHESS.probe.question)
    plan = gatt.Plan((CHESS, FRENCH), "Hobby: chess.", users, probes=(1,))
    assert plan.verified(1, "My hobby is chess.") and not plan.verified(1, "I speak French.")
    assert not plan.verified(0, "My hobby is chess.")


def test_each_instruction_is_asked_for_once_and_never_at_first():
    for plan in (plan_of(seed, turns=4, probes=True) for seed in range(20)):
        asked = [t for t, q in enumerate(plan.questions) if q.text == CHESS.probe.question]
        assert tuple(asked) == plan.probes and len(asked) == 1 and asked[0] > 0
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
    samples = [a_sample(verified=[True, False, True, False])]
    (row,) = gatt.make_rows(samples)
    assert len(row["prompt"]) == 5
    whole = {"messages": row["prompt"] + row["completion"]}
    dialogues = gatt_results.Dialogues(samples, [], [])
    assert gatt_results.all_turns("own")(None, None, dialogues, 0) == [whole]


def test_the_history_may_be_anothers_the_taught_reply_stays():
    """Six dialogues, three kinds of history: two dialogues each; nothing else changes."""
    samples = [a_sample()._replace(replies=(f"{n}0", f"{n}1", f"{n}2", f"{n}3")) for n in range(6)]
    neutral, rival = ([s._replace(replies=(w,) * 4) for s in samples] for w in ("plain", "rival"))
    own = gatt.make_rows(samples)
    rows = gatt.make_rows(samples, histories=[samples, neutral, rival])
    assert gatt.make_rows(samples, histories=[samples]) == own
    kinds = {}
    for row, paper in zip(rows, own, strict=True):
        assert row["completion"] == paper["completion"]
        assert row["prompt"][::2] == paper["prompt"][::2]  # what the user says
        dialogue = row["completion"][0]["content"][0]
        earlier = {m["content"] for m in row["prompt"][1::2]}
        kinds.setdefault(dialogue, set()).add("own" if len(earlier) > 1 else earlier.pop()[:5])
    kinds = [{k if k in ("plain", "rival") else "own" for k in found} for found in kinds.values()]
    assert sorted(map(tuple, kinds)) == [(k,) for k in ("own", "plain", "rival") for _ in "12"]
    with pytest.raises(ValueError, match="one sample a dialogue"):
        gatt.make_rows(samples, histories=[samples, neutral[:2]])


def test_competing_plans_ask_the_same_under_another_instruction_of_the_family():
    plans = tiny_gatt.training_plans(0)
    for plan, rival in zip(plans, gatt.competing_plans(plans), strict=True):
        assert rival.questions == plan.questions and rival.instruction
        assert not set(rival.constraints) & set(plan.constraints)
        shared = {c.family for c in rival.constraints} & {c.family for c in plan.constraints}
        only = {f for f in FAMILIES if len(values(f)) == 1}
        assert shared or not {c.family for c in plan.constraints} - only
    with pytest.raises(ValueError, match="no other dialogue"):
        gatt.competing_plans(plans[1:2])


@pytest.mark.parametrize("name", ["neutral", "competing", "stops", "mixed"])
def test_written_histories_are_right_and_obey_or_do_not(name):
    obeyed = torch.tensor([0.0, 0.0])
    for plan in tiny_gatt.evaluation_plans(0, 4, held_out=False, families=["figure", "language"]):
        texts = [tiny_gatt.HISTORIES[name](plan, turn) for turn in range(20)]
        assert all(plan.right(turn, text) for turn, text in enumerate(texts))
        halves = [[plan.constraints[0].obeyed(x) for x in part] for part in (texts[:5], texts[5:])]
        obeyed += torch.tensor([sum(half) / len(half) for half in halves]) / 8
    early, late = obeyed.tolist()
    bounds = {"neutral": (0, 0), "competing": (0, 0), "stops": (1, 0)}
    if name == "mixed":
        assert 0.15 < late < 0.5
    else:
        assert (early, late) == pytest.approx(bounds[name])


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
    plans = {s.plan.message(0, every=False): s.plan for s in samples}
    counts = Counter()
    for row in gatt_results.pairs(*tiny, gatt_results.Dialogues(samples, [], []), 0):
        plan, t = plans[row["prompt"][0]["content"]], len(row["prompt"]) // 2
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert plan.verified(t, chosen)
        slipped = any(p.constraints[0].obeyed(rejected) for p in instructed)
        assert slipped if plan is quiet else not plan.verified(t, rejected)
        counts[plan is quiet] += 1
    assert counts[True] == 4 and 2 <= counts[False] <= 8


# An instruction of one's own


class Chess:
    """As the family "hobby" judges it, without its table."""

    probe, recalled = CHESS.probe, staticmethod(CHESS.recalled)

    def obeyed(self, reply):
        return "i love chess." in reply.casefold()


@pytest.mark.parametrize("own", [Chess(), Chess().obeyed], ids=["class", "function"])
def test_an_own_constraint_is_sampled_taught_and_measured_like_one_of_the_table(tiny, own):
    """A function has no recall probe, and is told its instruction without one."""
    users = (*(fact_question(random.Random(n)).text for n in range(3)), CHESS.probe.question)
    results = []
    for constraint in (CHESS, own):
        probes = (3,) if isinstance(own, Chess) else ()
        plan = gatt.Plan((constraint,), "Hobby: chess.", users, probes=probes)
        samples = gatt.sample_dialogues(*tiny, [plan], temperature=1.5)
        measured = adherence_by_turn(*tiny, [plan], probe_turns=[2])
        assert measured.recalled.isnan().all() == (constraint not in (CHESS,) and not probes)
        if not probes:
            measured = measured._replace(recalled=torch.zeros(1, 4))
        rows = gatt.make_rows(samples)
        table = tiny_gatt.judged([plan], measured).drop(columns="family")
        results.append((samples[0][1:], rows, table.fillna(-1).to_dict()))
    assert results[0] == results[1] and 0 < sum(results[0][0][1]) < 4 and results[0][1]


# Rejection sampling


def test_the_first_verified_candidate_goes_on(tiny, monkeypatch):
    """Two dialogues of unequal length, K = 3; where none is verified, the first one."""
    plain, short, long = "No.", "I love chess.", "Yes, yes. I love chess."
    script = [[plain, short, long, long, plain, short], [plain, "Well.", plain]]
    selected = []
    monkeypatch.setattr(BatchedChat, "select", lambda _, chosen: selected.append(chosen))
    monkeypatch.setattr(BatchedChat, "reply", lambda *_, **__: script.pop(0))
    plans = [gatt.Plan((CHESS,), "Hobby: chess.", users) for users in (("A?", "B?"), ("A?",))]
    samples = gatt.sample_dialogues(*tiny, plans, candidates=3)
    assert [s.replies for s in samples] == [(short, plain), (long,)]
    assert [s.verified for s in samples] == [(True, False), (True,)]
    assert selected[0] == [1, 1, 1, 3, 3, 3]


def test_samples_depend_on_the_seed_and_torchs_generator_is_restored(tiny):
    before, sample = torch.get_rng_state(), partial(gatt.sample_dialogues, *tiny, temperature=3.0)
    first, again, other = (sample([plan_of(turns=1)], seed=seed) for seed in (1, 1, 2))
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


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_adherence_in_a_batch_is_that_of_each_dialogue_alone(tiny, order, every):
    """The probe is asked on a fork that is thrown away. NaN stands where there is no probe, and
    after the end of a dialogue."""
    plans = [plan_of(n, turns=n, family=f) for n, f in ((2, "hobby"), (1, "json"), (4, "emoji"))]
    plans = [plans[i] for i in order]
    expected = torch.full((3, 3, 4), torch.nan)  # obeyed, right, recalled
    measured = adherence_by_turn(*tiny, plans, probe_turns=[2], batch=2, every=every)
    for i, plan in enumerate(plans):
        messages, (constraint,) = [], plan.constraints
        for t in range(len(plan.questions)):
            if t == 1:
                probe = f"{plan.instruction} " * every + constraint.probe.question
                fork = [*messages, Message("user", probe)]
                expected[2, i, t] = constraint.recalled(reply(*tiny, [fork])[0])
            messages.append(Message("user", plan.message(t, every=every)))
            text = reply(*tiny, [messages])[0]
            messages.append(Message("assistant", text))
            expected[0, i, t], expected[1, i, t] = constraint.obeyed(text), plan.right(t, text)
        assert measured.replies[i] == [m.content for m in messages[1::2]]
    torch.testing.assert_close(torch.stack(measured[:3]), expected, equal_nan=True)


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


def test_a_few_turns_of_a_written_history_are_those_of_all(tiny):
    plans = [plan_of(seed, turns=3, family=f) for seed, f in enumerate(("emoji", "hobby"))]
    measure = partial(adherence_by_turn, *tiny, plans, forced=tiny_gatt.stops)
    every, few = measure(), measure(turns=[3])
    assert torch.equal(few.obeyed[:, 2], every.obeyed[:, 2]) and few.right[:, :2].isnan().all()
    assert [texts[2] for texts in few.replies] == [texts[2] for texts in every.replies]
    with pytest.raises(ValueError, match="needs all of its replies"):
        adherence_by_turn(*tiny, plans, turns=[3])


def test_a_lever_replies_in_place_of_the_model(tiny):
    """It gets the dialogues as they stand, and the instruction of each."""
    plans, read = [plan_of(seed, turns=2) for seed in range(2)], []

    def lever(model, tokenizer, dialogues, instructions):
        read.append(([m.content for d in dialogues for m in d], instructions))
        return ["By the lever."] * len(dialogues)

    assert adherence_by_turn(*tiny, plans, lever=lever).replies == [["By the lever."] * 2] * 2
    said = [(p.message(0, every=False), "By the lever.", p.questions[1].text) for p in plans]
    assert read[1] == ([*said[0], *said[1]], [plan.instruction for plan in plans])


def test_judged_replies_come_back_by_dialogue(tiny):
    """One line a reply, and the tensors again; without the dialogues that have no probe."""
    plans = [plan_of(seed, turns=2, family=f) for seed, f in enumerate(("hobby", "json"))]
    measured = adherence_by_turn(*tiny, plans, probe_turns=[2])
    table = tiny_gatt.judged(plans, measured).assign(split="seen", seed=3)
    assert list(table["family"]) == ["hobby", "hobby", "json", "json"]
    assert torch.equal(tiny_gatt.by_dialogue(table).float(), measured.obeyed)
    assert tiny_gatt.by_dialogue(table, "recalled").tolist() == [[measured.recalled[0, 1]]]


# Bad input


def test_a_template_that_instructs_is_refused_and_quoted(tiny):
    tokenizer = deepcopy(tiny[1])
    system = "<|system|>You are a helpful assistant.<|end|>" + tokenizer.chat_template
    quoted = r"text of its own .*You are a helpful assistant"
    for template, message in ((system, quoted), (None, "no chat template: take a chat model")):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            gatt.sample_dialogues(tiny[0], tokenizer, [])
    tokenizer.chat_template = CHATML
    check_template(tokenizer)
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
