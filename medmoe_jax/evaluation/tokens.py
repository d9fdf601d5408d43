"""Words of any script, for scores that compare texts word by word."""

from __future__ import annotations

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
        category = unicodedata.category(character)
        if category[0] == "M" and (word or alone):  # belongs to what it stands on
            if alone:
                found[-1] += character
            else:
                word += character
            continue
        unspaced = unicodedata.name(character, "").startswith(_UNSPACED)
        goes_on = category[0] in "LMN" and not unspaced
        if word and not goes_on:
            found.append(word)
            word = ""
        alone = unspaced and category[0] in "LMN"
        if alone:
            found.append(character)
        elif goes_on:
            word += character
    return [*found, word] if word else found
