"""Answers read out of free text, and the grammars of structured answers."""

import pytest

from medmoe_jax.evaluation import answers

LETTERS = [
    ("答案为B", "B"),
    ("解析：选项A不对，因此答案是 C。", "C"),
    ("答案：D", "D"),
    ("The answer is B", "B"),
    ("The answer is (C).", "C"),
    ("A is wrong. Therefore, the answer is **D**.", "D"),
    ("The answer is A. On second thought, the answer is B.", "B"),
    ("the ANSWER is: E", "E"),
    ("答えはA", "A"),
    ("Ответ: B", "B"),
    ("La réponse est C.", "C"),
    ("A", "A"),
    (" B. because", "B"),
    ("C\nreason", "C"),
    ("(D)", "D"),
    ("A 67-year-old man", ""),
    ("The answer is Aspirin", ""),
    ("the answer is a matter of taste", ""),
    ("I do not know", ""),
    ("", ""),
    ("A, C", "AC"),
    ("Réponses: A C E", "ACE"),
    ("答案为ABD。", "ABD"),
]


@pytest.mark.parametrize(("text", "expected"), LETTERS)
def test_letters(text, expected):
    assert answers.letters(text, "ABCDE") == frozenset(expected)


def test_letters_outside_the_item_are_no_answer():
    assert answers.letters("The answer is E", "ABCD") == frozenset()


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The answer is B", "ABCD", "B"),
        ("The answer is A, B", "ABCD", None),
        ("不是", ("是的", "不是"), "不是"),
        ("是的。", ("是的", "不是"), "是的"),
        ("Disease", ("Disease", "Age"), "Disease"),
        ("the topic is age", ("Disease", "Age"), "Age"),
        ("age or disease", ("Disease", "Age"), "Age"),
        ("either disease or age", ("Disease", "Age"), None),
        ("тошнота с рвотой", ("тошнота", "тошнота с рвотой"), "тошнота с рвотой"),
        ("это тошнота с рвотой", ("тошнота", "тошнота с рвотой"), "тошнота с рвотой"),
        ("none of them", ("Disease", "Age"), None),
    ],
)
def test_pick(text, choices, expected):
    assert answers.pick(text, choices) == expected


def test_entities():
    assert answers.entities("疾病实体：感冒，肺炎\n身体实体：嘴") == {
        ("疾病", "感冒"),
        ("疾病", "肺炎"),
        ("身体", "嘴"),
    }
    assert answers.entities("Chemical: 1,2-a; b\nDisease: x") == {
        ("Chemical", "1,2-a"),
        ("Chemical", "b"),
        ("Disease", "x"),
    }
    assert answers.entities("无") == answers.entities("") == frozenset()


def test_relations():
    text = (
        "具有临床表现关系的头尾实体对如下：头实体为肺炎，尾实体为咳嗽。头实体为肺炎，尾实体为发热。\n"
        "具有药物治疗关系的头尾实体对如下：头实体为肺炎，尾实体为青霉素。"
    )
    assert answers.relations(text) == {
        ("临床表现", "肺炎", "咳嗽"),
        ("临床表现", "肺炎", "发热"),
        ("药物治疗", "肺炎", "青霉素"),
    }
    assert answers.relations("a b -> c\nd->e") == {("", "a b", "c")}


def test_labelled_terms_and_sections():
    assert answers.labelled("发热：有\n咳嗽: 无") == {("发热", "有"), ("咳嗽", "无")}
    assert answers.terms("高血压，糖尿病") == {("高血压",), ("糖尿病",)}
    record = "主诉：咳嗽三天\n现病史：受凉后\n咳嗽\n诊断：感冒\n建议：休息"
    assert answers.sections(record) == {
        "主诉": "咳嗽三天",
        "现病史": "受凉后\n咳嗽",
        "诊断": "感冒",
        "建议": "休息",
    }
