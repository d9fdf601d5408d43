"""Which choice a free text names.

A letter or word is read as an answer only where it stands as one: after "the answer is", in a box,
in a conclusion, before "is correct", or alone. The text is cut into tokens that know what they do
in a sentence (`answer_words`), so that one set of rules serves every language:

| evidence | example |
|---|---|
| `STRONG` | `The answer is C`, `答案：Ｂ`, `\\boxed{C}`, `I choose C` |
| `VERDICT` | `Option C is right`, `so C`, `not A but C` |
| `BARE` | `C`, `B. because …`, a last line `C` |
| `CALLED` | `this fits option C`, where no other is named so |

The strongest evidence counts, and of equals the last. What is denied ("not A", "A and B are wrong")
is no answer, nor is what is left open ("A or B").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from medmoe_jax.evaluation import answer_tokens as tokens
from medmoe_jax.evaluation.answer_tokens import CHOICE, AnswerToken


class Evidence(IntEnum):
    """How plainly a text gives an answer."""

    MENTION = 0
    CALLED = 1
    BARE = 2
    VERDICT = 3
    STRONG = 4


@dataclass
class ChoiceRun:
    """Choices that stand together, as in "A, C and D".

    start, stop: its tokens. denied: "not A". open: "A or B".
    """

    start: int
    stop: int
    choices: tuple[str, ...]
    denied: bool = False
    open: bool = False
    evidence: Evidence = Evidence.MENTION


_SKIPPED = ("FILLER", "OPTION")
_MOST_WORDS = 8  # between "the answer" and "is"


def letters(text: str, allowed: Sequence[str], texts: Sequence[str] = ()) -> frozenset[str]:
    """The answer letters of a free text; empty where it names none, or leaves it open.

    allowed: the item's letters. texts: its options in their order, where they are known: then
    "B. heparin" is told from "E. coli", and a text that names an option alone gives its letter.
    """
    best = _best(text, tuple(allowed), tuple(texts))
    if best is None and texts and len(set(texts)) == len(texts):
        named = _word(text, tuple(texts))
        return frozenset() if named is None else frozenset(allowed[texts.index(named)])
    return frozenset(best.choices) if best and not best.open else frozenset()


def pick(text: str, choices: Sequence[str], texts: Sequence[str] = ()) -> str | None:
    """The one choice that a free text names, or None where it names none or several.

    choices: letters, or words. texts: what the letters stand for, where it is known.
    """
    if all(len(choice) == 1 and "A" <= choice <= "Z" for choice in choices):
        found = letters(text, choices, texts)
        return next(iter(found)) if len(found) == 1 else None
    return _word(text, tuple(choices))


def last_said(text: str) -> str:
    """What a free text gives as its answer: what is in its box, or what follows "the answer is".

    Where it says neither, "".
    """
    boxed = _boxed(text)
    found = list(re.finditer(_SAID, tokens.spoken(text), re.I))
    return boxed or (found[-1][1] if found else "")


_SAID = r"(?:answer\s*(?:is|:|=)|答案(?:为|是|：|:))\s*(.+)"


def _best(text: str, choices: tuple[str, ...], texts: tuple[str, ...]) -> ChoiceRun | None:
    """The run of letters that is the text's answer."""
    boxed = _boxed(text)
    if boxed:
        inside = _best(boxed, choices, texts)
        if inside:
            return inside
    found = tokens.read(text, letters=choices, texts=texts)
    given = [run for run in _runs(found) if not run.denied and run.evidence > Evidence.MENTION]
    best = max(reversed(given), key=lambda run: run.evidence, default=None)
    if best and best.evidence == Evidence.CALLED and len({run.choices for run in given}) > 1:
        return None
    return best


def _word(text: str, choices: tuple[str, ...]) -> str | None:
    """The one label or option text that a text names."""
    boxed = _boxed(text)
    if boxed:
        inside = _word(boxed, choices)
        if inside:
            return inside
    runs = _runs(tokens.read(text, words=choices))
    given = [run for run in runs if not run.denied]
    plain = [run for run in given if run.evidence > Evidence.CALLED]
    best = max(reversed(plain), key=lambda run: run.evidence, default=None)
    if best:
        return best.choices[0] if len(set(best.choices)) == 1 and not best.open else None
    named = {choice for run in given for choice in run.choices}
    return named.pop() if len(named) == 1 else None


_BOXES = (
    r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
    r"<(?:final_)?answer>(.*?)</(?:final_)?answer>",
    r"\"(?:final_)?answer(?:_choice)?\"\s*:\s*\"(.*?)\"",
    r"\[\[(.*?)\]\]",
)


def _boxed(text: str) -> str:
    """What stands in the last box of a text, or ''."""
    text = tokens.spoken(text)
    found = [match for box in _BOXES for match in re.finditer(box, text, re.S | re.I)]
    return max(found, key=lambda match: match.start())[1] if found else ""


