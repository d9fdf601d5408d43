"""Inputs made from whole ones: bytes that are cut, doubled or changed, and JSON values likewise.

Everything is drawn from a `random.Random`, so that a seed gives the same input again.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# What parsers stumble over.
BYTES = (
    *(b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b]0;x\x07", b"\x1b[2J"),
    *(b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"\x80" + b"\0" * 7, b"\x01\0\0\0"),
    *(b"7" * 5000, b"[" * 3000, b'{"a":' * 2000, b"1e999", b"NaN", b"-Infinity", b'"\\ud800"'),
    *(b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<a>", b"</a>", b"null", b"true", b"-1", b"0"),
)
TEXTS = (
    *("", " ", "\n", "\0", "x", "é", "\ud800", "\u202e", "\ue0000\ue001", "\x1b[31m", "\x9b2J"),
    *("<|im_end|>", "{{ x }}", "$x^2$", "(a+)+b", "../x", "/dev/zero", "nan", "1" * 5000, "user"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -0.0, 0.5, 1e300, 1e-320),
    *(float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, {"a": [1]}, ["a"], [1, "a"]),
    *TEXTS,
)


def changed_bytes(random: Random, whole: bytes) -> bytes:
    """The bytes after up to five changes."""
    out = bytearray(whole)
    for _ in range(random.randint(1, 5)):
        at, size = random.randint(0, len(out)), random.choice((0, 1, 1, 2, 4, 8, 64, len(out)))
        match random.randrange(7):
            case 0:
                out[at : at + size] = random.choice(BYTES)
            case 1:
                out[at : at + size] = random.randbytes(min(size, 64))
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                del out[at:]
            case 5:
                if at < len(out):
                    out[at] ^= 1 << random.randrange(8)
            case _:
                if at < len(out):
                    out[at] = (out[at] + random.choice((1, -1))) % 256
    return bytes(out[: 1 << 20])


def changed_text(random: Random, whole: str) -> str:
    """The text after some changes, with parts of itself and of `TEXTS`."""
    for _ in range(random.randint(1, 4)):
        at, size = random.randint(0, len(whole)), random.choice((0, 1, 3, 10, 40))
        part = random.choice(
            (random.choice(TEXTS), whole[at : at + size], chr(random.randrange(0x3000)))
        )
        whole = whole[:at] + part + whole[at + random.choice((0, 0, size)) :]
    return whole


def changed_value(random: Random, whole: Any) -> Any:
    """A JSON value with up to four of its parts changed, removed, renamed or moved."""
    root = [copy.deepcopy(whole)]
    for _ in range(random.randint(1, 4)):
        holder, key = random.choice(_places(root))
        own = holder[key]
        match random.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(random.choice(VALUES))
            case 2 if isinstance(own, str):
                holder[key] = changed_text(random, own)
            case 2 if isinstance(own, int | float) and not isinstance(own, bool):
                holder[key] = random.choice((own + 1, own - 1, -own, own * 1000, str(own), [own]))
            case 3 if holder is not root:
                del holder[key]
            case 4:
                other, name = random.choice(_places(root))
                holder[key] = copy.deepcopy(other[name])
            case 5 if isinstance(own, dict):
                own[changed_text(random, random.choice([*own, "a"]))] = copy.deepcopy(
                    random.choice(VALUES)
                )
            case _:
                holder[key] = [own]
        if len(_places(root)) > 20_000:
            break
    return root[0]


def _places(root: list) -> list[tuple[Any, Any]]:
    """Every value inside, by what holds it and its key there."""
    found, left = [], [root]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                left.append(holder[key])
    return found


def changed_json(random: Random, whole: Any) -> bytes:
    """JSON of a changed value; now and then its bytes are changed as well."""
    value = changed_value(random, whole) if random.random() < 0.9 else whole
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    content = text.encode(errors="surrogatepass")
    return changed_bytes(random, content) if random.random() < 0.3 else content
