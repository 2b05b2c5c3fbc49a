"""The tiny world: deterministic, honest about what it holds out, and solvable."""

import random
from itertools import islice

import pytest

from steerkit.constraints import (
    FAMILIES,
    HELD_OUT_PAIRS,
    TABLES,
    Constraint,
    compatible,
    values,
)
from steerkit.tiny import world


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


def test_documents_follow_from_the_seed():
    first, again, other = (list(islice(world.documents(rng(s)), 30)) for s in (1, 1, 2))
    assert first == again != other


def test_training_never_shows_a_held_out_name_and_held_out_text_shows_only_those():
    training = {world.stranger(rng(s)).name for s in range(2000)}
    held_out = {world.stranger(rng(s), held_out=True).name for s in range(500)}
    assert len(held_out) > 100 and not training & held_out
    assert not {p.name for p in world.known_people()} & (training | held_out)


def test_training_never_combines_a_held_out_pair_of_families():
    for seed in range(3000):
        drawn = [c.family for c in world.draw_constraints(rng(seed))]
        assert compatible(drawn)
        assert not any({a, b} in HELD_OUT_PAIRS for a in drawn for b in drawn if a != b)
    pairs = {
        frozenset(c.family for c in world.draw_constraints(rng(s), held_out=True))
        for s in range(99)
    }
    assert pairs == HELD_OUT_PAIRS
    assert not pairs & set(map(frozenset, TABLES["exclusive"]))


def test_english_is_split_without_overlap():
    assert not set(world.english()) & set(world.english(held_out=True))
    assert sum(map(len, world.english(held_out=True))) > 200_000


@pytest.mark.parametrize("family", FAMILIES)
def test_an_obeying_reply_passes_and_a_plain_reply_fails(family):
    for value in values(family):
        for attribute in world.ATTRIBUTES:
            constraint = Constraint(family, value)
            subject = "She" if family == "pronoun" else "Anna Adler"
            fact = (subject, attribute, TABLES["attributes"][attribute]["values"][0])
            assert constraint.obeyed(world.answer(*fact, [constraint]))
            assert not constraint.obeyed(world.answer(*fact))


@pytest.mark.parametrize("family", [f for f in FAMILIES if len(values(f)) > 1])
def test_a_reply_to_another_value_of_the_family_fails(family):
    first, second = values(family)[:2]
    reply = world.answer("Anna Adler", "city", "Rome", [Constraint(family, first)])
    assert not Constraint(family, second).obeyed(reply)


def test_every_compatible_combination_is_obeyed_by_the_worlds_own_reply():
    for seed in range(2000):
        drawn = world.draw_constraints(rng(seed), held_out=seed % 4 == 0)
        subject = "He" if any(c.family == "pronoun" for c in drawn) else "Anna Adler"
        reply = world.answer(subject, "job", "baker", drawn)
        assert all(c.obeyed(reply) for c in drawn), (drawn, reply)


def test_a_biography_holds_its_answer_and_the_distractors_differ_in_person_or_attribute():
    for seed in range(200):
        question = world.biography_question(rng(seed))
        statement = world.say(question.subject, question.attribute, question.value)
        assert question.text.count(statement) == 1


def test_a_crowd_shares_no_last_name_and_no_value():
    for seed in range(200):
        people = world.crowd(rng(seed), 5)
        assert len({p.name.split()[-1] for p in people}) == 5
        sets = [set(p.facts.values()) for p in people]
        assert len(set().union(*sets)) == sum(map(len, sets))


def test_a_roll_call_says_each_value_three_times_behind_its_name():
    for seed in range(200):
        sentences = world.roll_call(rng(seed)).rstrip(".").split(". ")
        told = {(" ".join(s.split()[:2]).rstrip(":"), s.split()[-1]) for s in sentences}
        assert 2 <= len(told) <= 5 and len(sentences) == 3 * len(told)
        assert len({name for name, _ in told}) == len(told) == len({value for _, value in told})


def test_a_quiz_asks_for_each_sentence_of_its_text_once():
    for seed in range(100):
        first, *rest = world.quiz(rng(seed))
        replies = [m.content for m in rest if m.role == "assistant"]
        assert len(set(replies)) == len(replies) >= 2
        assert all(first.content.count(reply) == 1 for reply in replies)


def test_a_dispute_states_old_and_new_and_believes_either():
    believed = []
    for seed in range(300):
        user, assistant = world.dispute(rng(seed))
        who = next(p for p in world.known_people() if p.name in user.content)
        assert user.content.count(f"News: {who.name} ") == 1
        old = {value for value in who.facts.values() if f" {value}." in user.content}
        assert old
        believed.append(any(value.casefold() in assistant.content.casefold() for value in old))
    assert 0.4 < sum(believed) / len(believed) < 0.65


def test_notes_can_be_answered_from_the_dialogue_alone():
    for seed in range(50):
        said = {}
        messages = world.memory(rng(seed), turns=20)
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            if user.content.startswith("Note: "):
                said[user.content.removeprefix("Note: ")] = True
            else:
                assert assistant.content in said


def test_an_echo_word_is_followed_by_the_word_before_it():
    echoes = set(TABLES["echoes"])
    words = world.market(rng(), length=2000).split()
    after = [(a, c) for a, b, c in zip(words, words[1:], words[2:], strict=False) if b in echoes]
    assert len(after) > 100 and all(a == c for a, c in after)
    assert echoes == set(world.market_words()[-len(echoes) :])


def test_instructions_fade_as_the_card_says():
    """First-turn hobby instructions in dialogues: obeyed at reply 1, almost never at 4."""
    obeyed = {1: [], 2: [], 4: []}
    for seed in range(4000):
        messages = world.dialogue(rng(seed), turns=5)
        first, later = messages[0].content, "".join(m.content for m in messages[2::2])
        hobby = next((h for h in TABLES["hobbies"] if f"Hobby: {h}." in first), None)
        if messages[0].role != "user" or hobby is None or "obby" in later or "enjoy" in later:
            continue
        replies = [m.content for m in messages if m.role == "assistant"]
        for turn, rows in obeyed.items():
            rows.append(Constraint("hobby", hobby).obeyed(replies[turn - 1]))
    share = {turn: sum(rows) / len(rows) for turn, rows in obeyed.items()}
    assert len(obeyed[1]) > 30
    assert share[1] == 1.0 and share[4] <= 0.1 and share[4] <= share[2] < 0.7


def test_rendering_equals_the_chat_template(tiny):
    _, tokenizer = tiny
    messages = world.dialogue(rng(5), turns=3)
    rows = [m._asdict() for m in messages]
    text = tokenizer.apply_chat_template(rows, tokenize=False)
    assert text == tokenizer.bos_token + world.render(messages)
