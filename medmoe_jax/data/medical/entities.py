"""Named entities and relations in text.

Grammar of an answer, one line a type, each mention once, in order of appearance:
Chinese `{type}实体：a，b`, elsewhere `{type}: a; b`; without any entity `无`, `none` or `нет`.
Relations: one line a pair, `{head} -> {tail}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from medmoe_jax.data.medical.files import need, read_jsonl, read_text
from medmoe_jax.data.medical.row import Row, build
from medmoe_jax.errors import UserError

TYPES_ZH = {
    "disease": "疾病",
    "symptom": "症状",
    "body": "身体",
    "treatment": "治疗",
    "drug": "药物",
    "test": "检查",
    "crowd": "人群",
    "time": "时间",
    "physiology": "生理",
    "feature": "特征",
    "department": "科室",
}
TYPES_RU = {
    "DI": "болезнь",
    "ADR": "реакция",
    "Finding": "находка",
    "Drugname": "препарат",
    "Drugclass": "класс",
    "Drugform": "форма",
}
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z0-9\[(])")


def answer_lines(
    entities: Iterable[tuple[str, str]], types: Sequence[str], *, suffix: str, comma: str, none: str
) -> str:
    """The answer text of `(type, mention)` pairs in the grammar above."""
    found: dict[str, dict[str, None]] = {kind: {} for kind in types}
    for kind, mention in entities:
        found[kind][mention] = None
    lines = [f"{kind}{suffix}{comma.join(found[kind])}" for kind in types if found[kind]]
    return "\n".join(lines) or none


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """`(type, start, stop)` of BIO tags such as `B-Disease` or `I_drug`.

    An `I` that continues nothing of its type starts an entity, as in the CoNLL scorer.
    """
    start, kind = 0, None
    for i, tag in enumerate([*tags, "O"]):
        goes_on = tag[0] == "I" and tag[2:] == kind
        if kind is not None and not goes_on:
            yield kind, start, i
            kind = None
        if tag[0] != "O" and not goes_on:
            start, kind = i, tag[2:]


def _sentences(path: Path, separator: str) -> Iterator[tuple[list[str], list[str]]]:
    """`(tokens, tags)` of a file with a token and a tag a line, and a blank line between."""
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        if line.strip():
            fields = line.split(separator)
            if len(fields) != 2 or not re.fullmatch(r"O|[BI][-_].+", fields[1].strip()):
                raise UserError(f"{path}:{number}: {line!r} is not a token and a BIO tag")
            tokens.append(fields[0])
            tags.append(fields[1].strip())
        elif tokens:
            yield tokens, tags
            tokens, tags = [], []


def _named(tokens, tags, types: dict[str, str], glue: str, where: str):
    for kind, start, stop in spans(tags):
        if kind not in types:
            raise UserError(f"{where}: entity type {kind!r} is not one of {sorted(types)}")
        yield types[kind], glue.join(tokens[start:stop])


def read_cmedqaner(folder: Path, split: str) -> Iterator[Row]:
    """Chinese questions and answers with eleven types of entity."""
    path = folder / f"cMedQANER/{split}.txt"
    types = list(TYPES_ZH.values())
    for tokens, tags in _sentences(path, " "):
        found = _named(tokens, tags, TYPES_ZH, "", str(path))
        answer = answer_lines(found, types, suffix="实体：", comma="，", none="无")
        before = f"找出实体（{'、'.join(types)}）：\n"
        yield build("cmedqaner", "zh", "".join(tokens), answer, before=before)


def read_rumed_ner(folder: Path, split: str) -> Iterator[Row]:
    """Russian drug reviews with six types of entity."""
    path = folder / f"RuMedNER/{split}_v1.jsonl"
    types = list(TYPES_RU.values())
    for where, record in read_jsonl(path):
        tokens, tags = need(record, "tokens", where), need(record, "ner_tags", where)
        if len(tokens) != len(tags):
            raise UserError(f"{where}: {len(tokens)} tokens and {len(tags)} tags")
        found = _named(tokens, tags, TYPES_RU, " ", where)
        answer = answer_lines(found, types, suffix=": ", comma="; ", none="нет")
        before = f"Сущности ({', '.join(types)}):\n"
        yield build("rumed_ner", "ru", " ".join(tokens), answer, before=before)


def read_ncbi(folder: Path, split: str) -> Iterator[Row]:
    """Sentences of abstracts with the diseases in them."""
    path = folder / {"train": "train.tsv", "dev": "devel.tsv"}[split]
    for tokens, tags in _sentences(path, "\t"):
        found = _named(tokens, tags, {"Disease": "Disease"}, " ", str(path))
        answer = answer_lines(found, ["Disease"], suffix=": ", comma="; ", none="none")
        yield build("ncbi_disease", "en", " ".join(tokens), answer, before="List the diseases:\n")


CDR_FILES = {
    "train": "CDR_TrainingSet.PubTator.txt",
    "dev": "CDR_DevelopmentSet.PubTator.txt",
}


def _cdr_documents(path: Path) -> Iterator[tuple[str, list, list]]:
    """`(text, mentions (start, stop, type, id), relations (chemical id, disease id))`."""
    text, mentions, relations = "", [], []
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        where = f"{path}:{number}"
        part = re.fullmatch(r"\d+\|([ta])\|(.*)", line)
        fields = line.split("\t")
        if part:
            text = part[2] if part[1] == "t" else f"{text} {part[2]}"
        elif len(fields) == 4 and fields[1] == "CID":
            relations.append((fields[2], fields[3]))
        elif len(fields) in (6, 7) and fields[1].isdigit() and fields[2].isdigit():
            start, stop = int(fields[1]), int(fields[2])
            if text[start:stop] != fields[3]:
                raise UserError(f"{where}: {fields[3]!r} is not at {start}-{stop} of the text")
            mentions.append((start, stop, fields[4], fields[5]))
        elif line.strip():
            raise UserError(f"{where}: {line[:60]!r} is not a PubTator line")
        elif text:
            yield text, mentions, relations
            text, mentions, relations = "", [], []


def read_bc5cdr(folder: Path, split: str) -> Iterator[Row]:
    """Sentences of abstracts with the chemicals and diseases in them."""
    for text, mentions, _ in _cdr_documents(folder / CDR_FILES[split]):
        inside = {i for start, stop, _, _ in mentions for i in range(start + 1, stop)}
        cuts = [m.start() for m in _SENTENCE_END.finditer(text) if m.start() not in inside]
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            found = [(kind, text[a:b]) for a, b, kind, _ in mentions if start <= a and b <= stop]
            answer = answer_lines(
                found, ["Chemical", "Disease"], suffix=": ", comma="; ", none="none"
            )
            yield build(
                "bc5cdr",
                "en",
                text[start:stop],
                answer,
                before="List the chemicals and diseases:\n",
            )


def read_bc5cdr_relations(folder: Path, split: str) -> Iterator[Row]:
    """Abstracts with the pairs chemical -> disease it induces, each by its first mention."""
    for text, mentions, relations in _cdr_documents(folder / CDR_FILES[split]):
        first: dict[str, str] = {}
        for start, stop, _, ids in mentions:
            for identity in ids.split("|"):
                first.setdefault(identity, text[start:stop])
        pairs = {
            f"{first[a]} -> {first[b]}": None for a, b in relations if a in first and b in first
        }
        before = "Which chemical induces which disease?\n"
        answer = "\n".join(pairs) or "none"
        yield build("bc5cdr_relations", "en", text, answer, before=before)
