"""Cuts a free text into tokens that know what they do in a sentence (`answer_words`).

A choice becomes a token of role `CHOICE` only where it is a word of its own: "B12", "B-cell",
"E. coli" and "unknown" hold none.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from medmoe_jax.evaluation import answer_words as words_of

CHOICE = "CHOICE"
ROLES = (
    *("ANSWER", "CHOOSE", "OPTION", "RIGHT", "WRONG", "NOT", "NOT_AFTER", "BUT", "SO", "AND"),
    *("OR", "COPULA", "FILLER", "ARTICLE", "TAIL", "OTHER"),
)


class AnswerToken(NamedTuple):
    """A piece of a text.

    role: one of `ROLES` but `ARTICLE`, or `CHOICE`, `WORD`, `SEP` (a comma), `COLON` (or a dash),
      `TICK` (✓), `CROSS` (✗) or `END`.
    choices: of a `CHOICE`, what it names. marked: in brackets, bold or the like.
    """

    role: str
    text: str
    choices: tuple[str, ...] = ()
    marked: bool = False


_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")


def normal(text: str) -> str:
    """The text in one form of its signs, as a keyboard has them: - for a minus, 10^3 for 10³."""
    raised = _RAISED.sub(r"^\g<0>", text)
    plain = unicodedata.normalize("NFKC", raised).replace("\u2212", "-")
    return plain.replace("\ufe0f", "")  # which makes a sign a picture: ✔️


def folded(text: str) -> str:
    """The text as choices are compared: small letters, single spaces."""
    return " ".join(normal(text).lower().split())


# Signs of a page's text; one that nothing closes is none, for "<B>" may be an answer.
_TAG = r"<(b|i|u|p|em|code|mark|span|strong)(?: [^>]*)?>(?=.*</\1>)"
_TAG += r"|</(?:b|i|u|p|em|code|mark|span|strong)>"


def spoken(text: str) -> str:
    """The text in one form of its signs, without thoughts before the answer.

    Thoughts that never end leave nothing.
    """
    text = normal(text).rpartition("</think>")[2]
    text = text.partition("<think>")[0]
    text = re.sub(
        r"\\(?:text|textbf|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}", r"\1", text
    )
    text = re.sub(r"\\[()\[\]]", "$", text)
    text = re.sub(_TAG, "*", text, flags=re.I | re.S)
    return re.sub(r"[^\S\n]+", " ", text)


def read(
    text: str,
    *,
    letters: Sequence[str] = (),
    words: Sequence[str] = (),
    texts: Sequence[str] = (),
    alone: frozenset[str] = frozenset(),
) -> list[AnswerToken]:
    """The tokens of a text in which letters or words may be chosen.

    texts: what the letters stand for. alone: words that name nothing before another word. Questions
    are left out, unless nothing else names a choice.
    """
    found = _Reader(spoken(text), letters, words, texts).tokens(alone)
    told = _without_questions(found)
    return told if any(token.role == CHOICE for token in told) else found


def _without_questions(found: Sequence[AnswerToken]) -> list[AnswerToken]:
    kept: list[AnswerToken] = []
    start = 0
    for token in found:
        if token.role == "END" and token.text == "?":
            del kept[start:]
        kept.append(token)
        if token.role == "END":
            start = len(kept)
    return kept


@functools.cache
def _table() -> tuple[dict[str, str], dict[str, str], int]:
    """(entry -> role, beginning of a word -> role, length of the longest entry)."""
    whole, begins = {}, {}
    for role in reversed(ROLES):  # of an entry in two roles, the first in ROLES holds
        for line in getattr(words_of, role).split("\n"):
            for entry in line.split()[1:]:
                entry = entry.replace("_", " ").lower()
                if entry.endswith("*"):
                    begins[entry[:-1]] = role
                else:
                    whole[entry] = role
    return whole, begins, max(map(len, whole))


def entries(role: str) -> list[str]:
    """The whole entries of the table in a role."""
    return [entry for entry, of in _table()[0].items() if of == role]


def _is_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def single(choice: str) -> bool:
    """Whether a choice is one letter or digit, which may be a word of its own: "a", "В", "2"."""
    return len(choice) == 1 and _is_word(choice) and not _unspaced(choice)


def _unspaced(character: str) -> bool:
    """Whether words of this script stand together without spaces."""
    name = unicodedata.name(character, "")
    return name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA", "HANGUL"))


def _kana(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("HIRAGANA", "KATAKANA"))


ENDS, _SEPS, _COLONS = ".!?;。؟।…\n", ",、،/", ":=—–"
_DASHES = "-–—"
_SIGNS = {"؟": "?"}
TICKS, CROSSES = "✓✔✅☑√", "✗✘❌✖×"
_OPENERS, _CLOSERS = "([{<«“\"'‘「『【《〈*`$|_", ")]}>»”\"'’」』】》〉*`$|_"
_AFTER_KANA = ("です", "だ", "と", "である", "でしょう")
_AFTER_SIGN = ".!?;,。、…" + _CLOSERS
_BEFORE_LONE = "为是选很较应即属于は가이"


def _spaced(text: str) -> str:
    """What finds a text, whatever its spaces."""
    return r"\s+".join(map(re.escape, text.split()))


@functools.lru_cache(4096)
def _lettered(text: str, letters: tuple[str, ...]) -> bool:
    """Whether an option's text holds choices itself, and is more than one: "A and B", "B>A>C"."""
    alone = re.sub(r"\W", "", text).upper() in letters
    return not alone and any(token.role == CHOICE for token in read(text.upper(), letters=letters))


