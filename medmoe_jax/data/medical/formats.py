"""Records out of a set's files: by the files' ending, or in a format of the set's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from medmoe_jax.data.medical import cases
from medmoe_jax.data.medical.cards import MedicalSet
from medmoe_jax.data.medical.fields import need
from medmoe_jax.data.medical.files import (
    REPAIR,
    Records,
    decode,
    members,
    parse_json,
    parse_xml,
    read_bytes,
    read_columns,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_parquet,
    read_text,
    read_xlsx,
)
from medmoe_jax.data.medical.locate import Found
from medmoe_jax.data.medical.row import held_out
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import shown, whole_number

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z0-9\[(])")
_TICO_HELD_OUT = frozenset(
    ["PubMed_6", "Wikinews_4", "Wikipedia_handpicked_7", "Wikisource_1", "wiki_20", "wiki_29"]
)


def records(entry: MedicalSet, found: Found) -> Records:
    """The records of a file, in the card's format, or the one that the file's ending names."""
    path = found.path
    suffix = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zip") else path.suffix
    name = entry.format if entry.format and suffix != ".parquet" else suffix.lstrip(".")
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: a file in the format {name!r} is not read; known are {known}")
    seen = False
    for where, record in FORMATS[name](entry, found):
        seen = True
        yield where, record
    if not seen:
        raise UserError(f"{path}: no record is in the file; {REPAIR}")


def _json(entry: MedicalSet, found: Found) -> Records:
    return read_json(read_text(found.path), found.path, entry.records)


def _jsonl(entry: MedicalSet, found: Found) -> Records:
    return read_jsonl(read_text(found.path), found.path)


def _csv(entry: MedicalSet, found: Found) -> Records:
    return read_csv(read_text(found.path), found.path, entry.columns)


def _zipped_csv(entry: MedicalSet, found: Found) -> Records:
    for where, raw in members(found.path, ".csv"):
        yield from read_csv(decode(raw, where), where, entry.columns)


def _tsv(entry: MedicalSet, found: Found) -> Records:
    return read_columns(found.path, entry.columns)


def _parquet(entry: MedicalSet, found: Found) -> Records:
    return read_parquet(found.path)


def _xlsx(entry: MedicalSet, found: Found) -> Records:
    return read_xlsx(found.path)


def _sheet(entry: MedicalSet, found: Found) -> Records:
    """An Excel file, or the same cells by tabs."""
    return _xlsx(entry, found) if found.path.suffix == ".xlsx" else _tsv(entry, found)


def _bio(entry: MedicalSet, found: Found) -> Records:
    """`tokens` and `tags` of lines of a token and a BIO tag, with a blank line between texts."""
    separator = str(entry.read["separator"])
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*read_text(found.path).split("\n"), ""], 1):
        where = f"{found.path}:{number}"
        if line.strip():
            fields = line.split(separator)
            if len(fields) != 2 or not re.fullmatch(r"O|[BI][-_].+", fields[1].strip()):
                raise UserError(f"{where}: {line!r} is not a token and a BIO tag; {REPAIR}")
            tokens.append(fields[0])
            tags.append(fields[1].strip())
        elif tokens:
            yield where, {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _documents(path: Path) -> Iterator[tuple[str, str, list, list]]:
    """`(where, text, mentions (start, stop, type, id), relations (head id, tail id))`: PubTator."""
    text, mentions, relations = "", [], []
    where = str(path)
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        where = f"{path}:{number}"
        part = re.fullmatch(r"\d+\|([ta])\|(.*)", line)
        fields = line.split("\t")
        if part:
            text = part[2] if part[1] == "t" else f"{text} {part[2]}"
        elif len(fields) == 4 and fields[1] == "CID":
            relations.append((fields[2], fields[3]))
        elif len(fields) in (6, 7):
            start, stop = whole_number(fields[1]), whole_number(fields[2])
            if start is None or stop is None or text[start:stop] != fields[3]:
                span = shown("-".join(fields[1:3]))
                raise UserError(f"{where}: {shown(fields[3])} is not at {span} of the text")
            mentions.append((start, stop, fields[4], fields[5]))
        elif line.strip():
            raise UserError(f"{where}: {line[:60]!r} is not a PubTator line; {REPAIR}")
        elif text:
            yield where, text, mentions, relations
            text, mentions, relations = "", [], []


def _pubtator_sentences(entry: MedicalSet, found: Found) -> Records:
    """Sentences of abstracts with their entities; no sentence ends within one."""
    for where, text, mentions, _ in _documents(found.path):
        inside = {i for start, stop, _, _ in mentions for i in range(start + 1, stop)}
        cuts = [m.start() for m in _SENTENCE_END.finditer(text) if m.start() not in inside]
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            within = [m for m in mentions if start <= m[0] and m[1] <= stop]
            named = [(kind, text[a:b], a - start, b - start) for a, b, kind, _ in within]
            yield where, {"text": text[start:stop], "entities": named}


def _pubtator_relations(entry: MedicalSet, found: Found) -> Records:
    """Abstracts with their pairs, each end by its first mention."""
    for where, text, mentions, relations in _documents(found.path):
        first: dict[str, str] = {}
        for start, stop, _, ids in mentions:
            for identity in ids.split("|"):
                first.setdefault(identity, text[start:stop])
        pairs = [(first[a], first[b]) for a, b in relations if a in first and b in first]
        yield where, {"text": text, "pairs": pairs}


def _pairs_xml(entry: MedicalSet, found: Found) -> Records:
    """`<pair value>` with child elements; pairs that lack one of them are left out."""
    root = parse_xml(read_bytes(found.path), found.path)
    for pair in root.iter("pair"):
        where = f"{found.path}: pair {pair.get('pid')}"
        fields = {child.tag: (child.text or "").strip() for child in pair}
        if all(fields.values()) and len(fields) > 1:
            yield where, {"value": pair.get("value"), **fields}


def _medquad(entry: MedicalSet, found: Found) -> Records:
    """Questions of a zip file or folder of documents in XML, those with an answer.

    The document is its topic, or its own id where the file names none: never the file's path, for
    the held-out fifth must be the same wherever the data lies.
    """
    for where, data in members(found.path, ".xml"):
        root = parse_xml(data, where)
        name = found.path.name if found.path.suffix else f"{found.path.name}.zip"
        document = (root.findtext("Focus") or "").strip() or f"{name}:{root.get('id')}"
        for pair in root.iter("QAPair"):
            question, answer = pair.find("Question"), (pair.findtext("Answer") or "").strip()
            asked = "" if question is None else (question.text or "").strip()
            if question is not None and asked and answer:
                kind = need(dict(question.attrib), "qtype", where)
                yield (
                    where,
                    {
                        "document": document,
                        "question": " ".join(asked.split()),
                        "kind": kind,
                        "answer": " ".join(answer.split()),
                    },
                )


def _tico(entry: MedicalSet, found: Found) -> Records:
    """English sentences with their translation, by document; `{NS}` marks one that is missing."""
    pairs = _tmx(found.path) if found.path.suffix == ".zip" else _tico_lines(found.path)
    language = found.values["language"]
    for where, name, english, text in pairs:
        if text.strip() != "{NS}" and english.strip() and text.strip():
            document = name.split(":")[0]
            split = "dev" if document in _TICO_HELD_OUT else "train"
            name = LANGUAGE_NAMES[language]
            yield where, {"en": english, "text": text, "into": name, "_split": split}


def _tico_lines(path: Path) -> Iterator[tuple[str, str, str, str]]:
    for where, record in read_jsonl(read_text(path), path):
        name, english, text = (str(need(record, key, where)) for key in ("id", "en", "text"))
        yield where, name, english, text


def _tmx(path: Path) -> Iterator[tuple[str, str, str, str]]:
    for where, raw in members(path, ".tmx"):
        for unit in parse_xml(raw, where).iter("tu"):
            texts = [(v.findtext("seg") or "") for v in unit.iter("tuv")]
            if len(texts) != 2:
                raise UserError(f"{where}: {unit.get('tuid')} has {len(texts)} texts; {REPAIR}")
            yield where, unit.get("tuid") or "", texts[0], texts[1]


LANGUAGE_NAMES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "es": "Spanish",
    "fa": "Persian",
    "fr": "French",
    "ha": "Hausa",
    "hi": "Hindi",
    "id": "Indonesian",
    "km": "Khmer",
    "my": "Burmese",
    "ne": "Nepali",
    "ps": "Pashto",
    "pt": "Portuguese",
    "ru": "Russian",
    "so": "Somali",
    "sw": "Swahili",
    "ta": "Tamil",
    "ti": "Tigrinya",
    "tl": "Tagalog",
    "ur": "Urdu",
    "zh": "Chinese",
    "zu": "Zulu",
}


def _aligned(entry: MedicalSet, found: Found) -> Records:
    """A file `x.src` and beside it `x.tgt.tagged`, line by line; word joints (`_`) are spaces."""
    other = found.path.with_name(found.path.name.removesuffix("src") + "tgt.tagged")
    sources, targets = list(read_lines(found.path)), list(read_lines(other))
    if len(sources) != len(targets):
        raise UserError(f"{found.path}: {len(sources)} texts and {len(targets)} titles; {REPAIR}")
    for (where, text), (_, title) in zip(sources, targets, strict=True):
        yield where, {"text": _joined(text), "title": _joined(title)}


def _joined(text: str) -> str:
    return re.sub(r"\s+([,.;:?!)])", r"\1", text.replace("_", " "))


def _pubmedqa(entry: MedicalSet, found: Found) -> Records:
    """PubMedQA with each record's split: of the official lists, or of the file that holds it.

    Of the one file with all 1,000 records, test_ground_truth.json beside it names those of test,
    and of the others a fifth is held out as dev.
    """
    path = found.path
    test = None
    if path.name == "ori_pqal.json":
        beside = path.with_name("test_ground_truth.json")
        if not beside.is_file():
            raise UserError(f"{path}: {beside.name}, which names the test rows, is not beside it")
        named = parse_json(read_text(beside), beside)
        if not isinstance(named, dict):
            raise UserError(f"{beside}: not a JSON object; {REPAIR}")
        test = set(named)
    for where, record in read_json(read_text(path), path):
        key = str(need(record, "_key | pubid | PMID | pmid | id", where))
        if test is not None and key in test:
            split = "test"
        elif path.name in ("test_set.json", "dev_set.json", "train_set.json"):
            split = path.name.partition("_")[0]
        else:
            split = "dev" if held_out(key) else "train"
        yield where, {**record, "_split": split}


Format = Callable[[MedicalSet, Found], Records]
FORMATS: dict[str, Format] = {
    "json": _json,
    "json.gz": _json,
    "jsonl": _jsonl,
    "jsonl.gz": _jsonl,
    "csv": _csv,
    "csv.zip": _zipped_csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "xlsx": _xlsx,
    "sheet": _sheet,
    "bio": _bio,
    "pubtator_sentences": _pubtator_sentences,
    "pubtator_relations": _pubtator_relations,
    "pairs_xml": _pairs_xml,
    "medquad": _medquad,
    "tico": _tico,
    "aligned": _aligned,
    "pubmedqa": _pubmedqa,
    "answers_apart": cases.answers_apart,
    "bioasq": cases.bioasq,
    "patients": cases.patients,
}
