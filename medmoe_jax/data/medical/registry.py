"""The medical sets by name, with their splits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medmoe_jax.data.medical import entities, exams, labels, texts
from medmoe_jax.data.medical.row import Row, normal
from medmoe_jax.errors import UserError

OFFICIAL = "official train and dev files"
BY_QUESTION = "a fifth of the questions, drawn by a hash of the text, is held out"


@dataclass(frozen=True)
class MedicalSet:
    """A set: where it lies, how it is read, how it is split.

    read: `(folder, split) -> rows`, before the removal of duplicates.
    group: 'knowledge' or 'alignment'.
    splits: 'dev' alone means that the set is for evaluation only.
    languages: the answers' languages; with several, `name:language` names a part of the set.
    """

    name: str
    folder: str
    kind: str
    group: str
    split_rule: str
    read: Callable[[Path, str], Iterator[Row]]
    languages: tuple[str, ...] = ("en",)
    splits: tuple[str, ...] = ("train", "dev")


_EXAM_HOLD_OUT = "the same questions are held out in English and Japanese, by ranges"
_MEDQUAD_RULE = "a fifth of the documents, drawn by a hash of the topic, is held out"
_TICO_RULE = "six documents are held out, the same in every language"
_AFRICAN_RULE = "official dev files (5 a subject) train, official val files evaluate"
_JMED_RULE = "official evaluation subset: for evaluation only"
_ZH, _RU, _EN, _JA = ("zh",), ("ru",), ("en",), ("ja",)
_TICO = tuple(texts.TICO_LANGUAGES.values())
_AFRICAN = tuple(exams.AFRICAN_LANGUAGES)

_top3 = labels.read_complaints("rumed_top3", "RuMedTop3", "Код МКБ-10")
_symptom = labels.read_complaints("rumed_symptom", "RuMedSymptomRec", "Ещё симптом")
_medqa = exams.read_letter_jsonl("medqa", "medqa_rows_0001_0800.jsonl")
_medmcqa = exams.read_letter_jsonl("medmcqa", "medmcqa_rows_0001_2000.jsonl")
_crade = exams.read_jmed("jmed_crade", "crade.csv")
_smdis = exams.read_jmed("jmed_smdis", "smdis.csv")
_BLUE, _RUMED, _MTS = "chineseblue_zh", "rumedbench_ru", "mts_dialog_en"
_SPLITS3 = ("train", "dev", "test")


def _table() -> Iterator[MedicalSet]:
    know, align = "knowledge", "alignment"
    new = MedicalSet
    yield new("cmedtc", _BLUE, "choice", align, OFFICIAL, labels.read_cmedtc, _ZH)
    yield new("cmedic", _BLUE, "choice", align, OFFICIAL, labels.read_cmedic, _ZH)
    yield new("cmedqq", _BLUE, "choice", align, OFFICIAL, labels.read_cmedqq, _ZH)
    yield new("cmedqaner", _BLUE, "generate", align, OFFICIAL, entities.read_cmedqaner, _ZH)
    yield new("rumed_danet", _RUMED, "choice", know, OFFICIAL, labels.read_danet, _RU)
    yield new("rumed_top3", _RUMED, "choice", know, OFFICIAL, _top3, _RU)
    yield new("rumed_symptom", _RUMED, "choice", know, OFFICIAL, _symptom, _RU)
    yield new("rumed_ner", _RUMED, "generate", align, OFFICIAL, entities.read_rumed_ner, _RU)
    yield new("pubmedqa", "pubmedqa_en", "choice", know, BY_QUESTION, exams.read_pubmedqa)
    yield new("medqa", "medqa_usmle_en", "choice", know, BY_QUESTION, _medqa)
    yield new("medmcqa", "medmcqa_en", "choice", know, BY_QUESTION, _medmcqa)
    yield new("mmlu", "mmlu_medical_en", "choice", know, _EXAM_HOLD_OUT, exams.read_mmlu)
    yield new("jmmlu", "jmmlu_medical_ja", "choice", know, _EXAM_HOLD_OUT, exams.read_jmmlu, _JA)
    yield new(
        "mmlu_african",
        "mmlu_clinical_african",
        "choice",
        know,
        _AFRICAN_RULE,
        exams.read_african,
        _AFRICAN,
    )
    yield new(
        "frenchmedmcqa",
        "frenchmedmcqa_fr",
        "generate",
        know,
        OFFICIAL,
        exams.read_french,
        ("fr",),
    )
    yield new("jmed_crade", "jmed_llm_ja", "choice", align, _JMED_RULE, _crade, _JA, ("dev",))
    yield new("jmed_smdis", "jmed_llm_ja", "choice", align, _JMED_RULE, _smdis, _JA, ("dev",))
    yield new("mts_dialog", _MTS, "generate", align, OFFICIAL, texts.read_mts, _EN, _SPLITS3)
    yield new(
        "mts_section", _MTS, "choice", align, OFFICIAL, labels.read_mts_section, _EN, _SPLITS3
    )
    yield new("aci_bench", "aci_bench_en", "generate", align, OFFICIAL, texts.read_aci)
    yield new("meqsum", "meqsum_en", "generate", align, BY_QUESTION, texts.read_meqsum)
    yield new(
        "vihealth", "vihealth_vi", "generate", align, BY_QUESTION, texts.read_vihealth, ("vi",)
    )
    yield new("rqe", "rqe_en", "choice", align, BY_QUESTION, labels.read_rqe)
    yield new("medquad", "medquad_en", "generate", know, _MEDQUAD_RULE, texts.read_medquad)
    yield new(
        "medquad_type", "medquad_en", "choice", align, _MEDQUAD_RULE, labels.read_medquad_type
    )
    yield new("ncbi_disease", "ncbi_disease_en", "generate", align, OFFICIAL, entities.read_ncbi)
    yield new("bc5cdr", "bc5cdr_en", "generate", align, OFFICIAL, entities.read_bc5cdr)
    yield new(
        "bc5cdr_relations",
        "bc5cdr_en",
        "generate",
        align,
        OFFICIAL,
        entities.read_bc5cdr_relations,
    )
    yield new(
        "tico19", "tico19_multilingual", "generate", align, _TICO_RULE, texts.read_tico, _TICO
    )


SETS: dict[str, MedicalSet] = {entry.name: entry for entry in _table()}


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The folder of the sets: `root`, else $MEDMOE_DATA, else ../shared/data.

    Raises FileNotFoundError where it is no folder.
    """
    path = Path(root or os.environ.get("MEDMOE_DATA") or "../shared/data")
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no folder: set $MEDMOE_DATA to the folder of the medical sets"
        )
    return path


