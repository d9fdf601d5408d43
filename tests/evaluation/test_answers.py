"""Answers read out of free text: 650 phrasings in thirteen languages, read by a person."""

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
    assert len(list(phrasings())) >= 650


def test_the_documentation_tells_how_large():
    told = Path(__file__).parents[2].joinpath("docs", "tasks.md").read_text(encoding="utf-8")
    assert f"holds {len(list(phrasings()))} phrasings" in told


SIGNED = (
    *(("-1", "0", "1"), ("\u22121", "1"), ("<5", "5", ">5"), ("<5", ">5"), ("≥ 65", "65", "< 65")),
    *(("+", "-"), ("+", "++", "+++", "-"), ("<", "=", ">"), ("±2", "2"), ("~5", "5"), ("$5", "5")),
    *(("-5 to 0", "0 to 5"), ("<1 year", "1 year"), ("Rh+", "Rh-"), ("(none)", "some")),
)
FORMS = (
    *("{}", "{}.", " {} ", "({})", '"{}"', "**{}**", "- {}", "The answer is {}", "Answer:{}"),
    *("The answer is {}.", "The answer is ({}).", "Answer: **{}**", "**Answer:** {}", "答案：{}"),
    *("\\boxed{{{}}}", "$\\boxed{{{}}}$", "答案是{}。", "I choose {}.", "It depends.\n\n{}"),
)


@pytest.mark.parametrize("choices", SIGNED)
@pytest.mark.parametrize("form", FORMS)
def test_choices_that_begin_with_a_sign(choices, form):
    for choice in choices:
        assert answers.pick(form.format(choice), choices) == choice
        letters = "ABCD"[: len(choices)]  # of which these are the texts
        assert answers.pick(form.format(choice), letters, choices) == letters[choices.index(choice)]


@pytest.mark.parametrize(
    ("choices", "text", "wanted"),
    [
        ("-1,1", "The answer is \u22121", "-1"),
        ("-1,0,1", "Answer: \u20131", None),
        ("-1,1", "It is not -1 but 1", "1"),
        ("-1,1", "- 1", "1"),
        ("-2,1", "The answer is -1", None),
        ("-2,1", "1-2", None),
        ("<5,5", "The answer is <5 or 5", None),
        ("<5,5", "The answer is <50", None),
        ("<5,5", "The answer is <5.5", None),
        ("1,2", "The answer is 1.5", None),
        ("1,2", "The answer is 0.1", None),
        ("1,2", "The answer is 1. It is not 0.1.", "1"),
        ("+,-", "- yes\n- no", None),
        ("+,-", '- **yes**\n- "no"', None),
        ("+,-", "- The answer is +", "+"),
        ("+,-", "The value - as I said - is +", "+"),
        ("+,-", "---", None),
        ("+,++", "+++", None),
    ],
)
def test_a_sign_is_part_of_its_number_and_a_dash_is_no_answer(choices, text, wanted):
    assert answers.pick(text, choices.split(",")) == wanted


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


@pytest.mark.parametrize(
    "texts",
    [
        ("B", "C", "D", "E"),
        ("A", "B", "AB", "O"),
        ("A,B", "A,C", "B,C", "ABC"),
        ("B>A>D>C", "B>D>C>A", "A>D>B>C", "C>A>B>D"),
        ("D, antagonist", "B/L otitis media", "'B' & 'C'", "U. S. A."),
        ("Class A", "Class B", "Class C", "Both B and C"),
        ("AとC", "Les réponses A et B", "A. en C. hier bo", "None of A, B or C"),
        ("B..", "C..", "D..", "E.."),
        ("Not indicated", "Incorrect dose", "No, or C", "wrong"),
    ],
)
def test_the_letters_in_an_option_s_text_name_no_others(texts):
    for letter, text in zip("ABCD", texts, strict=True):
        for form in ("{}. {}", "{}) {}", "{} ({})", "**{}. {}**", "The answer is ({}) {}."):
            assert answers.pick(form.format(letter, text), "ABCD", texts) == letter
        if len(text.strip(".")) > 1 and ("A" in text or "B" in text):
            for form in ("{}", "The answer is {}.", "Answer: **{}**"):
                assert answers.pick(form.format(text), "ABCD", texts) == letter


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("The answer is A. B is wrong.", "A"),
        ("The answer is B or C", None),
        ("A and B are wrong, so D", "D"),
        ("A and B are both right, so the answer is C", "C"),
        ("It is not A and B", None),
    ],
)
def test_letters_are_read_beside_options_that_hold_letters(text, wanted):
    assert answers.pick(text, "ABCD", ("B", "C", "A and B", "none")) == wanted


