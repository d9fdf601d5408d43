"""The grammars of structured answers."""

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
