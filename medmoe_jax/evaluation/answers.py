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
from medmoe_jax.evaluation import answer_words as words_of
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
    doubtful: perhaps one of the denied after it, as in "Answer: A, B and D are wrong".
    """

    start: int
    stop: int
    choices: tuple[str, ...]
    denied: bool = False
    open: bool = False
    evidence: Evidence = Evidence.MENTION
    doubtful: bool = False


_BESIDE = ("OPTION", "TICK", "CROSS")  # may stand before a choice that begins a line
_SKIPPED = ("FILLER", *_BESIDE)
_MOST_WORDS = 8  # between "the answer" and "is"


def letters(text: str, allowed: Sequence[str], texts: Sequence[str] = ()) -> frozenset[str]:
    """The answer letters of a free text; empty where it names none, or leaves it open.

    allowed: the item's letters. texts: its options in their order, where they are known: then
    "B. heparin" is told from "E. coli", and a text that names an option alone gives its letter.
    """
    text = _unlisted(text, tuple(allowed), tuple(texts))
    best = _best(text, tuple(allowed), tuple(texts))
    if best is None and texts:
        named = tokens.folded(_word(text, tuple(texts)) or "")
        alike = [n for n, option in enumerate(texts) if tokens.folded(option) == named]
        return frozenset(allowed[alike[0]]) if named and len(alike) == 1 else frozenset()
    return frozenset(best.choices) if best and not best.open else frozenset()


def all_letters(text: str, allowed: Sequence[str]) -> frozenset[str]:
    """The answer letters where several may be right, also one a line, or not in order.

    Verdicts are joined ("A is correct, C is correct"), and so are bare letters, unless the last
    ones are several already; of what is called the answer the last counts.
    """
    text = _unnumbered(_raised(tokens.spoken(text), allowed), allowed)
    text = _in_order(_unjoined(text, allowed), allowed)
    boxed = _boxed(text)
    inside = all_letters(boxed, allowed) if boxed else frozenset()
    if inside:
        return inside
    found = tokens.read(text, letters=tuple(allowed))
    runs = _runs(found)
    _join_lines(found, runs, allowed)
    best = _strongest(runs)
    if best is None or best.open:
        return frozenset()
    if len(best.choices) > 1 or best.evidence not in (Evidence.VERDICT, Evidence.BARE):
        return frozenset(best.choices)
    equal = (run for run in runs if run.evidence == best.evidence and not (run.denied or run.open))
    return frozenset(choice for run in equal for choice in run.choices)


def _unjoined(text: str, allowed: Sequence[str]) -> str:
    """The text with commas for what else may join letters: "A, C" for "A-C", "A – C" and "A+C"."""
    letter = f"[{''.join(allowed)}]"
    joined = rf"(?<![\w+-]){letter}(?: *[-–—+] *{letter})+(?![\w+'’-]|\. ?[a-z])"
    return re.sub(joined, lambda found: ", ".join(re.findall(letter, found[0])), text)


def _unnumbered(text: str, allowed: Sequence[str]) -> str:
    """The text without the numbers of a list of letters: "A C" for "1. A 2. C"."""
    letter = f"[{''.join(allowed)}]"
    before = rf"^[^\w\n]*|[:,;] *|(?<!\w){letter}[,;]? +"
    number = rf"({before})\d{{1,2}} ?[.):] *(?=[^\w\n]{{0,3}}{letter}(?!\w))"
    return re.sub(number, r"\1", text, flags=re.M)


def _raised(text: str, allowed: Sequence[str]) -> str:
    """The text with capital letters in lists of small ones: "a, c and d"."""
    letter = f"[{''.join(allowed).lower()}]"
    ands = "|".join(map(re.escape, tokens.entries("AND")))
    joint = rf"(?: *[,;、] *(?:(?:{ands}) )?| (?:{ands}) | [-–—] )"
    listed = rf"(?<![\w'’.-]){letter}(?:{joint}{letter})+(?![\w'’-]|\.\w)"
    return re.sub(listed, lambda found: found[0].upper(), text)


def _in_order(text: str, allowed: Sequence[str]) -> str:
    """The text with the letters of its last word in order: "AC" for "CA"."""
    last = re.search(rf"(?<![A-Za-z\d])[{''.join(allowed)}]+(?=\W*$)", text)
    if last is None or len(set(last[0])) < len(last[0]):
        return text
    return text[: last.start()] + "".join(sorted(last[0])) + text[last.end() :]


_LEAST_OPTIONS = 4  # of a question: a list of A to D may be all of them


def _join_lines(found: list[AnswerToken], runs: list[ChoiceRun], allowed: Sequence[str]) -> None:
    """Marks the letters that begin lines, where they rise and are not the first options in turn."""
    starts = [run for run in runs if _leads(found, run) and not run.denied]
    first = "".join("".join(run.choices) for run in starts)
    options = len(starts) >= _LEAST_OPTIONS and "".join(allowed).startswith(first)
    rising = all(a < b for a, b in itertools.pairwise(first))
    if len(first) == len(starts) and rising and not options:
        for run in starts:
            run.evidence = max(run.evidence, Evidence.BARE)


def pick(text: str, choices: Sequence[str], texts: Sequence[str] = ()) -> str | None:
    """The one choice that a free text names, or None where it names none or several.

    choices: letters, or words. texts: what the letters stand for, where it is known.
    """
    if all(len(choice) == 1 and "A" <= choice <= "Z" for choice in choices):
        found = letters(text, choices, texts)
        return next(iter(found)) if len(found) == 1 else None
    alone = frozenset(filter(tokens.single, choices))
    return _word(_unlisted(text, tuple(choices)), tuple(choices), alone)


def _unlisted(text: str, choices: tuple[str, ...], texts: tuple[str, ...] = ()) -> str:
    """The text without a mere list of all the choices in their order: it names none of them.

    Such a list has one choice a line, or letters with their texts, on one line or many.
    """
    text = tokens.spoken(text)
    between = f"[^\\w{tokens.TICKS}{tokens.CROSSES}]"  # what is ticked is no mere list
    beside = f"{between[:-1]}\n]"
    for names in (choices, texts):
        lines = rf"{beside}*\n{between}*".join(map(_pattern, names))
        text = (
            re.sub(rf"^{beside}*{lines}{beside}*$", "", text, flags=re.M | re.I) if names else text
        )
    pairs = zip(choices, texts, strict=False)
    options = rf"{between}+".join(
        rf"{_pattern(choice)}\W+{_pattern(name)}" for choice, name in pairs
    )
    return re.sub(rf"^{beside}*{options}(?!\w)", "", text, flags=re.M | re.I) if texts else text


def _pattern(name: str) -> str:
    """What finds a choice, whatever its spaces."""
    return r"\s+".join(map(re.escape, tokens.normal(name).split()))


def said(text: str) -> list[str]:
    """What a free text gives as its answer, the surest last: after "the answer is", in its box."""
    boxed = _boxed(text)
    found = [match[1] for match in re.finditer(_SAID, tokens.spoken(text), re.I)]
    return [*found, boxed] if boxed else found


_SAID = r"(?:(?<!\bthis )answer[\s*\"]*(?:is\b|[:=])|答案[\s*]*[为是:])[\s*:=$]*"
_SAID += r"(?:not\b[^\n]*?\bbut\b)?(.+)"


def _best(text: str, choices: tuple[str, ...], texts: tuple[str, ...]) -> ChoiceRun | None:
    """The run of letters that is the text's answer."""
    boxed = _boxed(text)
    if boxed:
        inside = _best(boxed, choices, texts)
        if inside:
            return inside
    return _strongest(_runs(tokens.read(text, letters=choices, texts=texts)))


