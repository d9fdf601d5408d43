"""Values of a record by the paths that a card names, and the options and answers of exams.

A path is `question`, `context.contexts`, or several by `|`, of which the first that is there holds.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.data.medical.files import REPAIR
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import shown, whole_number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def look(record: dict, path: str, empty: tuple = ("", [])) -> Any:
    """The value at a path, or None where it is absent or one of `empty`."""
    for one in path.split("|"):
        value = _walk(record, one.strip().split("."))
        if value is not None and value not in empty:
            return value
    return None


def _walk(value, keys: Sequence[str]):
    for i, key in enumerate(keys):
        if isinstance(value, list):
            return [_walk(item, keys[i:]) for item in value]
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return None if isinstance(value, float) and math.isnan(value) else value


def need(record: dict, path: str, where: str) -> Any:
    """The value at a path; an absent or empty one is an error that names it."""
    value = look(record, path)
    if value is None:
        raise missing(record, path, where)
    return value


def missing(record: dict, path: str, where: str) -> UserError:
    """The error that a path leads to nothing: the fields that there are, or that it is empty."""
    wanted = [one.strip().partition(".")[0] for one in re.split(r"[|,]", path)]
    there = [str(name) for name in record if not str(name).startswith("_")]  # those are ours
    if set(wanted) & set(there):
        return UserError(f"{where}: field {path!r} has no value; fill it in, or {REPAIR}")
    plain = {name.strip().casefold(): name for name in there}
    near = [n for one in wanted for n in difflib.get_close_matches(one.casefold(), plain, n=1)]
    hint = f" (did you mean {plain[near[0]]!r}?)" if near else ""
    listed = ", ".join(map(repr, there[:12])) + (", …" if len(there) > 12 else "")
    return UserError(
        f"{where}: field {path!r} is missing{hint}, there are {listed or 'none'}; name in the card "
        f"those of the file, or {REPAIR}"
    )


def need_list(record: dict, path: str, where: str) -> Any:
    """The value at a path where a list is expected: one without items is there."""
    value = look(record, path, empty=("",))
    return need(record, path, where) if value is None else value


def text(record: dict, path: str, where: str) -> str:
    """The value at a path as text; a list of texts is joined by spaces."""
    value = need(record, path, where)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: field {path!r} is no text; {REPAIR}")
    return str(value)


def filled(template: str, record: dict, where: str) -> str:
    """A template in which `{path}` stands for the text at that path."""

    def put(match: re.Match) -> str:
        return text(record, match[1], where).strip()

    return re.sub(r"\{([^{}]+)\}", put, template)


def one_of(value: object, allowed: Collection[str], field: str, where: str) -> str:
    """`value` where it is one of `allowed`; an error that names field and file otherwise."""
    if not isinstance(value, str) or value not in allowed:
        known = sorted(allowed)
        shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        raise UserError(f"{where}: {field} {value!r} is not one of {shown}; {REPAIR}")
    return value


def options_of(record: dict, path: str, where: str) -> list[tuple[str, str]]:
    """`(key, text)` of an exam question's options, in their order.

    They are several paths by `,`, a list, an object by letter, a list of objects, or one text with
    a line for each. The text of an option without any is ''. A record without the field of one of
    several, which may be misspelt, is an error.
    """
    lacking = path
    for one in path.split("|"):
        paths = [p.strip() for p in one.split(",")]
        absent = [p for p in paths if p.partition(".")[0] not in record]
        values = [look(record, p) for p in paths]
        found = any(value is not None for value in values)
        if found and absent:
            lacking = ", ".join(absent)
        elif found and len(paths) > 1:
            return _kept(zip(LETTERS, values, strict=False), path, where)
        elif found:
            return _kept(_pairs(values[0], path, where), path, where)
    error = missing(record, lacking, where)
    if lacking != path:
        error = UserError(f"{error}; a card takes shorter records too, by 'a, b, c | a, b'")
    raise error


_NO_TEXT = ("", "n/a", "nan")


def _kept(pairs, path: str, where: str) -> list[tuple[str, str]]:
    kept = [(str(key).strip(), _option(value)) for key, value in pairs]
    if len(kept) < 2:
        raise UserError(f"{where}: {len(kept)} options in field {path!r}; {REPAIR}")
    if len({key for key, _ in kept}) < len(kept):
        raise UserError(f"{where}: options of field {path!r} have the same letter; {REPAIR}")
    return kept


def _option(value) -> str:
    """The text of an option; '' where it has none."""
    option = "" if value is None else str(value).strip()
    if option.count('"') == 1:
        option = option.removesuffix('\n"').rstrip()  # what a lost quotation left, as in MedQA
    return "" if option.casefold() in _NO_TEXT else option


_KEYS = ("letter", "key", "aid", "label", "id")
_TEXTS = ("content", "value", "atext", "text", "option")


def _pairs(value, path: str, where: str):
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, dict):
        lettered = all(len(str(key)) == 1 for key in value)
        return sorted(value.items()) if lettered else value.items()
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [(look(item, " | ".join(_KEYS)), look(item, " | ".join(_TEXTS))) for item in value]
    if isinstance(value, list):
        return [(LETTERS[i : i + 1] or str(i), option) for i, option in enumerate(value)]
    if isinstance(value, str):
        found = _lines(value)
        if len(found) < 2:
            found = re.findall(r"\(([A-Z])\)\s*(.+?)(?=\s*\([A-Z]\)|\s*$)", value, re.S)
        return found
    raise UserError(f"{where}: field {path!r} holds no options; {REPAIR}")


_LETTERED = re.compile(r"[(（]?([A-Za-zＡ-Ｚ])(?:([.．)）:：、])|\s+|$)\s*(.*)")


def _lines(text: str) -> list[tuple[str, str]]:
    """Options with a line each; a line that begins none goes on with the option before.

    A letter without a sign behind it begins an option only where it is the next one: "I" may be a
    word.
    """
    found: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match, last = _LETTERED.match(line), found[-1][0] if found else ""
        letter = unicodedata.normalize("NFKC", match[1]) if match else ""
        following = letter == LETTERS[len(found) :][:1]
        if match and (following or (match[2] and letter.upper() > last)):
            found.append((letter.upper(), match[3]))
        elif found:
            found[-1] = (last, f"{found[-1][1]} {line}".strip())
    return found


def _literal(value: str):
    """A list or object that is written as JSON or Python in a text; otherwise the text."""
    if value.lstrip()[:1] not in ("{", "["):
        return value
    for read in (json_text.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


class GoldWithoutText(UserError):
    """The right option of a record has no text."""


def answers_of(
    record: dict,
    path: str,
    options: Sequence[tuple[str, str]],
    counts_from: int | None,
    where: str,
) -> list[int]:
    """The places of the right options.

    They are named by key, letter, number or their own text; several as a list, `ABD` or `A,B,D`.
    counts_from: the number of the first option, where the card says that numbers count options.
    Raises GoldWithoutText where one of them has no text, UserError for what names no option.
    """
    value = need(record, path, where)
    value = _literal(value) if isinstance(value, str) else value
    given = value if isinstance(value, list) else [value]
    places = [place for one in given for place in _places(one, options, counts_from, where)]
    known = {place for place in places if place is not None}
    if not known or None in places:
        keys = ", ".join(key for key, _ in options)
        last = counts_from is None and str(value).strip() == str(len(options))
        hint = "where numbers count from 1, say counts_from = 1 in the card, or " if last else ""
        raise UserError(
            f"{where}: answer {shown(value)} names none of the options {keys}; {hint}{REPAIR}"
        )
    if not all(options[place][1] for place in known):
        raise GoldWithoutText(
            f"{where}: answer {shown(value)} names an option without text; {REPAIR}"
        )
    return sorted(known)


def _places(value, options, counts_from: int | None, where: str) -> list[int | None]:
    keys = [key for key, _ in options]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return [None]
    named = str(value).strip()
    if named in keys:
        return [keys.index(named)]
    texts = [option.casefold() for _, option in options]
    same = texts.index(named.casefold()) if named.casefold() in texts else None
    if (number := whole_number(named)) is not None:
        place = _counted(number - (counts_from or 0), keys)
        if same is None or counts_from is not None or same == place:
            return [place]
        if place is None:
            return [same]
        raise UserError(
            f"{where}: answer {shown(value)} is the text of option {keys[same]} and may count to "
            f"option {keys[place]}; name a column of letters in the card's 'answer', or say there "
            "what the first option's number is: counts_from = 0"
        )
    if same is not None:
        return [same]
    bare = named.strip("()[].。 ")
    upper = [key.upper() for key in keys]
    if bare.upper() in upper:
        return [upper.index(bare.upper())]
    parts = re.split(r"[,，、;；\s]+", bare) if re.search(r"[,，、;；\s]", bare) else list(bare)
    return [upper.index(p.upper()) if p.upper() in upper else None for p in parts if p]


def _counted(place: int, keys: Sequence[str]) -> int | None:
    """The option of a number: that of its letter, where options have letters."""
    if set(keys) <= set(LETTERS):
        letter = LETTERS[place] if 0 <= place < len(LETTERS) else ""
        return keys.index(letter) if letter in keys else None
    return place if 0 <= place < len(keys) else None
