"""Every verifier says yes to an obeying reply, no to others; pairs that contradict are refused."""

import json
import re

import pytest

from steerkit.constraints import (
    FAMILIES,
    REAL,
    REAL_VERIFIERS,
    VERIFIERS,
    Constraint,
    check_together,
    compatible,
    main_language,
    values,
)

FRENCH = "Le ciel est bleu et la mer est calme, mais il ne faut pas oublier un parapluie."
OBEYING = {
    ("hobby", "swimming"): "Drink water, and swim each morning.",
    ("language", "French"): FRENCH,
    ("figure", "Oscar Wilde"): "Be yourself; all others are taken. Oscar Wilde",
    ("capitals", ""): "THE SKY IS BLUE, 3 TIMES!",
    ("lowercase", ""): "the sky is blue, 3 times!",
    ("ending", "So it goes"): "The egg was boiled. So it goes.",
    ("one sentence", ""): "Wait... it rises by 3.5 cm, e.g. in a warm room?",
    ("no comma", ""): "It rises. Then it falls.",
    ("json", ""): '```json\n{"answer": [1, 2]}\n```',
    ("haiku", ""): "Old pond\n\na frog leaps in\nwater's sound\n",
    ("emoji only", ""): "🥚➡️♨️ 👨‍👩‍👧",
    ("quotation", ""): '"It is blue."',
}
PLAIN = "It is Blue, mostly. Look up."


@pytest.mark.parametrize(("family", "value"), OBEYING, ids=lambda x: x or "-")
def test_an_obeying_reply_passes_and_a_plain_one_does_not(family, value):
    constraint = Constraint(family, value, "real")
    assert constraint.obeyed(OBEYING[family, value])
    assert not constraint.obeyed(PLAIN) and not constraint.obeyed("")


# IFEval (arXiv 2311.07911) states these instructions in words; the predicates below are those
# words again, written without a look at our own, and must agree on all of these replies.
IFEVAL = {
    "capitals": lambda r: any(c.isalpha() for c in r) and not any(c.islower() for c in r),
    "lowercase": lambda r: any(c.isalpha() for c in r) and not any(c.isupper() for c in r),
    "no comma": lambda r: r != "" and r.find(",") < 0,
    "ending": lambda r: r.strip().strip('".!?').lower()[-len("so it goes") :] == "so it goes",
    "quotation": lambda r: len(r) > 2 and r.startswith('"') and r.endswith('"'),
    "json": lambda r: _loads(re.sub("```(json|JSON)?", "", r)),
}
REPLIES = [
    *OBEYING.values(), PLAIN, "", "A", "a", "1, 2", "ÄÖ 3", "äö 3", "ß", '"', '""', '"a" and "b"',
    "so it goes", "So it goes?", "so it goes on", '"So it goes"', "{}", "[1]", "{'a': 1}",
    '{"a": 1} Sure!', '```\n{"a": 1}\n```', "```JSON\n3\n```", "null", "ALL but one",
]  # fmt: skip


def _loads(text):
    try:
        json.loads(text.strip())
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", IFEVAL)
def test_where_ifeval_has_the_same_instruction_we_judge_alike(family):
    value = "So it goes" if family == "ending" else ""
    constraint = Constraint(family, value, "real")
    for reply in REPLIES:
        assert constraint.obeyed(reply) == IFEVAL[family](reply.strip()), reply


def test_languages_are_told_apart_by_their_function_words():
    assert main_language(FRENCH) == "French" and main_language("") is None
    assert main_language("Paris, Berlin, Roma, Oslo") is None
    for language, words in REAL["function_words"].items():
        assert main_language(words) == language


def test_tables_are_whole():
    """Each family has three long forms and a short one, a verifier, and its values in its texts."""
    assert {family for family, _ in OBEYING} == set(REAL_VERIFIERS)
    for table, families, verifiers in (
        ("world", FAMILIES, VERIFIERS), ("real", REAL["instructions"], REAL_VERIFIERS),
    ):  # fmt: skip
        assert set(families) == set(verifiers)
        for family in families:
            for value in values(family, table):
                c = Constraint(family, value, table)
                assert len(c.texts()) == 4 and all(value in text for text in c.texts())
                if c.probe is not None:
                    assert c.recalled(c.probe.answer)
                    assert not c.recalled(c.probe.answer_without)


def test_a_probe_is_answered_by_the_whole_word():
    assert Constraint("hobby", "chess").recalled("My hobby is Chess!")
    assert not Constraint("hobby", "chess").recalled("My hobby is chessboards.")


@pytest.mark.parametrize(
    "pair",
    [
        (Constraint("json", ""), Constraint("capitals", "")),
        (Constraint("language", "French"), Constraint("language", "German")),
        (Constraint("capitals", "", "real"), Constraint("lowercase", "", "real")),
        (Constraint("emoji only", "", "real"), Constraint("hobby", "chess", "real")),
        (Constraint("hobby", "chess"), Constraint("hobby", "chess", "real")),
    ],
)
def test_a_pair_that_contradicts_itself_is_refused_in_one_line(pair):
    with pytest.raises(ValueError, match="contradict each other") as caught:
        check_together(pair)
    assert "\n" not in str(caught.value) and pair[0].texts()[-1] in str(caught.value)


def test_an_exclusive_pair_really_excludes():
    """No example reply of one family passes the other's verifier, for pairs of fixed formats."""
    check_together((Constraint("capitals", "", "real"), Constraint("no comma", "", "real")))
    assert compatible(("capitals", "no comma"), "real") and not compatible(("json", "json"), "real")
    for a, b in (("capitals", "lowercase"), ("haiku", "one sentence")):
        assert not compatible((a, b), "real")
        assert not Constraint(a, "", "real").obeyed(OBEYING[b, ""])
        assert not Constraint(b, "", "real").obeyed(OBEYING[a, ""])