def _strongest(runs: list[ChoiceRun]) -> ChoiceRun | None:
    """The last run of the strongest evidence, unless several are but called an option."""
    given = [run for run in runs if not run.denied and run.evidence > Evidence.MENTION]
    best = max(reversed(given), key=lambda run: run.evidence, default=None)
    if best and best.evidence == Evidence.CALLED and len({run.choices for run in given}) > 1:
        return None
    return best


def _word(text: str, choices: tuple[str, ...], alone: frozenset[str] = frozenset()) -> str | None:
    """The one label or option text that a text names.

    alone: labels such as "a" or "2", which are common in texts as well: to be mentioned is not
      enough for a letter, nor for a number within a sentence.
    """
    boxed = _boxed(text)
    if boxed:
        inside = _word(boxed, choices, alone)
        if inside:
            return inside
    letters_alone = frozenset(filter(str.isalpha, alone))
    found = tokens.read(text, words=choices, alone=letters_alone)
    runs = _runs(found)
    given = [run for run in runs if not run.denied]
    plain = [run for run in given if run.evidence > Evidence.CALLED]
    best = max(reversed(plain), key=lambda run: run.evidence, default=None)
    if best:
        return best.choices[0] if len(set(best.choices)) == 1 and not best.open else None
    named = {choice for run in given for choice in run.choices}
    weak = alone if not any(_sentence_end(found, run) for run in given) else letters_alone
    if len(named) != 1 or (named <= weak and not any(run.evidence for run in given)):
        return None
    return named.pop()