def _runs(found: list[AnswerToken]) -> list[ChoiceRun]:
    """All runs of choices, with what is said of them."""
    runs: list[ChoiceRun] = []
    at = 0
    while at < len(found):
        if found[at].role == CHOICE:
            run = _gather(found, at)
            at = run.stop
            runs.append(run)
        else:
            at += 1
    runs = [part for run in runs for part in _parted(found, run)]
    for i, run in enumerate(runs):
        _judge(found, runs[:i], run)
    _bare(found, runs)
    return runs


def _gather(found: list[AnswerToken], start: int) -> ChoiceRun:
    """The run that begins at a token: choices joined by commas, "and", "or", or nothing."""
    stop, choices, open_ = start + 1, [*found[start].choices], _between(found, start)
    while True:
        at = stop
        while at < len(found) and (found[at].role in ("AND", "OR", *_SKIPPED) or _comma(found[at])):
            at += 1
        joints = {"SEP" if _comma(token) else token.role for token in found[stop:at]}
        joined = at == stop or joints & {"SEP", "AND", "OR"}
        if at == len(found) or found[at].role != CHOICE or not joined:
            return ChoiceRun(start, stop, tuple(choices), open=open_)
        open_ = open_ or "OR" in joints
        choices += found[at].choices
        stop = at + 1


def _comma(token: AnswerToken) -> bool:
    return token.role == "SEP" or token.text == ";"


def _between(found: list[AnswerToken], start: int) -> bool:
    """Whether "either" or "between" stands before a run."""
    at = start - 1
    while at >= 0 and found[at].role in _SKIPPED:
        at -= 1
    return at >= 0 and found[at].role == "OR"


def _parted(found: list[AnswerToken], run: ChoiceRun) -> list[ChoiceRun]:
    """The run, or two: in "The answer is A, B is wrong", what is said of B is not said of A."""
    inside = found[run.start : run.stop]
    commas = [i for i, token in enumerate(inside, run.start) if _comma(token)]
    conjunctions = any(token.role in ("AND", "OR") for token in inside)
    if not commas or conjunctions or not _said_after(found, run.stop):
        return [run]
    first = ChoiceRun(run.start, commas[-1], _choices(found[run.start : commas[-1]]), open=run.open)
    last = ChoiceRun(commas[-1] + 1, run.stop, _choices(found[commas[-1] : run.stop]))
    evidence, _ = _said_before(found, [], first)
    return [first, last] if evidence else [run]


def _choices(tokens_: list[AnswerToken]) -> tuple[str, ...]:
    return tuple(choice for token in tokens_ for choice in token.choices)


def _judge(found: list[AnswerToken], earlier: list[ChoiceRun], run: ChoiceRun) -> None:
    """Fills in whether a run is denied, and its evidence from its own sentence."""
    evidence, denied = _said_before(found, earlier, run)
    after = _said_after(found, run.stop)
    run.denied = denied or after == "denied"
    run.open = run.open or _or_another(found, run.stop)
    standing = run.start == 0 or found[run.start - 1].role != "WORD" or found[run.start].marked
    if after == "right" and standing:
        evidence = max(evidence, Evidence.VERDICT)
    run.evidence = evidence


def _said_before(
    found: list[AnswerToken], earlier: list[ChoiceRun], run: ChoiceRun
) -> tuple[Evidence, bool]:
    """(evidence, denied) from what stands before a run in its sentence."""
    link = denied = contrast = concluded = called = pointed = comma = False
    words = 0
    at = run.start - 1
    while at >= 0:
        token = found[at]
        role = token.role
        if role == "END" and not _crossed(found, at):
            break
        if role == "TAIL":
            pointed = link and not words and token.text in _POINTERS
            if not link or pointed:
                break
        if role in ("COPULA", "COLON"):
            link = True
        elif role == "NOT" or (role == "WRONG" and not (comma or concluded)):
            denied = denied or not (words or contrast)
        elif role == "SO":
            concluded = concluded or not words
        elif role == "OPTION" and link:
            return Evidence.STRONG, denied
        elif role == "OPTION":
            called = True
        elif role == "CHOOSE" and not words:
            return Evidence.STRONG, denied
        elif role == "ANSWER":
            if link or not words:
                return Evidence.STRONG, denied
            break
        elif role == "RIGHT" and (link or called or not comma):
            return Evidence.STRONG, denied
        elif role == CHOICE:
            other = next((r for r in earlier if r.start <= at < r.stop), None)
            if other is None or not other.denied:
                break
            contrast, at = True, other.start
        elif role == "WORD":
            words += 1
            if not link or words > _MOST_WORDS:
                break
        elif role in ("AND", "OR", "RIGHT") and not link:
            break
        elif role == "SEP":
            comma = True
        at -= 1
    opened = at < 0 or found[at].role == "END"
    if concluded or contrast or pointed or (link and opened and not words):
        return Evidence.VERDICT, denied
    return Evidence.CALLED if called else Evidence.MENTION, denied