def find(name: str) -> tuple[MedicalSet, str | None]:
    """The set of `name`, and the language asked for in `name:language`."""
    base, _, language = name.partition(":")
    if base not in SETS:
        raise UserError(f"{base!r} is not a medical set; choose one of {', '.join(SETS)}")
    entry = SETS[base]
    if language and language not in entry.languages:
        raise UserError(f"{base} has no language {language!r}; it has {', '.join(entry.languages)}")
    return entry, language or None


def rows(name: str, split: str, root: str | os.PathLike | None = None) -> Iterator[Row]:
    """The rows of a split of the set `name`, or of one language of it (`tico19:fr`).

    Rows of 'train' whose prompt also stands in another split are left out.
    Raises UserError for an unknown name or split and for a corrupt file, FileNotFoundError where
    the data folder is missing.
    """
    entry, language = find(name)
    if split not in entry.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(entry.splits)}")
    folder = data_root(root) / entry.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: $MEDMOE_DATA must name the folder that holds {entry.folder}"
        )
    seen = {
        normal(row.prompt)
        for other in entry.splits
        if split == "train" and other != "train"
        for row in entry.read(folder, other)
    }
    for row in entry.read(folder, split):
        if language in (None, row.language) and normal(row.prompt) not in seen:
            yield row


def conversations(name: str, split: str, root: str | os.PathLike | None = None) -> list[dict]:
    """The rows of a split as conversations for training."""
    return [row.conversation() for row in rows(name, split, root)]