_BOXES = (
    r"\\(?:f?boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
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
    later = False  # whether a verdict follows
    for run in reversed(runs):
        run.denied = run.denied or (run.doubtful and later)
        later = later or (not run.denied and run.evidence >= Evidence.VERDICT)
    _bare(found, runs)
    return runs


def _gather(found: list[AnswerToken], start: int) -> ChoiceRun:
    """The run that begins at a token: choices joined by commas, "and", "or", or nothing."""
    stop, choices, open_ = start + 1, [*found[start].choices], _role_before(found, start) == "OR"
    while True:
        at = stop
        while at < len(found) and (found[at].role in ("AND", "OR", *_SKIPPED) or _comma(found[at])):
            at += 1
        joints = {"SEP" if _comma(token) else token.role for token in found[stop:at]}
        joined = at == stop or joints & {"SEP", "AND", "OR"}
        if at == len(found) or found[at].role != CHOICE or not joined:
            return ChoiceRun(start, stop, tuple(choices), open=open_)
        again = len(set(choices)) > 1 and set(found[at].choices) & set(choices)
        if again and "SEP" in joints:  # "Of A and B, A is better"
            return ChoiceRun(start, stop, tuple(choices), open=open_)
        open_ = open_ or "OR" in joints
        choices += found[at].choices
        stop = at + 1


def _comma(token: AnswerToken) -> bool:
    return token.role == "SEP" or token.text == ";"


def _role_before(found: list[AnswerToken], start: int, skipped: Sequence[str] = _SKIPPED) -> str:
    """What the word before a place does, without what says nothing, or ''."""
    roles = (found[at].role for at in reversed(range(start)))
    return next((role for role in roles if role not in skipped), "")


def _parted(found: list[AnswerToken], run: ChoiceRun) -> list[ChoiceRun]:
    """The run, or two: in "The answer is C, A and B are wrong", what is said of B is not said of C.

    Before what is denied a semicolon parts, and so does a fall, for a list rises ("C, A"). Else the
    first comma or bracket does, though only after "the answer is", where the last one does as well
    before what something else is told of: "The answer is C, A is a distractor".
    """
    said = _said_after(found, run.stop) or _told_of(found, run)
    inside = range(run.start + 1, run.stop)
    joints = [i for i in inside if _comma(found[i])]
    conjunctions = any(found[i].role in ("AND", "OR") for i in inside)
    if said == "denied":  # "C (A and B are wrong)"
        joints = [i for i in inside if i in joints or found[i - 1].role == found[i].role == CHOICE]
    together = conjunctions or _plural(found, run.stop)
    if not joints or not said or (said == "right" and together):
        return [run]
    ends = [i for i in joints if found[i].text == ";"]
    sure = [i for i in joints if i in ends or _falls(found, i)]
    if said != "denied":
        cut, least = joints[-1], Evidence.CALLED if said == "right" else Evidence.STRONG
    elif sure:
        cut, least = sure[0], Evidence.VERDICT
    else:
        cut, least = next((i for i in joints if found[i].text != "、"), joints[0]), Evidence.STRONG
    first = _gather(found[:cut], run.start)
    evidence, denied = _said_before(found, [], first)
    if evidence < least and not denied and not (ends == [cut] and _begins(found, first)):
        return [run]
    first.doubtful = conjunctions and not sure
    rest = next(i for i in range(cut, run.stop) if found[i].role == CHOICE)
    return [first, _gather(found[: run.stop], rest)]


def _plural(found: list[AnswerToken], at: int) -> bool:
    """Whether what follows is said of several: "A, C are right"."""
    return any(token.text in words_of.PLURAL for token in found[at : at + 1])


def _told_of(found: list[AnswerToken], run: ChoiceRun) -> str:
    """'told' where something is told of the last choice of a run alone: "C, A is a distractor"."""
    at = run.stop
    while at < len(found) and found[at].role == "OPTION":
        at += 1
    joints = [token for token in found[run.start : run.stop] if token.role != CHOICE]
    apart = bool(joints) and _comma(joints[-1]) and all(token.text != "、" for token in joints)
    told = apart and at < len(found) and found[at].role == "COPULA" and not _plural(found, at)
    return "told" if told else ""


def _marked_as(found: list[AnswerToken], at: int) -> str:
    """'right', 'denied' or '' from one word after a colon or dash: "A: true, B: false"."""
    colon, word, after = (found[at : at + 3] + [None] * 3)[:3]
    if (
        colon is None
        or colon.role != "COLON"
        or word is None
        or (after and after.role not in _FREE)
    ):
        return ""
    if word.role == "RIGHT" or word.text in words_of.YES:
        return "right"
    return "denied" if word.role == "WRONG" or word.text in words_of.NO else ""


def _falls(found: list[AnswerToken], comma: int) -> bool:
    """Whether the choice after a comma is an earlier one than that before it."""
    before = next(token for token in reversed(found[:comma]) if token.role == CHOICE)
    after = next(token for token in found[comma:] if token.role == CHOICE)
    return after.choices[0] < before.choices[-1]


def _judge(found: list[AnswerToken], earlier: list[ChoiceRun], run: ChoiceRun) -> None:
    """Fills in whether a run is denied, and its evidence from its own sentence."""
    evidence, denied = _said_before(found, earlier, run)
    after = _said_after(found, run.stop, _role_before(found, run.start) == "CHOOSE")
    marked = _marked_as(found, run.stop)
    if marked:  # whatever was said of the one before it
        evidence, denied, after = Evidence.VERDICT, marked == "denied", ""
    run.denied = denied or after == "denied"
    run.open = run.open or _or_another(found, run.stop)
    standing = run.start == 0 or found[run.start - 1].role != "WORD" or found[run.start].marked
    if after == "right" and standing:
        evidence = max(evidence, Evidence.VERDICT)
    run.evidence = min(evidence, Evidence.BARE) if _supposed(found, run) else evidence


def _supposed(found: list[AnswerToken], run: ChoiceRun) -> bool:
    """Whether the sentence of a run only supposes: "If …, the answer would be C"."""
    told = {token.text for token in _sentence(found, run)}
    return bool(told & words_of.IF and told & words_of.WOULD)


def _sentence(found: list[AnswerToken], run: ChoiceRun) -> list[AnswerToken]:
    """The tokens of the sentence of a run; a comma that parts "if" from "would" is in it."""
    start, stop = _around(found, run, tokens.ENDS)
    return found[start:stop]


def _around(found: list[AnswerToken], run: ChoiceRun, signs: str) -> tuple[int, int]:
    """Where the stretch between such signs around a run begins and ends."""
    start, stop = run.start, run.stop
    while start > 0 and found[start - 1].text not in signs:
        start -= 1
    while stop < len(found) and found[stop].text not in signs:
        stop += 1
    return start, stop


def _said_before(
    found: list[AnswerToken], earlier: list[ChoiceRun], run: ChoiceRun
) -> tuple[Evidence, bool]:
    """(evidence, denied) from what stands before a run in its sentence."""
    link = denied = but = contrast = concluded = called = pointed = comma = False
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
            denied = denied or not (words or but or contrast)
        elif role == "SO":
            concluded = concluded or not words
        elif role == "OPTION" and link:
            return Evidence.STRONG, denied
        elif role == "OPTION":
            called = True
        elif role == "CHOOSE" and not words:
            refused = _role_before(found, at, ("CHOOSE", "COPULA", *_SKIPPED)) == "NOT"
            return Evidence.STRONG, denied or (not contrast and refused)
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
        elif role == "BUT":
            but = True
        at -= 1
    opened = at < 0 or found[at].role == "END"
    if concluded or contrast or pointed or (link and opened and not words):
        corrects = words_of.CORRECTING & {token.text for token in _sentence(found, run)}
        return Evidence.STRONG if corrects else Evidence.VERDICT, denied
    called = called or (link and opened and _sentence_end(found, run))  # "The diagnosis is C."
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


def _said_after(found: list[AnswerToken], at: int, chosen: bool = False) -> str:
    """'right', 'denied' or '' from what stands after a run.

    chosen: after a verb of choosing a "not" at the end denies: "Ich wähle A nicht".
    """
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
            ends = role in ("END", "SEP", "BUT")
            return "denied" if not_ and (link or (chosen and ends)) and role != CHOICE else ""
        at += 1
    return "denied" if not_ and (link or chosen) else ""


def _bare(found: list[AnswerToken], runs: list[ChoiceRun]) -> None:
    """Marks runs that are the whole text, its start, or its last sentence.

    A text whose lines begin with one choice after the other lists them: of such lines, those count
    that say so themselves ("C. Warfarin - correct"), or that stand before or after the list.
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
    for run in _beside_lists(starts):
        run.evidence = max(run.evidence, Evidence.BARE)
    for run in runs:
        if _sentence_end(found, run) and _sentence_start(found, run) and _is_last(found, run):
            run.evidence = max(run.evidence, Evidence.BARE)


def _beside_lists(starts: list[ChoiceRun]) -> list[ChoiceRun]:
    """The runs that stand alone before a list that rises, or after it, all at the start of a line.

    In "C. Warfarin", "A. Aspirin is …", "B. Heparin is …" it is C.
    """
    lists: list[list[ChoiceRun]] = []
    for run in starts:
        if lists and lists[-1][-1].choices < run.choices:
            lists[-1].append(run)
        else:
            lists.append([run])
    beside = []
    if len(lists) == 2 and len(lists[0]) == 1:
        beside += lists[0]
    if len(lists) > 1 and len(lists[-1]) == 1 < len(lists[-2]):
        beside += lists[-1]
    return beside


def _line(found: list[AnswerToken], run: ChoiceRun) -> str:
    """'right', 'denied' or '' from the line that a run begins."""
    start, stop = _around(found, run, "\n")
    line = found[run.stop : stop]
    roles = [token.role for token in line]
    ticks = {token.role for token in found[start:stop]}
    right = [i for i, role in enumerate(roles) if role == "RIGHT"]
    if (
        "CROSS" in ticks
        or "WRONG" in roles
        or ("NOT" in roles and right)
        or _told(line, words_of.NO)
    ):
        return "denied"
    links = ("COLON", "COPULA")
    said = right and (not right[0] or roles[right[0] - 1] in links)
    return "right" if said or "TICK" in ticks or _told(line, words_of.YES) else ""


def _told(line: list[AnswerToken], words: frozenset[str]) -> bool:
    """Whether one of these words stands alone after a colon or dash: "B: yes, since …"."""
    return any(
        before.role == "COLON" and token.text in words and (after is None or after.role in _FREE)
        for before, token, after in zip(line, line[1:], [*line[2:], None], strict=False)
    )


_FREE = ("END", "SEP", "COLON", "TAIL", "BUT", "SO", "ANSWER", *_BESIDE[1:])


def _leads(found: list[AnswerToken], run: ChoiceRun) -> bool:
    """Whether a run begins a line and something other than a word follows."""
    after = found[run.stop].role if run.stop < len(found) else "END"
    free = found[run.stop - 1].marked or after in _FREE
    before = run.start - 1
    while before >= 0 and found[before].role in _BESIDE:
        before -= 1
    return free and (before < 0 or found[before].text == "\n")


def _begins(found: list[AnswerToken], run: ChoiceRun) -> bool:
    return _leads(found, run) and all(
        token.role in _BESIDE or token.text == "\n" for token in found[: run.start]
    )


def _sentence_start(found: list[AnswerToken], run: ChoiceRun) -> bool:
    at = run.start - 1
    while at >= 0 and found[at].role in ("SEP", *_SKIPPED):  # "Yes, B."
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