def _or_another(found: list[AnswerToken], at: int) -> bool:
    """Whether "or" and another choice follow in the sentence: "A, or it could be B"."""
    while at < len(found) and (found[at].role in _SKIPPED or _comma(found[at])):
        at += 1
    if at == len(found) or found[at].role != "OR":
        return False
    rest = [token.role for token in found[at:]]
    sentence = rest[: rest.index("END")] if "END" in rest else rest
    return CHOICE in sentence


_POINTERS = ("it", "that", "this", "这", "它", "其")


def _crossed(found: list[AnswerToken], at: int) -> bool:
    """Whether a line ends in "the answer is:", so that its answer stands in the next.

    A semicolon before "but" ends nothing either.
    """
    if found[at].text == ";" and found[at + 1].role == "BUT":
        return True
    while at > 0 and found[at].text == "\n":
        at -= 1
    return found[at].role in ("COLON", "COPULA", "ANSWER")


def _said_after(found: list[AnswerToken], at: int) -> str:
    """'right', 'denied' or '' from what stands after a run."""
    link = not_ = False
    while at < len(found):
        role = found[at].role
        if role == "WRONG":
            return "" if not_ else "denied"
        if role == "NOT_AFTER":
            return "denied"
        if role == "NOT":
            not_ = True
            link = link or found[at].text.endswith("n't") or found[at].text == "cannot"
        elif role in ("RIGHT", "ANSWER", "CHOOSE"):
            return "denied" if not_ else "right"
        elif role == "COPULA":
            link = True
        elif role not in _SKIPPED:
            return "denied" if not_ and link and role != CHOICE else ""
        at += 1
    return "denied" if not_ and link else ""


def _bare(found: list[AnswerToken], runs: list[ChoiceRun]) -> None:
    """Marks runs that are the whole text, its start, or its last sentence.

    A text whose lines begin with one choice after the other lists them: of such lines, those count
    that say so themselves ("C. Warfarin - correct").
    """
    starts = [run for run in runs if _leads(found, run)]
    for run, after in itertools.zip_longest(starts, starts[1:]):
        if len({run.choices for run in starts}) > 1:
            said = _line(found, run)
            run.denied = run.denied or said == "denied"
            if said == "right":
                run.evidence = Evidence.VERDICT
            elif after and ord(after.choices[0][0]) - ord(run.choices[0][0]) == 1:
                run.evidence = Evidence.MENTION
        elif _begins(found, run):
            run.evidence = max(run.evidence, Evidence.BARE)
    for run in runs:
        if _sentence_end(found, run) and _sentence_start(found, run) and _is_last(found, run):
            run.evidence = max(run.evidence, Evidence.BARE)


def _line(found: list[AnswerToken], run: ChoiceRun) -> str:
    """'right', 'denied' or '' from the line that a run begins."""
    roles = [token.role if token.text != "\n" else "\n" for token in found[run.stop :]]
    roles = roles[: roles.index("\n")] if "\n" in roles else roles
    right = [i for i, role in enumerate(roles) if role == "RIGHT"]
    if "WRONG" in roles or ("NOT" in roles and right):
        return "denied"
    links = ("COLON", "COPULA")
    return "right" if right and (not right[0] or roles[right[0] - 1] in links) else ""


_FREE = ("END", "SEP", "COLON", "TAIL", "BUT", "SO", "ANSWER")


def _leads(found: list[AnswerToken], run: ChoiceRun) -> bool:
    """Whether a run begins a line and something other than a word follows."""
    after = found[run.stop].role if run.stop < len(found) else "END"
    free = found[run.stop - 1].marked or after in _FREE
    before = run.start - 1
    while before >= 0 and found[before].role == "OPTION":
        before -= 1
    return free and (before < 0 or found[before].text == "\n")


def _begins(found: list[AnswerToken], run: ChoiceRun) -> bool:
    return _leads(found, run) and all(
        token.role == "OPTION" or token.text == "\n" for token in found[: run.start]
    )


def _sentence_start(found: list[AnswerToken], run: ChoiceRun) -> bool:
    at = run.start - 1
    while at >= 0 and found[at].role in _SKIPPED:
        at -= 1
    return at < 0 or found[at].role in ("END", "COLON")


def _sentence_end(found: list[AnswerToken], run: ChoiceRun) -> bool:
    at = run.stop
    while at < len(found) and found[at].role in _SKIPPED:
        at += 1
    return at == len(found) or found[at].role == "END"


def _is_last(found: list[AnswerToken], run: ChoiceRun) -> bool:
    """Whether nothing but signs follows a run."""
    return all(token.role in ("END", *_SKIPPED) for token in found[run.stop :])
