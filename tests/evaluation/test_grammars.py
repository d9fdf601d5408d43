"""The grammars of structured answers."""

import pytest

from medmoe_jax.data.medical import forms
from medmoe_jax.evaluation import grammars


def test_entities():
    assert grammars.entities("疾病实体：感冒，肺炎\n身体实体：嘴") == {
        ("疾病", "感冒"),
        ("疾病", "肺炎"),
        ("身体", "嘴"),
    }
    assert grammars.entities("Chemical: 1,2-a; b\nDisease: x") == {
        ("Chemical", "1,2-a"),
        ("Chemical", "b"),
        ("Disease", "x"),
    }
    assert grammars.entities("无") == grammars.entities("") == frozenset()


def test_mentions_that_hold_a_sign_of_the_grammar_survive():
    """As they are written by the sets' readers, and read again."""
    found = [("Disease", "flu; severe"), ("Disease", "cough"), ("Drug", 'a "b" c')]
    text = forms.answer_lines(found, ["Disease", "Drug"], suffix=": ", comma="; ", none="none")
    assert text == 'Disease: "flu; severe"; cough\nDrug: a "b" c'
    assert grammars.entities(text) == set(found)
    chinese = [("疾病", "感冒，重"), ("疾病", "发热")]
    text = forms.answer_lines(chinese, ["疾病"], suffix="实体：", comma="，", none="无")
    assert grammars.entities(text) == set(chinese)
    japanese = "表現: 発熱，嚥下障害; 咳"
    assert grammars.entities(japanese) == {("表現", "発熱，嚥下障害"), ("表現", "咳")}


def test_relations():
    text = (
        "具有临床表现关系的头尾实体对如下：头实体为肺炎，尾实体为咳嗽。头实体为肺炎，尾实体为发热。\n"
        "具有药物治疗关系的头尾实体对如下：头实体为肺炎，尾实体为青霉素。"
    )
    assert grammars.relations(text) == {
        ("临床表现", "肺炎", "咳嗽"),
        ("临床表现", "肺炎", "发热"),
        ("药物治疗", "肺炎", "青霉素"),
    }
    assert grammars.relations("a b -> c\nd->e") == {("", "a b", "c")}


def test_labelled_terms_and_sections():
    assert grammars.labelled("发热：有\n咳嗽: 无") == {("发热", "有"), ("咳嗽", "无")}
    assert grammars.terms("高血压，糖尿病") == {("高血压",), ("糖尿病",)}
    record = "主诉：咳嗽三天\n现病史：受凉后\n咳嗽\n诊断：感冒\n建议：休息"
    assert grammars.sections(record) == {
        "主诉": "咳嗽三天",
        "现病史": "受凉后\n咳嗽",
        "诊断": "感冒",
        "建议": "休息",
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1,250 mg", [1250.0]),
        ("1 250.5 mg", [1250.5]),
        ("1.25 × 10³", [1250.0]),
        ("1.25 x 10^-3", [0.00125]),
        (r"1.25 \times 10^{3}", [1250.0]),
        ("5.2 × 10⁹/L", [5.2]),
        ("70 / 1.69² = 24.5 kg/m²", [70.0, 1.69, 24.5]),
        ("84 mL/min/1.73 m²", [84.0]),
        ("84 mL/min per 1.73 m^2", [84.0]),
        ("BSA 1.73 m²", [1.73]),
        (".85 or -.5", [0.85, -0.5]),
        ("3,5 mg, -0,25 g", [3.5, -0.25]),
        ("1.250,5 und 1 250,75 mg", [1250.5, 1250.75]),
        ("1,250,000 and 1,250.5", [1250000.0, 1250.5]),
        ("17 weeks, 4 days", [17.0, 4.0]),
        ("1,2,3", [1.0, 2.0, 3.0]),
        ("05/10/2022 was 3/9", [5.0, 10.0, 2022.0, 3.0, 9.0]),
    ],
)
def test_numbers(text, wanted):
    assert grammars.numbers(text) == wanted