def test_an_empty_option_is_not_read():
    assert answers.pick("It is: .\n\n", "AB", ("", "aspirin")) is None
    assert answers.pick("It is aspirin. ", "AB", ("", "aspirin")) == "B"


def test_option_texts_are_not_read_where_two_are_the_same():
    assert answers.pick("aspirin", "AB", ("aspirin", "aspirin")) is None
    assert answers.pick("Aspirin", "ABC", ("aspirin", "Aspirin ", "heparin")) is None
    assert answers.pick("heparin", "ABC", ("aspirin", "Aspirin ", "heparin")) == "C"
    assert answers.pick("The answer is 4.61", "ABC", ("4.6", "4.6", "4.61")) == "C"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A\nC", "AC"),
        ("- A\n- C", "AC"),
        ("A\nB\nC", "ABC"),
        ("A. x\nC. y", "AC"),
        ("A. x\nB. y", "AB"),
        ("**A.** x\n**C.** y", "AC"),
        ("(A) x\n(C) y\n(E) z", "ACE"),
        ("A. x\nB. y\nC. z\nD. w\nE. v", ""),
        ("A. x\nB. y\nC. z\nD. w\nE. v\n\nA, C", "AC"),
        ("C. x\n\nA. it is old\nB. it is slow", "C"),
        ("CA", "AC"),
        ("EDCBA", "ABCDE"),
        ("Réponse : CA.", "AC"),
        ("Réponse : E-C-A", "ACE"),
        ("A+C", "AC"),
        ("Réponses : A - C - E", "ACE"),
        ("A – C – E", "ACE"),
        ("a - c - e", "ACE"),
        ("A - E. coli", "A"),
        ("1. A\n2. C", "AC"),
        ("1) **A**\n2) **C**", "AC"),
        ("Answer: 1. A 2. C", "AC"),
        ("1. A. x\n2. C. y", "AC"),
        ("1. A - true\n2. B - false\n3. C - true", "AC"),
        ("The tumour is grade 3. C is correct.", "C"),
        ("answer: a, c, d", "ACD"),
        ("Réponses : a, c et e.", "ACE"),
        ("The correct answers are a and c.", "AC"),
        ("The answer is C, as in a, e.g. with a, i.e. early.", "C"),
        ("- A\n- C", "AC"),
        ("The answer is A, not B-cell.", "A"),
        ("选DBA。", "ABD"),
        ("\\boxed{CA}", "AC"),
        ("A: vrai\nB: faux\nC: vrai\nD: faux\nE: faux", "AC"),
        ("A. x is wrong\nB. y is right\nC. z is wrong\nD. w is right", "BD"),
        ("A est correcte, C est correcte", "AC"),
        ("B, C and E are wrong, A is correct, D is correct.", "AD"),
        ("A is right. So A, C.", "AC"),
        ("The answer is A. On second thought, the answer is B.", "B"),
        ("The answer is A or B", ""),
        # Something is told of several at once, or of another one.
        ("A: vrai, B: faux, C: vrai, D: faux, E: faux", "AC"),
        ("A: true, B: false, C: true", "AC"),
        ("Die Antworten A und C treffen zu.", "AC"),
        ("Ich würde A und C wählen.", "AC"),
        ("Answer: A, C are right", "AC"),
        ("答案：A，C，D均正确", "ACD"),
        ("The answers are A, C, which are right", "AC"),
        ("The answers are A and C, D is a distractor", "AC"),
        ("答案是A、C均为抗凝药", "AC"),
    ],
)
def test_several_letters_that_stand_apart_are_joined(text, wanted):
    assert answers.all_letters(text, "ABCDEFGHIJ") == set(wanted)


