"""Words of any script: what texts are compared by, word by word."""

from __future__ import annotations

import functools
import unicodedata

# Scripts that are written without spaces: each sign, with the marks that belong to it, is a word.
_UNSPACED = (
    *("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC ITERATION", "HIRAGANA"),
    *("KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


def words(text: str) -> list[str]:
    """Lower-case words, in one form of their signs: half-width kana and full-width letters fold."""
    found: list[str] = []
    word = ""
    alone = False  # whether the last word is a sign of a script without spaces
    for character in unicodedata.normalize("NFKC", text).lower():
        category, unspaced = _kind(character)
        if category == "M" and (word or alone):  # belongs to what it stands on
            if alone:
                found[-1] += character
            else:
                word += character
            continue
        goes_on = category in "LMN" and not unspaced
        if word and not goes_on:
            found.append(word)
            word = ""
        alone = unspaced and category in "LMN"
        if alone:
            found.append(character)
        elif goes_on:
            word += character
    return [*found, word] if word else found


@functools.lru_cache(1 << 16)
def _kind(character: str) -> tuple[str, bool]:
    """The first letter of a sign's category, and whether its script has no spaces."""
    unspaced = unicodedata.name(character, "").startswith(_UNSPACED)
    return unicodedata.category(character)[0], unspaced
