"""Free text as the answer: notes, summaries, answers, translations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medmoe_jax.data.medical.files import need, read_columns, read_csv, read_jsonl, read_lines
from medmoe_jax.data.medical.labels import MTS_FILES, medquad_pairs
from medmoe_jax.data.medical.row import Row, build, held_out
from medmoe_jax.errors import UserError

LANGUAGE_NAMES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "es-LA": "Spanish",
    "fa": "Persian",
    "fr": "French",
    "ha": "Hausa",
    "hi": "Hindi",
    "id": "Indonesian",
    "ne": "Nepali",
    "ps": "Pashto",
    "pt-BR": "Portuguese",
    "ru": "Russian",
    "so": "Somali",
    "sw": "Swahili",
    "ta": "Tamil",
    "tl": "Tagalog",
    "ur": "Urdu",
    "zh": "Chinese",
    "zu": "Zulu",
}
# File name ending -> the language's tag in rows and task names.
TICO_LANGUAGES = {code: code.split("-")[0] for code in LANGUAGE_NAMES}
TICO_HELD_OUT = frozenset(
    ["PubMed_6", "Wikinews_4", "Wikipedia_handpicked_7", "Wikisource_1", "wiki_20", "wiki_29"]
)


def read_mts(folder: Path, split: str) -> Iterator[Row]:
    """Dialogue -> a section of the note."""
    for file in MTS_FILES[split]:
        for where, record in read_csv(folder / file):
            yield build(
                "mts_dialog",
                "en",
                _lines(need(record, "dialogue", where)),
                need(record, "section_text", where),
                after=f"\nWrite the note section {need(record, 'section_header', where).strip()}:",
            )


def read_aci(folder: Path, split: str) -> Iterator[Row]:
    """A whole visit's dialogue -> the whole note."""
    for where, record in read_csv(folder / {"train": "train.csv", "dev": "valid.csv"}[split]):
        text, note = need(record, "dialogue", where), need(record, "note", where)
        yield build("aci_bench", "en", _lines(text), _lines(note), after="\nWrite the note:")


def read_meqsum(folder: Path, split: str) -> Iterator[Row]:
    """A patient's question -> the question in one short sentence."""
    lines = read_columns(folder / "derived_meqsum.tsv", 3)
    next(lines, None)
    for _, (_, text, summary) in lines:
        if held_out(text) == (split == "dev"):
            yield build("meqsum", "en", text, summary, after="\nShort question:")


def read_vihealth(folder: Path, split: str) -> Iterator[Row]:
    """A patient's question in Vietnamese -> its title; word joints (`_`) become spaces."""
    folder = folder / "FAQ_summarization"
    sources, targets = (
        list(read_lines(folder / f"dev.txt.{end}")) for end in ("src", "tgt.tagged")
    )
    if len(sources) != len(targets):
        raise UserError(f"{folder}: {len(sources)} texts and {len(targets)} titles")
    for (_, text), (_, title) in zip(sources, targets, strict=True):
        if held_out(text) == (split == "dev"):
            yield build("vihealth", "vi", _joined(text), _joined(title), after="\nTiêu đề:")


def read_medquad(folder: Path, split: str) -> Iterator[Row]:
    """A consumer's question -> an answer by the National Institutes of Health."""
    for document, question, _, answer in medquad_pairs(folder):
        if held_out(document) == (split == "dev"):
            yield build("medquad", "en", question, " ".join(answer.split()))


def read_tico(folder: Path, split: str) -> Iterator[Row]:
    """English sentences -> nineteen languages, split by document.

    Sentences marked as not translated (`{NS}`) are left out.
    """
    for code, name in LANGUAGE_NAMES.items():
        for where, record in read_jsonl(folder / f"en-{code}.jsonl.gz"):
            document = need(record, "id", where).split(":")[0]
            text = need(record, "text", where)
            if text.strip() != "{NS}" and (document in TICO_HELD_OUT) == (split == "dev"):
                yield build(
                    "tico19",
                    TICO_LANGUAGES[code],
                    need(record, "en", where),
                    text,
                    before=f"Translate to {name}: ",
                )


def _lines(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())


def _joined(text: str) -> str:
    return re.sub(r"\s+([,.;:?!)])", r"\1", text.replace("_", " "))
