"""The grammars of structured answers: entities, relations, labels, terms, sections.

| function | grammar |
|---|---|
| `entities` | `{type}实体：a，b` or `{type}: a; b`, one line a type |
| `relations` | `具有{relation}关系的头尾实体对如下：头实体为x，尾实体为y。` or lines `x -> y` |
| `labelled` | `{mention}：{label}` or `{mention}: {label}`, one line each |
| `terms` | `a，b，c` or `a, b, c` |
| `sections` | `{heading}：text` a line, for the headings of a Chinese visit record |

Text outside the grammar gives nothing: a wrong form is a wrong answer.
"""

from __future__ import annotations

import re

_HEADINGS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")


def entities(text: str) -> frozenset[tuple[str, str]]:
    """`(type, mention)` of an entity answer."""
    found = set()
    for kind, mentions in _lines(text):
        kind = kind.removesuffix("实体")
        found |= {(kind, m.strip()) for m in re.split(r"[，;；]", mentions) if m.strip()}
    return frozenset(found)


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


def labelled(text: str) -> frozenset[tuple[str, str]]:
    """`(mention, label)` of an answer with a label for each mention."""
    return frozenset(_lines(text))


def terms(text: str) -> frozenset[tuple[str]]:
    """`(term,)` of a comma list."""
    return frozenset((t.strip(" 。."),) for t in re.split(r"[，,\n]", text) if t.strip(" 。."))


def sections(text: str) -> dict[str, str]:
    """Heading -> text of a visit record with the usual six headings, those present."""
    parts = re.split(rf"(?m)^\s*({'|'.join(_HEADINGS)})\s*[：:]", text)
    return {head: body.strip() for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def _lines(text: str):
    for line in text.splitlines():
        match = re.match(r"\s*([^：:]+?)\s*[：:]\s*(.*\S)", line)
        if match:
            yield match[1], match[2]
