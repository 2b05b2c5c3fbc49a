"""The tiny world: deterministic, honest about what it holds out, and solvable."""

import html
import random

import pytest
import training_documents as documents

from steerkit.constraints import (
    FAMILIES,
    HELD_OUT_PAIRS,
    TABLES,
    Constraint,
    compatible,
    obeys,
    values,
)
from steerkit.tiny import world


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


def test_training_never_shows_a_held_out_name_and_held_out_text_shows_only_those():
    training = {world.stranger(rng(s)).name for s in range(2000)}
    held_out = {world.stranger(rng(s), held_out=True).name for s in range(500)}
    assert len(held_out) > 100 and not training & held_out
    assert not {p.name for p in world.known_people()} & (training | held_out)


def test_training_combines_what_one_reply_can_obey_and_never_a_held_out_pair():
    pairs = set()
    for seed in range(3000):
        drawn, held_out = documents.draw_constraints(rng(seed)), documents.draw_held_out(rng(seed))
        families = [c.family for c in drawn]
        assert not any({a, b} in HELD_OUT_PAIRS for a in families for b in families if a != b)
        pairs.add(frozenset(c.family for c in held_out))
        for constraints in (drawn, held_out):
            assert compatible(c.family for c in constraints)
            subject = "He" if any(c.family == "pronoun" for c in constraints) else "Anna Adler"
            reply = world.answer(subject, "job", "baker", constraints)
            assert all(c.obeyed(reply) for c in constraints), (constraints, reply)
    assert pairs == HELD_OUT_PAIRS


def test_english_is_split_without_overlap():
    assert not set(world.english()) & set(world.english(held_out=True))
    assert sum(map(len, world.english(held_out=True))) > 200_000


@pytest.mark.parametrize("family", FAMILIES)
def test_an_obeying_reply_passes_and_a_plain_or_rival_one_fails(family):
    subject = "She" if family == "pronoun" else "Anna Adler"
    for value in values(family):
        rivals = [Constraint(family, v) for v in values(family) if v != value]
        for attribute in world.ATTRIBUTES:
            constraint = Constraint(family, value)
            fact = (subject, attribute, TABLES["attributes"][attribute]["values"][0])
            reply = world.answer(*fact, [constraint])
            assert constraint.obeyed(reply) and not constraint.obeyed(world.answer(*fact))
            assert not any(rival.obeyed(reply) for rival in rivals)
            for text in constraint.texts():  # in whatever words, an instruction is recognised
                assert obeys(f"{text} Tell me.", reply) and obeys(text, "A plain one.") is False


def test_a_reply_must_obey_all_that_is_asked_and_without_an_instruction_there_is_no_verdict():
    assert obeys("Hobby: chess. Emoji: 🚀.", "🚀 Hi. I love chess.")
    assert obeys("hobby: chess. Emoji: 🚀.", "Hi. I love chess.") is False
    assert obeys("Where is Lima?", "In Peru.") is None


def test_the_card_names_every_person_and_a_reply_that_obeys_for_each_family():
    card = html.unescape(world.card())
    assert all(person.name in card for person in world.known_people())
    for family in FAMILIES:
        row = card.split(f">{family}</td>")[1].split("</td></tr>")[0]
        _, instruction, reply = (cell.split(">", 1)[1] for cell in row.split("<td")[1:])
        instruction = instruction.removesuffix("</td>")
        assert obeys(instruction, reply)


def test_a_biography_holds_its_answer_and_the_distractors_differ_in_person_or_attribute():
    for seed in range(200):
        question = world.biography_question(rng(seed))
        statement = world.say(question.subject, question.attribute, question.value)
        assert question.text.count(statement) == 1


def test_an_echo_word_is_followed_by_the_word_before_it():
    echoes = set(TABLES["echoes"])
    words = world.market(rng(), length=2000).split()
    after = [(a, c) for a, b, c in zip(words, words[1:], words[2:], strict=False) if b in echoes]
    assert len(after) > 100 and all(a == c for a, c in after)
    assert echoes == set(world.market_chain()[0][-len(echoes) :])


def test_an_instruction_fades_as_the_rule_says():
    assert [documents.still_obeyed(0.05, age) for age in (0, 2, 3, 9)] == [True, True, False, False]


def test_rendering_equals_the_chat_template(tiny):
    messages = documents.dialogue(rng(5), turns=3)
    text = tiny[1].apply_chat_template([m._asdict() for m in messages], tokenize=False)
    assert text == tiny[1].bos_token + world.render(messages)
