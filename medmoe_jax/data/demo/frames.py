"""Question and statement frames: how a fact becomes a prompt and an answer.

The same frames serve everyday and medical relations. The pretraining text uses all of them with
everyday relations; the medical training rows use `TRAIN` only, the medical items `HELD_OUT` only.
Fields: `{noun} {Noun} {question} {other} {stem} {s} {o}`; `{Noun}` begins with a capital letter.
"""

from medmoe_jax.data.demo.tables import Fact, Relation

TRAIN = {
    "en": (
        ("{question}", "{o}"),
        ("What is {noun}?", "{o}"),
        ("Name {noun}.", "{o}"),
        ("Complete: {Noun} is", "{o}"),
        ("Fill in the blank: {stem} ____.", "{o}"),
        ("Q: {question}", "A: {o}"),
        ("Please tell me {noun}.", "{stem} {o}."),
        ("State a fact about this: {s}", "{stem} {o}."),
    ),
    "zh": (
        ("{question}", "{o}"),
        ("{noun}是什么？", "{o}"),
        ("请说出{noun}。", "{o}"),
        ("补全句子：{noun}是", "{o}"),
        ("填空：{stem}____。", "{o}"),
        ("问：{question}", "答：{o}"),
        ("请告诉我{noun}。", "{stem}{o}。"),
        ("说一个事实：{s}", "{stem}{o}。"),
    ),
}

HELD_OUT = {
    "en": (
        ("{other}", "{o}"),
        ("I would like to know {noun}.", "{o}"),
        ("Can you say what {noun} is?", "{o}"),
    ),
    "zh": (
        ("{other}", "{o}"),
        ("我想知道{noun}。", "{o}"),
        ("你知道{noun}是什么吗？", "{o}"),
    ),
}


def fill(
    frame: tuple[str, str], relation: Relation, fact: Fact, language: str, answer: str | None = None
) -> tuple[str, str]:
    """Return (prompt, answer) of `frame` for `fact`; `answer` replaces the fact's own object."""
    phrases = {
        field: getattr(relation, field)[language].format(s=fact.subject[language])
        for field in ("noun", "question", "other", "stem")
    }
    noun = phrases["noun"]
    fields = {
        **phrases,
        "Noun": noun[:1].upper() + noun[1:],
        "s": fact.subject[language],
        "o": fact.object[language] if answer is None else answer,
    }
    return frame[0].format(**fields), frame[1].format(**fields)