@functools.lru_cache(256)
def _cue(choices: tuple[str, ...], least: int) -> re.Pattern:
    """A bracket that lists all choices, or the first ones, at least so many: "(A/B/C or D)"."""
    others = "|".join(map(re.escape, entries("OR")))
    joint = rf"(?:[^\w\n]+|[^\w\n]*(?:{others})[^\w\n]*)"
    names = [re.escape(choice.lower()) for choice in choices]
    more = "".join(f"(?:{joint}{name}" for name in names[least:]) + ")?" * len(names[least:])
    return re.compile(rf"[(\[【][ *]*{joint.join(names[:least])}{more}[ *]*[)\]】]")


class _Reader:
    """One text under its choices."""

    def __init__(self, text: str, letters, words, texts):
        self.text = text
        self.low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        self.letters = tuple(letters)
        self.texts = [folded(option) for option in texts]
        self.own: dict[int, int] = {}  # where an option's text begins and ends behind its letter
        pairs = zip(self.texts, self.letters, strict=False)
        lettered = (pair for pair in pairs if _lettered(pair[0], self.letters))
        self.lettered = dict(sorted(lettered, key=lambda pair: -len(pair[0])))
        given = {folded(word): word for word in words if folded(word)}
        self.words = dict(sorted(given.items(), key=lambda pair: -len(pair[0])))
        cyrillic = re.search(r"(?<!\w)[БГД](?!\w)", text)
        # Where several letters may be right, they are given as A to J, whatever the question has.
        self.cue = _cue(tuple(given), len(given)) if given else _cue(self.letters, 3)
        self.names = {**words_of.LETTER_NAMES, **(words_of.CYRILLIC_ORDER if cyrillic else {})}

    def tokens(self, alone: frozenset[str]) -> list[AnswerToken]:
        found: list[AnswerToken] = []
        glued: list[bool] = []  # whether a token touches the one before it
        at, free = 0, True
        while at < len(self.text):
            token, length = self._next(at, found)
            if token is not None:
                found.append(token)
                glued.append(not free)
                free = False
            elif self.text[at : at + length].isspace():
                free = True
            at += length
        return _standing(found, glued, bool(self.words), alone)

    def _next(self, at: int, found: Sequence[AnswerToken]) -> tuple[AnswerToken | None, int]:
        """The token at a place, if there is one, and how far it goes."""
        sign = self.text[at]
        cue = self._asking(at)
        option = cue or self._option(at)
        if option:
            return option
        if not _is_word(sign):
            return self._word(at) or (self._sign(at), 1)
        choice = self._word(at) if self.words else self._letter(at, found)
        known = self._known(at)
        if choice and not (known and known[1] > choice[1]):
            return choice
        if known:
            return known
        if _unspaced(sign):
            return AnswerToken("WORD", sign), 1
        stop = self._word_end(at)
        return AnswerToken("WORD", self.low[at:stop]), stop - at

    def _sign(self, at: int) -> AnswerToken | None:
        sign = _SIGNS.get(self.text[at], self.text[at])
        before, after = self._char(at - 1), self._char(at + 1)
        inside = _is_word(before) and _is_word(after)
        if sign in ENDS:
            if sign == "." and inside and before.isdigit():
                return None
            return AnswerToken("END", sign)
        if sign in _SEPS:
            return AnswerToken("SEP", sign)
        if sign in TICKS + CROSSES and not (
            sign in "√×" and re.match(r" *\w", self.text[at + 1 :])
        ):
            return AnswerToken("TICK" if sign in TICKS else "CROSS", sign)
        if sign in _DASHES and not self.text[self.text.rfind("\n", 0, at) + 1 : at].strip(" *"):
            return None  # a line of a list begins
        if sign in _COLONS or (sign == "-" and not inside and before in " *"):
            return AnswerToken("COLON", sign)
        return AnswerToken("AND", sign) if sign in "&+" and not inside else None

    def _asking(self, at: int) -> tuple[AnswerToken | None, int] | None:
        """A repeated "(A/B/C/D):", which asks for the answer in any language; "(A/B/C/D)" is none.

        "(A, B, C, D)" may be an answer, where no colon follows, and any where no choice follows.
        """
        cue = self.cue.match(self.low, at)
        if cue and not self._named_after(cue.end()):
            return None
        if cue and self.low[cue.end() :].lstrip(" *").startswith(":"):
            return AnswerToken("ANSWER", cue[0]), len(cue[0])
        return (None, len(cue[0])) if cue and "/" in cue[0] else None

    def _named_after(self, at: int) -> bool:
        """Whether a choice stands anywhere behind a place."""
        names = (name.lower() for name in self.words or self.letters)
        return any(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", self.low[at:]) for n in names)

    def _char(self, at: int) -> str:
        return self.text[at] if 0 <= at < len(self.text) else " "

    def _word_end(self, at: int) -> int:
        """Where the word at a place ends; an apostrophe or hyphen inside belongs to it."""
        stop = at
        while stop < len(self.text):
            sign, after = self.text[stop], self._char(stop + 1)
            joint = sign in "'’-" and _is_word(after) and not _unspaced(after) and stop > at
            if not joint and (not _is_word(sign) or (_unspaced(sign) and stop > at)):
                break
            stop += 1
        return max(stop, at + 1)

    def _known(self, at: int) -> tuple[AnswerToken, int] | None:
        """The longest entry of the table at a place."""
        whole, begins, longest = _table()
        apostrophes = self.low[at : at + longest].replace("’", "'")
        for length in range(len(apostrophes), 0, -1):
            entry = apostrophes[:length]
            stop = at + length
            if entry in whole and self._apart(at, stop) and not self._cuts(at, stop):
                return AnswerToken(whole[entry], entry), length
        stop = self._word_end(at)
        word = self.low[at:stop]
        for length in range(len(word), 2, -1):
            if word[:length] in begins:
                return AnswerToken(begins[word[:length]], word), stop - at
        return None

    def _cuts(self, start: int, stop: int) -> bool:
        """Whether a choice begins within a text and goes on behind it: はい in は + いいえ."""
        inside = ((at, self._word(at)) for at in range(start + 1, stop))
        return any(word and at + word[1] > stop for at, word in inside)

    def _apart(self, start: int, stop: int) -> bool:
        """Whether a text between two places is no part of a longer word, or number (1.5)."""
        first, last = self.text[start], self.text[stop - 1]
        before, after = self._char(start - 1), self._char(stop)
        if before == "." and self._char(start - 2).isdigit() and first.isdigit():
            return False
        if after == "." and last.isdigit() and self._char(stop + 1).isdigit():
            return False
        if not _unspaced(first) and (_is_word(before) and not _unspaced(before)):
            return False
        if not _unspaced(last) and (_is_word(after) and not _unspaced(after)):
            return False
        if after in "'’-" and _is_word(self._char(stop + 1)) and not _unspaced(last):
            return False
        return not (before in "'’-" and _is_word(self._char(start - 2)) and not _unspaced(first))

    def _word(self, at: int) -> tuple[AnswerToken, int] | None:
        """The longest word among the choices at a place."""
        for folded, choice in self.words.items():
            stop = at + len(folded)
            if not self.low.startswith(folded, at) or not self._apart(at, stop):
                continue
            if self._lone(folded, at, stop) and not self._signed(at):
                return AnswerToken(CHOICE, folded, (choice,), self._bracketed(at, stop)), len(
                    folded
                )
        return None

    def _signed(self, at: int) -> bool:
        """Whether a number has a sign before it with which another choice begins: -1, <5."""
        before = self._char(at - 1)
        begins = self.text[at].isdigit() and unicodedata.category(before) in ("Sm", "Pd")
        sign = "-" if before in _DASHES else before
        return begins and any(choice.startswith(sign) for choice in self.words)

    def _lone(self, folded: str, start: int, stop: int) -> bool:
        """Whether one Chinese sign, kana, or what is no word ("+") stands as a word of its own."""
        before, after = self._char(start - 1), self._char(stop)
        rest = self.text[stop:]
        if not any(map(_is_word, folded)):  # not a dash in a sentence, nor the start of a list
            free = before in " \n:" or before in _OPENERS or _unspaced(before)
            return free and bool(re.match(rf" *($|\n)|[{re.escape(_AFTER_SIGN)}]", rest))
        if all(map(_kana, folded)):
            ends = not _kana(after) or rest.startswith(_AFTER_KANA)
            return ends and (not _kana(before) or before in "はがもの")
        if len(folded) == 1 and _unspaced(folded):
            ends = not _unspaced(after) or after in "的了" or rest.startswith(_AFTER_KANA)
            return ends and (not _unspaced(before) or before in _BEFORE_LONE)
        return True

    def _option(self, at: int) -> tuple[AnswerToken, int] | None:
        """An option's own text, whose letters name no others: "C. A and B", or "A and B" for C."""
        if at in self.own:
            stop = self.own[at]
            return AnswerToken("WORD", self.low[at:stop]), stop - at
        for text, letter in self.lettered.items():
            match = re.compile(_spaced(text)).match(self.low, at)
            if match and self._apart(at, match.end()):
                return AnswerToken(CHOICE, match[0], (letter,)), len(match[0])
        return None

    def _letter(self, at: int, found: Sequence[AnswerToken]) -> tuple[AnswerToken, int] | None:
        """The letter, or letters such as "ABD", at a place."""
        before = self._char(at - 1)
        if _is_word(before) and not _unspaced(before):
            return None
        if before == "." and self._char(at - 2).isalpha() and not _is_word(self._char(at - 3)):
            return None
        lone = self._named(self.text[at])
        if lone and not _is_word(self._char(at + 1)) and self._option_follows(lone[0], at + 1):
            return AnswerToken(CHOICE, self.text[at], lone, True), 1
        stop = self._word_end(at)
        named = self._named(self.text[at:stop])
        if not named or (before in "'’-" and _is_word(self._char(at - 2))):
            return None
        bracketed = self._bracketed(at, stop)
        if self.text[at:stop].islower() and not bracketed and not self._asked(found, stop):
            return None
        if self._species(stop) or self._part(at, stop) or self._pronoun(at, stop):
            return None
        return AnswerToken(CHOICE, self.text[at:stop], named, bracketed), stop - at

    def _named(self, word: str) -> tuple[str, ...]:
        """The letters that a word is made of, in order; () where it is another word."""
        if word in self.names:
            word = self.names[word]
        if len(word) == 1 and word.upper() in self.letters:
            return (word.upper(),)
        rising = all(a < b for a, b in itertools.pairwise(word))
        return tuple(word) if rising and word and set(word) <= set(self.letters) else ()

    def _bracketed(self, start: int, stop: int) -> bool:
        """Whether a text stands between signs: (C), **C**, "C", $C$; C) counts as well."""
        after = self.text[stop:].lstrip(".: ")[:1] if self._char(stop) in ".:" else self._char(stop)
        if self._char(stop) == ")":
            return True
        before = self.text[:start].rstrip(" ")[-1:]
        return bool(after) and before in _OPENERS and after in _CLOSERS and bool(before)

    def _option_follows(self, letter: str, stop: int) -> bool:
        """Whether the option's own text follows its letter; where it ends, it is kept as one."""
        wanted = self.texts[self.letters.index(letter)] if self.texts else ""
        follows = re.compile(rf"[ .()\[\]:\-—–*_\n,、\"']*?({_spaced(wanted)})").match(
            self.low, stop
        )
        if not wanted or follows is None:
            return False
        if self._apart(*follows.span(1)):
            self.own[follows.start(1)] = follows.end(1)
        return True

    def _asked(self, found: Sequence[AnswerToken], stop: int) -> bool:
        """Whether a small letter stands where an answer is expected, and a sentence ends."""
        said = (t.role for t in reversed(found) if t.role not in ("FILLER", "ARTICLE"))
        before = next(said, "COLON")
        ends = self._char(stop) in ".,)\n*" or stop >= len(self.text)
        return ends and before in ("COLON", "COPULA", "OPTION", "ANSWER", "CHOOSE", "END")

    def _species(self, stop: int) -> bool:
        """Whether "E" is the beginning of "E. coli"."""
        follows = re.match(r"\. ?([^\W\d_]+)", self.low[stop:])
        return bool(follows) and follows[1] in words_of.SPECIES

    def _part(self, start: int, stop: int) -> bool:
        """Whether a letter is a part of a name: B12, B-cell, C', A+, B.1."""
        after, then = self._char(stop), self._char(stop + 1)
        if after in "-'’_" and _is_word(then) and not _unspaced(then):
            return True
        if after == "." and then.isdigit():
            return True
        return after in "+%°^" or self._char(start - 1) in "-@#%"

    def _pronoun(self, start: int, stop: int) -> bool:
        """Whether "I" speaks of the writer."""
        follows = re.match(r" ([a-z]+)", self.text[stop:])
        said = bool(follows) and follows[1] not in ("is", "because", "since", "as", "and", "or")
        return self.text[start:stop] == "I" and said


def _heads(found: list[AnswerToken], glued: Sequence[bool], at: int) -> bool:
    """Whether a letter begins a line, and Chinese or the like follows after a space."""
    first = at == 0 or found[at - 1].text == "\n"
    return first and not glued[at + 1] and _unspaced(found[at + 1].text[0])


def _asked_for(found: Sequence[AnswerToken], at: int) -> bool:
    """Whether a choice stands where one is expected: "The answer is 2 tablets"."""
    roles = (token.role for token in reversed(found[:at]))
    before = next((role for role in roles if role not in ("FILLER", "COPULA", "ARTICLE")), "")
    return before in ("ANSWER", "CHOOSE", "OPTION", "COLON")


def _standing(
    found: list[AnswerToken], glued: Sequence[bool], words: bool, alone: frozenset[str]
) -> list[AnswerToken]:
    """The tokens, where a choice that belongs to the word beside it is a word as well.

    "A patient", "C difficile", "B细胞" and "No difference" name no choice.
    """
    whole = _table()[0]
    out = list(found)
    for i, token in enumerate(found):
        if token.role != CHOICE or token.marked:
            continue
        after = found[i + 1].role if i + 1 < len(found) else "END"
        denies = whole.get(token.text) in ("NOT", "AND", "BUT", "OR") and not _unspaced(
            token.text[-1]
        )
        heads = not words and after == "WORD" and _heads(found, glued, i)
        before = found[i - 1] if i else None
        lone = token.choices[0] in alone and not _asked_for(found, i)
        word = (denies or lone) if words else not heads
        part = word and after in ("WORD", "OTHER", "ARTICLE")
        glued_on = before is not None and before.role == "WORD" and glued[i] and not words
        if part or (glued_on and _unspaced(before.text[-1])):
            out[i] = AnswerToken("WORD", token.text)
        elif heads:
            out[i] = token._replace(marked=True)
    for i, token in enumerate(out):
        if token.role == "ARTICLE":
            named = i + 1 < len(out) and out[i + 1].role == CHOICE
            out[i] = token._replace(role="FILLER" if named else "WORD")
    return out
