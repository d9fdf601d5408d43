"""Classification: a text, and one label word out of a closed set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medmoe_jax.data.medical.files import (
    need,
    one_of,
    parse_xml,
    read_columns,
    read_csv,
    read_jsonl,
    read_text,
    read_zip,
)
from medmoe_jax.data.medical.row import Row, build, held_out

LABELS_CMEDTC = [
    "Addictive Behavior",
    "Address",
    "Age",
    "Alcohol Consumer",
    "Allergy Intolerance",
    "Bedtime",
    "Blood Donation",
    "Capacity",
    "Compliance with Protocol",
    "Consent",
    "Data Accessible",
    "Device",
    "Diagnostic",
    "Diet",
    "Disabilities",
    "Disease",
    "Education",
    "Encounter",
    "Enrollment in other studies",
    "Ethical Audit",
    "Ethnicity",
    "Exercise",
    "Gender",
    "Healthy",
    "Laboratory Examinations",
    "Life Expectancy",
    "Literacy",
    "Multiple",
    "Neoplasm Status",
    "Non-Neoplasm Disease Stage",
    "Nursing",
    "Oral related",
    "Organ or Tissue Status",
    "Pharmaceutical Substance or Drug",
    "Pregnancy-related Activity",
    "Receptor Status",
    "Researcher Decision",
    "Risk Assessment",
    "Sexual related",
    "Sign",
    "Smoking Status",
    "Special Patient Characteristic",
    "Symptom",
    "Therapy or Surgery",
]
LABELS_CMEDIC = {"0": "无", "1": "弱", "2": "强"}  # no, weak or firm intent to seek care
LABELS_SAME = {"1": "是的", "0": "不是"}
LABELS_DANET = ("да", "нет")
LABELS_RQE = ("true", "false")
LABELS_SECTION = [
    "ALLERGY",
    "ASSESSMENT",
    "CC",
    "DIAGNOSIS",
    "DISPOSITION",
    "EDCOURSE",
    "EXAM",
    "FAM/SOCHX",
    "GENHX",
    "GYNHX",
    "IMAGING",
    "IMMUNIZATIONS",
    "LABS",
    "MEDICATIONS",
    "OTHER_HISTORY",
    "PASTMEDICALHX",
    "PASTSURGICAL",
    "PLAN",
    "PROCEDURES",
    "ROS",
]
MTS_FILES = {
    "train": ("MTS-Dialog-TrainingSet.csv",),
    "dev": ("MTS-Dialog-ValidationSet.csv",),
    "test": ("MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv",),
}
MEDQUAD_FILES = ("1_CancerGov_QA.zip", "5_NIDDK_QA.zip", "6_NINDS_QA.zip", "9_CDC_QA.zip")


def read_cmedtc(folder: Path, split: str) -> Iterator[Row]:
    """Criterion of a clinical trial -> one of 44 topics."""
    for where, (label, text) in read_columns(folder / f"cMedTC/{split}.txt", 2):
        one_of(label, LABELS_CMEDTC, "topic", where)
        yield build("cmedtc", "zh", text, label, after="\n类别：", choices=LABELS_CMEDTC)


def read_cmedic(folder: Path, split: str) -> Iterator[Row]:
    """Query -> strength of the intent to seek care."""
    labels = tuple(LABELS_CMEDIC.values())
    for where, (label, text) in read_columns(folder / f"cMedIC/{split}.txt", 2):
        answer = LABELS_CMEDIC[one_of(label, LABELS_CMEDIC, "intent", where)]
        yield build("cmedic", "zh", text, answer, after="\n就医意图：", choices=labels)


def read_cmedqq(folder: Path, split: str) -> Iterator[Row]:
    """Two questions -> whether they ask the same."""
    labels = tuple(LABELS_SAME.values())
    for where, (label, one, two) in read_columns(folder / f"cMedQQ/{split}.txt", 3):
        answer = LABELS_SAME[one_of(label, LABELS_SAME, "label", where)]
        after = f"\n{two.strip()}\n两句意思相同吗？"
        yield build("cmedqq", "zh", one, answer, after=after, choices=labels)


def read_danet(folder: Path, split: str) -> Iterator[Row]:
    """Passage and question -> yes or no."""
    for where, record in read_jsonl(folder / f"RuMedDaNet/{split}_v1.jsonl"):
        answer = one_of(need(record, "answer", where), LABELS_DANET, "answer", where)
        after = f"\n{need(record, 'question', where).strip()} (да/нет):"
        text = need(record, "context", where)
        yield build("rumed_danet", "ru", text, answer, after=after, choices=LABELS_DANET)


def read_complaints(name: str, task: str, ask: str):
    """Reader of complaints -> code; the label set is all codes of the train and dev files."""

    def read(folder: Path, split: str) -> Iterator[Row]:
        files = {s: list(read_jsonl(folder / f"{task}/{s}_v1.jsonl")) for s in ("train", "dev")}
        labels = sorted({need(r, "code", where) for f in files.values() for where, r in f})
        for where, record in files[split]:
            text = need(record, "symptoms", where)
            yield build(name, "ru", text, record["code"], after=f"\n{ask}:", choices=labels)

    return read


def read_rqe(folder: Path, split: str) -> Iterator[Row]:
    """Two questions -> whether an answer to the second also answers the first.

    Pairs that lack a question in the original file are left out.
    """
    path = folder / "RQE_Train_8588_AMIA2016.xml"
    for pair in parse_xml(read_text(path).encode(), str(path)):
        where = f"{path}: pair {pair.get('pid')}"
        fields = {child.tag: (child.text or "").strip() for child in pair}
        text, other = fields.get("chq"), fields.get("faq")
        answer = one_of(pair.get("value") or "", LABELS_RQE, "value", where)
        if text and other and held_out(text) == (split == "dev"):
            after = f"\n{other}\nDoes the first question entail the second? (true/false):"
            yield build("rqe", "en", text, answer, after=after, choices=LABELS_RQE)


def read_mts_section(folder: Path, split: str) -> Iterator[Row]:
    """Dialogue -> the section of the note that it belongs to."""
    for file in MTS_FILES[split]:
        for where, record in read_csv(folder / file):
            label = need(record, "section_header", where).strip()
            one_of(label, LABELS_SECTION, "section_header", where)
            text = need(record, "dialogue", where)
            yield build(
                "mts_section", "en", text, label, after="\nSection:", choices=LABELS_SECTION
            )


def read_medquad_type(folder: Path, split: str) -> Iterator[Row]:
    """Question -> its type; the label set is all types of the files."""
    pairs = list(medquad_pairs(folder))
    labels = sorted({kind for _, _, kind, _ in pairs})
    for document, question, kind, _ in pairs:
        if held_out(document) == (split == "dev"):
            yield build("medquad_type", "en", question, kind, after="\nType:", choices=labels)


def medquad_pairs(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """`(document, question, question type, answer)` of MedQuAD.

    The document is its topic, or its own id where the file names none: never the file's path, for
    the held-out fifth must be the same wherever the data lies.
    """
    for file in MEDQUAD_FILES:
        for where, data in read_zip(folder / file, ".xml"):
            root = parse_xml(data, where)
            focus = (root.findtext("Focus") or "").strip() or f"{file}:{root.get('id')}"
            for pair in root.iter("QAPair"):
                question, answer = pair.find("Question"), (pair.findtext("Answer") or "").strip()
                if question is not None and (question.text or "").strip() and answer:
                    kind = need(dict(question.attrib), "qtype", where)
                    yield focus, " ".join(question.text.split()), kind, answer
