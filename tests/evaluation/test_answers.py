"""Answers read out of free text: 300 phrasings in thirteen languages, read by a person."""

from pathlib import Path

import pytest

from medmoe_jax.evaluation import answers


def phrasings():
    """`(choices, wanted, text)` of the table."""
    lines = Path(__file__).with_name("phrasings.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            choices, wanted, text = line.split(" | ", 2)
            words = choices.split(",")
            yield words if len(words) > 1 else choices, wanted, text.replace("\\n", "\n")


@pytest.mark.parametrize(("choices", "wanted", "text"), list(phrasings()))
def test_a_phrasing(choices, wanted, text):
    if isinstance(choices, str):
        expected = frozenset(wanted.replace("-", ""))
        found = answers.letters(text, choices)
        if len(found) > 1 and len(expected) < 2:  # one was asked for
            found = frozenset()
        assert found == expected
        assert answers.pick(text, choices) == (wanted if len(expected) == 1 else None)
    else:
        assert answers.pick(text, choices) == (None if wanted == "-" else wanted)


def test_the_table_is_large():
    assert len(list(phrasings())) >= 300


TEXTS = ("aspirin", "E. coli infection", "difficile colitis", "cell lysis")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is A aspirin", "A"),
        ("The answer is B. E. coli infection", "B"),
        ("The answer is C difficile colitis", "C"),
        ("The answer is D-cell lysis", "D"),
        ("The answer is aspirin.", "A"),
        ("I would give aspirin", "A"),
        ("Not aspirin", None),
        ("aspirin or cell lysis", None),
        ("The answer is heparin", None),
        ("The answer is D. aspirin is unsafe", "D"),
    ],
)
def test_options_that_are_known_settle_what_a_letter_means(text, wanted):
    assert answers.pick(text, "ABCD", TEXTS) == wanted


def test_option_texts_are_not_read_where_two_are_the_same():
    assert answers.pick("aspirin", "AB", ("aspirin", "aspirin")) is None
