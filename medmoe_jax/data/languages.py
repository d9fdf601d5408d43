"""The language of rows: the one a row names, or one that a detector is sure of.

The detector is py3langid (140 languages; probabilities are calibrated over the length of a text).
It reads what users and assistants say. A text in two languages is unsure, as it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from medmoe_jax.data.conversation import Conversation, Rows, Turn, as_rows
from medmoe_jax.errors import UserError

UNKNOWN = ""
# What the detector says of text that is no language, and where it is unsure.
_NONE = ("zxx", "und")
_READ = 2000  # characters of a row; more make no text surer

Detect = Callable[[str], str]


def detector(least: float) -> Detect:
    """The language code of a text, or UNKNOWN where its probability is below `least`.

    With `least` 0 nothing is detected: every text is UNKNOWN.

    Raises:
      UserError: `least` is no probability.
    """
    if not 0.0 <= least <= 1.0:
        raise UserError(
            f"the least probability of a detected language is {least}; give 0 to 1 "
            "(data.detect_language, --detect)"
        )
    if not least:
        return lambda text: UNKNOWN
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=least)

    def detect(text: str) -> str:
        code, _ = model.classify(text)
        return UNKNOWN if code in _NONE else code

    return detect


def spoken(turns: Iterable[Turn]) -> str:
    """What users and assistants say in these turns, or enough of it to tell the language by."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")[:_READ]


def row_languages(rows: Iterable[Conversation], detect: Detect) -> Iterator[tuple[str, bool]]:
    """Each row's language code, and whether the row itself names it."""
    for row in rows:
        if row["language"]:
            yield row["language"], True
        else:
            yield detect(spoken(row["conversations"])), False


def census(rows: Iterable[Conversation], detect: Detect) -> dict[str, tuple[int, int]]:
    """`{language code: (rows that name it, rows it was detected in)}`, most rows first."""
    counts: dict[str, list[int]] = {}
    for code, named in row_languages(rows, detect):
        counts.setdefault(code, [0, 0])[not named] += 1
    order = sorted(counts, key=lambda code: (-sum(counts[code]), code))
    return {code: (counts[code][0], counts[code][1]) for code in order}


def name_languages(
    rows: Sequence[Conversation], known: Container[str], detect: Detect
) -> tuple[Rows, dict[str, int]]:
    """The rows with their languages, and how many `named` theirs, were `detected` or are `unknown`.

    Args:
      rows: conversation rows.
      known: the codes that a row may name; a text detected as another language stays unknown.
      detect: see `detector`.

    Raises:
      UserError: a row names a language that is not known; the message says where it stands.
    """
    rows = as_rows(rows)
    codes = []
    counts = {"named": 0, "detected": 0, "unknown": 0}
    for number, (code, named) in enumerate(row_languages(rows, detect)):
        if named:
            _check_known(code, known, rows.place(number))
        code = code if code in known else UNKNOWN
        codes.append(code)
        counts["named" if named else "detected" if code else "unknown"] += 1
    return rows.changed(lambda number, row: {**row, "language": codes[number]}), counts


def name_language(
    row: Conversation, known: Container[str], detect: Detect, place: str
) -> Conversation:
    """One row with its language, as `name_languages` gives it. Raises UserError."""
    ((code, named),) = row_languages([row], detect)
    if named:
        _check_known(code, known, place)
    return {**row, "language": code if code in known else UNKNOWN}


def _check_known(code: str, known: Container[str], place: str) -> None:
    if code not in known:
        raise UserError(
            f"{place}: the row is in '{code}', a language that the table of data.languages does "
            "not have; add it there, or correct the row"
        )
