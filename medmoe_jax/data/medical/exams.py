"""Multiple-choice questions: the options are lettered in the prompt, the answer is the letter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from medmoe_jax.data.medical.files import (
    need,
    one_of,
    read_csv,
    read_json,
    read_jsonl,
    read_table,
)
from medmoe_jax.data.medical.row import Row, build, held_out
from medmoe_jax.errors import UserError

LETTERS = "ABCDE"
ANSWER_WORD = {
    "af": "Antwoord",
    "am": "መልስ",
    "bm": "Jaabi",
    "en": "Answer",
    "fr": "Réponse",
    "ig": "Azịza",
    "ja": "答え",
    "nso": "Karabo",
    "sn": "Mhinduro",
    "st": "Karabo",
    "tn": "Karabo",
    "ts": "Nhlamulo",
    "xh": "Impendulo",
    "zu": "Impendulo",
}
# MMLU subject -> (first, after last) English test question of the hold-out, first Japanese one.
# The Japanese files keep the order of the English ones and leave some questions out, so that
# these ranges hold the same questions; the tests check it on the answers' letters.
MMLU_HELD_OUT = {
    "anatomy": (95, 135, 92),
    "college_biology": (101, 144, 100),
    "human_aging": (106, 151, 105),
    "medical_genetics": (70, 100, 69),
    "nutrition": (106, 151, 104),
    "professional_medicine": (106, 151, 105),
}
MMLU_SHOT_SUBJECTS = [
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "human_aging",
    "medical_genetics",
    "nutrition",
    "professional_medicine",
    "virology",
]
LABELS_PUBMEDQA = ("yes", "no", "maybe")
AFRICAN_SUBJECTS = ("clinical_knowledge", "college_medicine", "virology")
AFRICAN_LANGUAGES = ["af", "am", "bm", "en", "ig", "nso", "sn", "st", "tn", "ts", "xh", "zu"]


def exam(name: str, language: str, question: str, options: Sequence[str], answer: str) -> Row:
    """An exam question with one right letter."""
    letters = LETTERS[: len(options)]
    return build(
        name, language, question, answer, after=_options(language, options), choices=letters
    )


def _options(language: str, options: Sequence[str]) -> str:
    letters = LETTERS[: len(options)]
    lines = [f"{a}. {option.strip()}" for a, option in zip(letters, options, strict=True)]
    return "\n" + "\n".join(lines) + f"\n{ANSWER_WORD[language]} ({'/'.join(letters)}):"


def read_letter_jsonl(name: str, file: str):
    """Reader of JSON Lines with `question`, `options` {letter: text} and `answer_idx`."""

    def read(folder: Path, split: str) -> Iterator[Row]:
        for where, record in read_jsonl(folder / file):
            question, options = need(record, "question", where), need(record, "options", where)
            if list(options) != list(LETTERS[: len(options)]):
                raise UserError(f"{where}: options {list(options)} are not lettered A, B, …")
            answer = one_of(need(record, "answer_idx", where), options, "answer_idx", where)
            if held_out(question) == (split == "dev"):
                yield exam(name, "en", question, list(options.values()), answer)

    return read


def read_mmlu(folder: Path, split: str) -> Iterator[Row]:
    """English MMLU: the subjects' few-shot questions train; the test questions are split."""
    for subject in MMLU_SHOT_SUBJECTS if split == "train" else ():
        for where, record in read_csv(folder / f"{subject}_dev.csv"):
            yield _mmlu_row(where, record)
    for subject, (start, stop, _) in MMLU_HELD_OUT.items():
        for i, (where, record) in enumerate(read_csv(folder / f"{subject}_test.csv")):
            if (start <= i < stop) == (split == "dev"):
                yield _mmlu_row(where, record)


def _mmlu_row(where: str, record: dict) -> Row:
    options = [need(record, f"choice{i}", where) for i in range(4)]
    answer = one_of(need(record, "answer", where), "0123", "answer", where)
    return exam("mmlu", "en", need(record, "question", where), options, LETTERS[int(answer)])


def read_jmmlu(folder: Path, split: str) -> Iterator[Row]:
    """Japanese MMLU: the same questions are held out as in English."""
    for subject, (_, _, start) in MMLU_HELD_OUT.items():
        for i, (where, fields) in enumerate(read_table(folder / f"{subject}.csv", 6)):
            if (i >= start) == (split == "dev"):
                answer = one_of(fields[5].strip(), "ABCD", "answer", where)
                yield exam("jmmlu", "ja", fields[0], fields[1:5], answer)


def read_african(folder: Path, split: str) -> Iterator[Row]:
    """MMLU in eleven African languages and English: `dev` files train, `val` files evaluate."""
    part = "dev" if split == "train" else "val"
    for language in AFRICAN_LANGUAGES:
        ending = "" if language == "en" else f"_{language}"
        for subject in AFRICAN_SUBJECTS:
            for where, fields in read_table(folder / f"{subject}_{part}{ending}.csv", 6):
                answer = one_of(fields[5].strip(), "ABCD", "answer", where)
                yield exam("mmlu_african", language, fields[0], fields[1:5], answer)


def read_french(folder: Path, split: str) -> Iterator[Row]:
    """FrenchMedMCQA: one or several right letters, answered as `A, C`."""
    path = folder / f"{split}.json"
    for i, record in enumerate(read_json(path)):
        where = f"{path}: question {i + 1}"
        options = need(record, "answers", where)
        right = sorted(need(record, "correct_answers", where))
        for letter in right:
            one_of(letter, options, "correct_answers", where)
        yield build(
            "frenchmedmcqa",
            "fr",
            need(record, "question", where),
            ", ".join(letter.upper() for letter in right),
            after=_options("fr", [options[letter] for letter in sorted(options)]),
        )


def read_pubmedqa(folder: Path, split: str) -> Iterator[Row]:
    """PubMedQA: yes, no or maybe from an abstract without its conclusion."""
    path = folder / "ori_pqal_train.json"
    for key, record in read_json(path).items():
        where = f"{path}: record {key}"
        answer = one_of(need(record, "final_decision", where), LABELS_PUBMEDQA, "answer", where)
        if held_out(key) == (split == "dev"):
            yield build(
                "pubmedqa",
                "en",
                " ".join(need(record, "CONTEXTS", where)),
                answer,
                after=f"\n{need(record, 'QUESTION', where)} (yes/no/maybe):",
                choices=LABELS_PUBMEDQA,
            )


def read_jmed(name: str, file: str):
    """Reader of a JMED-LLM file: a question, a quoted text and lettered options."""

    def read(folder: Path, split: str) -> Iterator[Row]:
        for where, record in read_csv(folder / file):
            options = [record[k].strip() for k in sorted(record) if k.startswith("option")]
            question, _, text = need(record, "question", where).strip().partition("\n")
            letters = LETTERS[: len(options)]
            answer = one_of(need(record, "answer", where), letters, "answer", where)
            yield build(
                name,
                "ja",
                text.strip("「」"),
                answer,
                before=f"{question}\n「",
                after="」" + _options("ja", options),
                choices=letters,
            )

    return read
