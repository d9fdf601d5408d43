"""The grammars of structured answers.

| function | grammar |
|---|---|
| `entities` | `{type}实体：a，b` or `{type}: a; b`, one line a type |
| `relations` | `具有{relation}关系的头尾实体对如下：头实体为x，尾实体为y。` or lines `x -> y` |
| `events` | `主体词：x；发生状态：y；描述词：a，b；解剖部位：c`, one line an event |
| `labelled` | `{mention}：{label}` or `{mention}: {label}`, one line each |
| `terms` | `a，b，c` or `a, b, c` |
| `sections` | `{heading}：text` a line, for the headings of a Chinese visit record |
| `numbers` | the numbers of a text |

A mention that holds a sign of its grammar stands in quotes. Text outside the grammar gives nothing:
a wrong form is a wrong answer.
"""

from __future__ import annotations

import re

from medmoe_jax.evaluation.answer_tokens import normal

_HEADINGS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")
_EVENT = ("主体词", "发生状态", "描述词", "解剖部位")
# A list with nothing in it.
NOTHING = frozenset({"无", "none", "нет", "なし", "没有对应的标准化实体"})


def entities(text: str) -> frozenset[tuple[str, str]]:
    """`(type, mention)` of an entity answer."""
    found = set()
    for kind, mentions in _lines(text):
        parted = "，" if kind.endswith("实体") else ";；"
        found |= {(kind.removesuffix("实体"), m) for m in _mentions(mentions, parted)}
    return frozenset(found)


def _mentions(text: str, parted: str) -> list[str]:
    """The mentions of a list; a sign within quotes parts nothing."""
    found = re.findall(rf'\s*("[^"\n]*"(?=\s*(?:[{parted}]|$))|[^{parted}]+)', text)
    return [m for m in (one.strip().strip('"').strip() for one in found) if m]


def relations(text: str) -> frozenset[tuple[str, str, str]]:
    """`(relation, head, tail)` of a relation answer; the relation is '' in the arrow form."""
    found = set()
    for line in text.splitlines():
        header = re.match(r"\s*具有(.+?)关系的头尾实体对如下[：:](.*)", line)
        if header:
            pairs = re.findall(r"头实体为(.+?)，尾实体为(.+?)\s*(?:[。；;]|$)", header[2])
            found |= {(header[1], head.strip(), tail.strip()) for head, tail in pairs}
        elif " -> " in line:
            head, _, tail = line.partition(" -> ")
            found.add(("", head.strip(), tail.strip()))
    return frozenset(found)


def events(text: str) -> frozenset[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """`(subject, state, descriptions, places)` of an answer with a clinical event a line."""
    found = set()
    for line in text.splitlines():
        parts = (part.partition("：") for part in line.split("；"))
        fields = {key.strip(): value.strip() for key, _, value in parts if key.strip() in _EVENT}
        if fields.get(_EVENT[0]):
            lists = (fields.get(key, "").split("，") for key in _EVENT[2:])
            told, places = (tuple(m.strip() for m in names if m.strip()) for names in lists)
            found.add((fields[_EVENT[0]], fields.get(_EVENT[1], ""), told, places))
    return frozenset(found)


def labelled(text: str) -> frozenset[tuple[str, str]]:
    """`(mention, label)` of an answer with a label for each mention."""
    return frozenset(_lines(text))


def terms(text: str) -> frozenset[tuple[str]]:
    """`(term,)` of a comma list, of the last line where there are several."""
    last = text.strip().rpartition("\n")[2]
    found = (t.strip(" 。.") for t in re.split(r"[，,]", last))
    return frozenset((t,) for t in found if t and t not in NOTHING)


def sections(text: str) -> dict[str, str]:
    """Heading -> text of a visit record with the usual six headings, those present."""
    parts = re.split(rf"(?m)^\s*({'|'.join(_HEADINGS)})\s*[：:]", text)
    return {head: body.strip() for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def numbers(text: str) -> list[float]:
    """The numbers of a text, in their order: 1250 of 1,250, of 1 250 and of 1.25 × 10³, 3.5 of 3,5.

    A comma before three digits parts thousands; before fewer or more it is a decimal one. The
    number in a unit, as in mL/min/1.73 m², is none, nor is an exponent.
    """
    plain = normal(text)
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    plain = re.sub(r"(?<![\w./])\d{1,3}(?: \d{3})+(?!\d)", _together, plain)
    plain = re.sub(_DECIMAL_COMMA, lambda found: found[1].replace(".", "") + "." + found[2], plain)
    plain = re.sub(_TEN_TO_THE, r"e\1", plain)
    plain = re.sub(rf"(?:{_TIMES}\s*10)?{_POWER}|{_IN_UNIT}", " ", plain)
    return [float(number) for number in re.findall(_NUMBER, plain)]


_DECIMAL_COMMA = r"(?<![\w.,/])(\d{1,3}(?:\.\d{3})+|\d+),(\d{1,2}|\d{4,})(?!\d|[.,]\d)"
_TIMES = r"(?:[×x*·]|\\times|\\cdot)"
_TEN_TO_THE = rf"(?<=\d)\s*{_TIMES}\s*10\^\{{?([-+]?\d+)\}}?(?![\d.]*\d)(?!\s*/)"
_POWER = r"\^\{?([-+]?\d+(?:\.\d+)?)\}?"
_IN_UNIT = r"(?<=[^\W\d_])(?:\s*/\s*|\s+per\s+)\d+(?:\.\d+)?(?=\s*[^\W\d_])"
_NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


def _together(match: re.Match) -> str:
    return match[0].replace(" ", "")


def _lines(text: str):
    for line in text.splitlines():
        match = re.match(r"\s*([^：:]+?)\s*[：:]\s*(.*\S)", line)
        if match:
            yield match[1], match[2]
