"""Reading answers out of free text: letters, labels, and the grammars of the structured tasks.

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
from collections.abc import Sequence

_PHRASE = (
    r"(?:答案(?:应该|应)?\s*(?:为|是|选)?\s*[:：]?"
    r"|答え(?:は|[:：])|正解は"
    r"|answers?\s*(?:is|are|:)\s*:?"
    r"|réponses?\s*(?:est|sont|correctes?|justes?|\s|:)+"
    r"|ответ(?:ы)?\s*[:：—-])"
)
_JOIN = r"\s*(?:[,，、;/&+]|\band\b|\bet\b|\bи\b)?\s*"
_HEADINGS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")


def letters(text: str, allowed: Sequence[str]) -> frozenset[str]:
    """The answer letters of a free text; empty where it names none.

    The last "答案为A" / "The answer is A" counts; without one, a text that begins with letters.
    """
    one = f"[{''.join(allowed)}]"
    run = rf"(?P<run>{one}(?:{_JOIN}{one})*)"
    after = rf"{_PHRASE}[\s*(（「]*(?:option|选项)?\s*{run}(?![A-Za-z])"
    found = list(re.finditer(f"(?i:{after})".replace(one, f"(?-i:{one})"), text))
    if not found:
        start = re.match(rf"[\s*(（]*{run}(?=\s*$|\s*\n|\s*[.,:;。，：、)）*])", text)
        found = [start] if start else []
    return frozenset(re.findall(one, found[-1]["run"])) if found else frozenset()


def pick(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that a free text names, or None where it names none or several."""
    if all(len(choice) == 1 and "A" <= choice <= "Z" for choice in choices):
        found = letters(text, choices)
        return next(iter(found)) if len(found) == 1 else None
    plain = text.strip(" \n\t.。!！\"'“”").casefold()
    begins = [c for c in choices if plain.startswith(c.casefold())]
    if begins:
        return max(begins, key=len)
    inside = [c for c in choices if c.casefold() in plain]
    longest = max(inside, key=len, default=None)
    if longest and all(c.casefold() in longest.casefold() for c in inside):
        return longest
    return None


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