def test_several_letters_are_read_as_in_the_phrasings():
    """Where several were asked for, what stands together is read as before."""
    for choices, wanted, text in phrasings():
        if len(wanted) > 1 and isinstance(choices, str):
            assert answers.all_letters(text, choices) == set(wanted), text


DRUGS = ("Aspirin", "Heparin", "Warfarin", "Insulin")
LIST = "A. Aspirin\nB. Heparin\nC. Warfarin\nD. Insulin"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (LIST, None),
        ("Let us look at the options.\n" + LIST, None),
        ("看一下选项。\n" + LIST.replace(". ", "、"), None),
        ("Options : \n" + LIST.replace(". ", ") ").replace("\n", "\n- "), None),
        (LIST.replace("\n", " "), None),
        (LIST.replace("\n", "; "), None),
        ("\n".join(DRUGS), None),
        (LIST.replace("\n", "  \n\n"), None),
        (LIST + "\n\nC. Warfarin", "C"),
        (LIST + "\n\nWarfarin", "C"),
        (LIST + "\n\nI would give warfarin", "C"),
        (LIST + "\nAnswer (A/B/C/D): C", "C"),
        ("C. Warfarin\n\n" + LIST, "C"),
        ("C. Warfarin", "C"),
        ("Warfarin", "C"),
        ("Insulin", "D"),
        ("A. Aspirin: no\nB. Heparin: no\nC. Warfarin - correct\nD. Insulin: no", "C"),
        ("A. Aspirin\nB. Heparin\nD. Insulin\n\nWarfarin", "C"),
    ],
)
def test_a_list_of_the_options_names_none(text, wanted):
    assert answers.pick(text, "ABCD", DRUGS) == wanted


@pytest.mark.parametrize("ticked", ["A. {} ❌", "- ❌ **A. {}**: no", "A) {} ✗", "A. {}: no"])
def test_a_list_of_the_options_that_is_judged_is_no_mere_list(ticked):
    right = {"❌": "✅", "✗": "✓", "no": "yes"}
    lines = [
        ticked.replace("A", letter).format(drug) for letter, drug in zip("ABCD", DRUGS, strict=True)
    ]
    for wrong, good in right.items():
        lines[2] = lines[2].replace(wrong, good)
    assert answers.pick("\n".join(lines), "ABCD", DRUGS) == "C"


def test_an_option_that_is_one_sign_may_be_mentioned():
    assert answers.pick("Blood group O", "ABCD", ("A", "B", "AB", "O")) == "D"
    assert answers.pick("There are 3 lobes", "ABCD", ("1", "2", "3", "4")) == "C"


def test_a_list_that_is_the_answer_is_no_mere_list():
    texts = ("aspirin", "heparin", "warfarin", "insulin")
    said = "The correct answers are: A. aspirin, B. heparin, C. warfarin, D. insulin"
    assert answers.letters(said, "ABCD", texts)
    assert answers.letters("The answers are A and B", "ABCDEFGHIJ", texts) == {"A", "B"}


@pytest.mark.parametrize(
    "said", ["答案：(A/B/C)", "The answer is (A/B/C).", "[A/B/C]", "(A, B, C): these are right"]
)
def test_a_bracket_that_no_choice_follows_is_the_answer(said):
    """Questions may have several right letters; before a choice it is the repeated cue."""
    assert answers.letters(said, "ABCDEFGHIJ") == set("ABC")
    for after in ("C", "**C**", "c"):
        assert answers.letters(f"Answer (A/B/C/D): {after}", "ABCDEFGHIJ") == {"C"}
