"""Files in the layout and format that each medical set has upstream, with content made for tests.

`write(name, root)` lays out all splits of a set at the first place that its card names, two records
a file; the texts hold the name of their split, so that a row tells where it came from.
"""

import csv
import io
import json
import zipfile

import pyarrow
import pyarrow.parquet

from medmoe_jax.data import medical

OPTIONS = ("aspirin", "heparin", "warfarin", "insulin", "morphine")


def letters(count, **more):
    return dict(zip("ABCDE"[:count], OPTIONS, strict=False)) | more


def exam(part, n, /, **fields):
    """A question that names its split; two of each, with answers B and C."""
    return {"question": f"Which drug, {part} {n}?", **fields}


# Set -> record of a split and number. Fields are those of the set's own files.
RECORDS = {
    "cmedtc": lambda s, n: ["Age", f"{s} 年龄{n}岁"],
    "cmedic": lambda s, n: [str(n), f"{s} 头痛{n}"],
    "cmedqq": lambda s, n: [str(n % 2), f"{s} 头痛{n}", "头疼"],
    "rumed_danet": lambda s, n: {"context": f"{s} {n}", "question": "Да?", "answer": "да"},
    "rumed_top3": lambda s, n: {"symptoms": f"{s} боль {n}", "code": f"A0{n}"},
    "rumed_symptom": lambda s, n: {"symptoms": f"{s} боль {n}", "code": f"кашель {n}"},
    "rumed_ner": lambda s, n: {
        "tokens": ["пил", f"{s}{n}", "от", "гриппа"],
        "ner_tags": ["O", "B-Drugname", "O", "B-DI"],
    },
    "medqa": lambda s, n: exam(s, n, options=letters(4), answer_idx="BC"[n], answer=OPTIONS[n + 1]),
    "medqa_5": lambda s, n: exam(s, n, options=letters(5), answer=OPTIONS[n + 1]),
    "medmcqa": lambda s, n: exam(
        s,
        n,
        **{f"op{k}": o for k, o in zip("abcd", OPTIONS, strict=False)},
        cop=n + 2,
        choice_type="single",
        subject_name="Pharmacology",
    ),
    "mmlu": lambda s, n: [f"Which drug, {s} {n}?", *OPTIONS[:4], "BC"[n]],
    "mmlu_pro_health": lambda s, n: exam(
        s,
        n,
        options=[*OPTIONS, *(f"drug {i}" for i in range(5))],
        answer="BC"[n],
        category="health",
    ),
    "medxpertqa": lambda s, n: exam(
        s,
        n,
        question=f"Which drug, {s} {n}?\nAnswer Choices: (A) aspirin (B) heparin",
        options=letters(5),
        label="BC"[n],
        medical_task="Treatment",
    ),
    "medbullets": lambda s, n: exam(
        s,
        n,
        **{f"op{k}": o for k, o in zip("abcd", OPTIONS, strict=False)},
        answer_idx="BC"[n],
        answer=OPTIONS[n + 1],
    ),
    "metamedqa": lambda s, n: exam(
        s, n, options=letters(5), answer=OPTIONS[n + 1], answer_idx="BC"[n]
    ),
    "afrimed_qa": lambda s, n: exam(
        s,
        n,
        question_type="mcq",
        split=s,
        answer_options=json.dumps({f"option{i + 1}": o for i, o in enumerate(OPTIONS)}),
        correct_answer=f"option{n + 2}",
        specialty="Surgery",
    ),
    "cmb": lambda s, n: exam(s, n, option=letters(5, E=""), answer="BC"[n], exam_type="医师考试"),
    "cmexam": lambda s, n: {
        "Question": f"哪种药 {s} {n}?",
        "Options": "\n".join(f"{k} {o}" for k, o in letters(5).items()),
        "Answer": "BC"[n],
        "Medical Discipline": "内科",
    },
    "cmmlu": lambda s, n: {"": n, "Question": f"哪种药 {s} {n}?", **letters(4), "Answer": "BC"[n]},
    "ceval": lambda s, n: {"id": n, **exam(s, n), **letters(4), "answer": "BC"[n]},
    "ple_pharmacy": lambda s, n: exam(s, n, option=letters(5), answer="BC"[n]),
    "frenchmedmcqa": lambda s, n: exam(
        s,
        n,
        answers={k.lower(): o for k, o in letters(5).items()},
        correct_answers=["c", "a"] if n else ["b"],
    ),
    "headqa": lambda s, n: {
        "qtext": f"Which drug, {s} {n}?",
        "ra": str(n + 2),
        "answers": [{"aid": str(i + 1), "atext": o} for i, o in enumerate(OPTIONS)],
    },
    "mmedbench": lambda s, n: exam(s, n, options=letters(5), answer_idx="BC"[n], rationale="…"),
    "xmedbench": lambda s, n: exam(
        s,
        n,
        options="\n".join(f"({k}) {o}" for k, o in letters(4).items()),
        answer=f"({'BC'[n]})",
        source="KorMedMCQA" if n else "medmcqa",
        **{"class": "major"},
    ),
    "jmmlu": lambda s, n: [f"どの薬 {s} {n}?", *OPTIONS[:4], "BC"[n]],
    "jmed_crade": lambda s, n: {
        "tag": "d",
        "question": f"薬は？\n「{s} {n}」",
        **{f"option{k}": o for k, o in letters(4).items()},
        "answer": "BC"[n],
    },
    "jmed_mrner_disease": lambda s, n: {
        "tag": "d",
        "question": f"所見は？\n「{s} {n} 発熱；嚥下障害」",
        "answer": "['発熱;嚥下障害', '咳']",
    },
    "mts_dialog": lambda s, n: {
        "ID": n,
        "section_header": "CC",
        "section_text": f"{s} cough {n}",
        "dialogue": f"Doctor:  Hello {s} {n}\r\nPatient: Hi",
    },
    "aci_bench": lambda s, n: {"dialogue": f"[doctor] hi {s} {n}", "note": f"CHIEF {s}\n\ncough"},
    "meqsum": lambda s, n: {"File": n, "CHQ": f"My {s} question {n}", "Summary": f"Short {n}?"},
    "mednli": lambda s, n: {
        "sentence1": f"Fever {s} {n}.",
        "sentence2": "The patient is ill.",
        "gold_label": ("entailment", "neutral")[n],
    },
    "medec": lambda s, n: {
        "Text ID": n,
        "Sentences": f"0 Fever {s} {n}.\n1 Treated with salt.",
        "Error Flag": str(n),
        "Error Sentence ID": str((n and 1) or -1),
        "Corrected Sentence": "Treated with aspirin." if n else "NA",
    },
    "medcalc": lambda s, n: {
        "Patient Note": f"A man {s} {n}, 80 kg, 2 m.",
        "Question": "What is the BMI?",
        "Category": "physical",
        "Ground Truth Answer": "20.0",
        "Lower Limit": "19.0",
        "Upper Limit": "21.0",
    },
}
BLUE = {
    "STS": ("CHIP-STS", "是的", ["是的", "不是"]),
    "IR": ("KUAKE-IR", "相关", ["相关", "不相关"]),
    "QTR": ("KUAKE-QTR", "完全匹配", ["完全匹配", "部分匹配"]),
    "QQR": ("KUAKE-QQR", "完全一致", ["完全一致", "语义无直接关联"]),
    "QIC": ("KUAKE-QIC", "病情诊断", ["病情诊断", "治疗方案"]),
    "CTC": ("CHIP-CTC", "非上述类型", ["年龄", "性别"]),
    "DAC": ("IMCS-V2-DAC", "非上述类型", ["关于症状的询问"]),
    "CMeEE": ("CMeEE-V2", "上述句子中的实体包含：\n疾病实体：感冒，肺炎", ["疾病"]),
    "NER": ("IMCS-V2-NER", "上述句子中的实体包含：\n症状实体：咳嗽", ["症状"]),
    "CMeIE": (
        "CMeIE",
        "具有药物治疗关系的头尾实体对如下：头实体为感冒，尾实体为阿司匹林。",
        ["药物治疗"],
    ),
    "CDEE": (
        "CHIP-CDEE",
        "上述句子中的临床发现事件如下：\n主体词：疼痛；发生状态：否定；描述词：持续，轻；解剖部位：头",
        None,
    ),
    "CDN": ("CHIP-CDN", "感冒，咳嗽", ["感冒", "咳嗽", "肺炎"]),
    "SR": ("IMCS-V2-SR", "症状及其阴阳性判断为：\n咳嗽：患有该症状", ["患有该症状"]),
    "MDCFNPC": ("CHIP-MDCFNPC", "判别如下：\n咳嗽：未患有症状疾病", ["未患有症状疾病"]),
    "MRG": (
        "IMCS-V2-MRG",
        "报告如下：\n主诉：咳嗽。\n现病史：三天。\n辅助检查：暂缺。\n既往史：不详。\n诊断：感冒。\n建议：休息。",
        None,
    ),
    "MedDG": ("MedDG", "多喝水。", None),
}
ALIKE = {
    "medqa_mainland": "medqa_5",
    "medqa_mainland_4": "medqa_5",
    "medbullets_5": "medbullets",
    "mmlu_african": "mmlu",
    "ple_tcm": "ple_pharmacy",
    "jmed_smdis": "jmed_crade",
    "jmed_rrtnm": "jmed_crade",
    "jmed_mrner_medicine": "jmed_mrner_disease",
    "mts_section": "mts_dialog",
    "medec_sentence": "medec",
    "medec_correction": "medec",
    "cmexam_several": "cmexam",
    "cmb_several": "cmb",
    "medquad_type": "medquad",
    "bc5cdr_relations": "bc5cdr",
}


def write(name, root, splits=None):
    """All files of a set, or of some of its splits, below `root`; returns their paths by split."""
    entry = medical.SETS[name]
    base = root / entry.folder[-1]
    paths = {}
    for split, sources in entry.files.items():
        if splits is None or split in splits:
            paths[split] = [
                path for source in sources for path in _places(entry, base, source.split(" | ")[0])
            ]
            for path in paths[split]:
                path.parent.mkdir(parents=True, exist_ok=True)
                content(name, split, path)
    return paths


def _places(entry, base, pattern):
    names = [pattern.replace("*", "0")]
    for place, table in entry.expand.items():
        names = [n.replace(f"{{{place}}}", v) for n in names for v in table.values()]
    return [base / name for name in dict.fromkeys(names)]


def content(name, split, path):
    """One file of a set."""
    of = ALIKE.get(name, name)
    special = SPECIAL.get("cblue" if name.startswith("cblue") else of)
    if special:
        special(split, path)
        return
    tag = f"{split} {path.stem}" if "_" in path.stem and name in ("mmlu", "mmlu_african") else split
    records = [RECORDS[of](tag, n) for n in (0, 1)]
    if name.endswith("_several"):
        records = [{**r, "answer": "BD", "Answer": "BD"} for r in records]
        records = [{k: v for k, v in r.items() if k in RECORDS[of](split, 0)} for r in records]
    if name == "medbullets_5":
        records = [{**r, "ope": OPTIONS[4]} for r in records]
    RENDER[path.suffix](records, path)


def _lines(records, path):
    if isinstance(records[0], list):
        text = "".join("\t".join(r) + "\n" for r in records)
    else:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")


def _json(records, path):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def csv_text(records):
    out = io.StringIO()
    writer = csv.writer(out)
    if isinstance(records[0], dict):
        writer.writerow(records[0])
        records = [list(r.values()) for r in records]
    writer.writerows(records)
    return out.getvalue()


def _csv(records, path):
    path.write_text(csv_text(records), encoding="utf-8")


def _parquet(records, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def _xlsx(records, path):
    import openpyxl

    book = openpyxl.Workbook()
    for row in [list(records[0]), *(list(r.values()) for r in records)]:
        book.active.append(row)
    book.save(path)


RENDER = {
    ".jsonl": _lines,
    ".txt": _lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".xlsx": _xlsx,
}


def _bio(joint, word):
    def render(split, path):
        texts = [[(word(split), "O"), ("感冒" if joint == " " else "flu", "B_disease")]] * 2
        if joint == "\t":
            texts = [[(f"{split}{n}", "O"), ("flu", "B-Disease"), (";", "I-Disease")] for n in "01"]
        lines = ["\n".join(joint.join(pair) for pair in text) + "\n\n" for text in texts]
        path.write_text("".join(lines), encoding="utf-8")

    return render


def _pubtator(split, path):
    title = f"Case {split}: aspirin and ulcer."
    at = title.index("aspirin"), title.index("ulcer")
    path.write_text(
        f"1|t|{title}\n1|a|Nothing else.\n1\t{at[0]}\t{at[0] + 7}\taspirin\tChemical\tD1\n"
        f"1\t{at[1]}\t{at[1] + 5}\tulcer\tDisease\tD2\n1\tCID\tD1\tD2\n\n"
    )


def _rqe(split, path):
    pairs = "".join(
        f'<pair pid="{n}" value="{("false", "true")[n % 2]}"><chq>First {split} {n}?</chq>'
        f"<faq>Second {n}?</faq></pair>"
        for n in range(12)
    )
    path.write_text(f"<entailment>{pairs}</entailment>")


def _medquad(split, path):
    path.mkdir(parents=True)
    for n in range(3):
        (path / f"{n}.xml").write_text(
            f'<Document id="{n}"><Focus>topic {path.name} {n}</Focus><QAPairs><QAPair pid="1">'
            f'<Question qid="{n}" qtype="symptoms">What of {path.name} {n}?</Question>'
            f"<Answer>Rest {n}.</Answer></QAPair></QAPairs></Document>"
        )


def _tico(split, path):
    units = "".join(
        f'<tu tuid="{document}:{n}"><tuv xml:lang="en"><seg>Wash hands {document} {n}.</seg></tuv>'
        f'<tuv xml:lang="x"><seg>{text}</seg></tuv></tu>'
        for document in ("PubMed_6", "PubMed_7")
        for n, text in ((0, "mano"), (1, "{NS}"))
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("all.tmx", f"<tmx><body>{units}</body></tmx>")


def _aligned(split, path):
    path.write_text(f"Em bị sốt_cao {split} 0 .\nEm ho {split} 1 .\n")
    path.with_name(path.name.removesuffix("src") + "tgt.tagged").write_text("Sốt_cao ?\nHo ?\n")


def _pubmedqa(split, path):
    records = {
        f"{split}{n}": {
            "QUESTION": f"Does it help, {split} {n}?",
            "CONTEXTS": [f"We asked {split}.", "We saw."],
            "final_decision": ("yes", "maybe")[n],
        }
        for n in (0, 1)
    }
    path.write_text(json.dumps(records))


def _headqa(split, path):
    records = [RECORDS["headqa"](split, n) for n in (0, 1)]
    exams = {"Cuaderno_1": {"name": "x", "data": records[:1]}, "Cuaderno_2": {"data": records[1:]}}
    path.write_text(json.dumps({"version": 1, "exams": exams}))


def _bioasq(split, path):
    questions = [
        {
            "type": kind,
            "body": f"Is it so, {split} {n}?",
            "exact_answer": ("yes", ["No"])[n] if kind == "yesno" else "x",
            "snippets": [{"text": f"It is {n}."}],
        }
        for n, kind in ((0, "yesno"), (1, "yesno"), (1, "factoid"))
    ]
    path.write_text(json.dumps({"questions": questions}))


def _patients(split, path):
    evidences = {
        "E_1": {"question_en": "Do you cough?"},
        "E_2": {"question_en": "What colour?", "value_meaning": {"V_1": {"en": "red"}}},
    }
    (path.parent / "release_evidences.json").write_text(json.dumps(evidences))
    conditions = {f"Disease {i}": {} for i in range(15)}
    (path.parent / "release_conditions.json").write_text(json.dumps(conditions))
    age = {"train": 10, "dev": 20, "test": 30}[split]
    rows = [
        {
            "AGE": age + n,
            "DIFFERENTIAL_DIAGNOSIS": "[['Disease 3', 0.6], ['Disease 4', 0.4]]",
            "SEX": "F",
            "PATHOLOGY": "Disease 3",
            "EVIDENCES": "['E_1', 'E_2_@_V_1']",
        }
        for n in (0, 1)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, csv_text(rows))


def _cblue(split, path):
    records = [
        {
            "input": f"{split} {task} {n}\n答：",
            "target": target,
            "answer_choices": choices,
            "task_dataset": task,
            "sample_id": f"{split}-{n}",
        }
        for task, target, choices in BLUE.values()
        for n in (0, 1)
    ]
    _lines(records, path)


def _meqsum(split, path):
    _xlsx([RECORDS["meqsum"](split, n) for n in range(12)], path)


def _afrimed(split, path):
    _csv([RECORDS["afrimed_qa"](s, n) for s in ("train", "test") for n in (0, 1)], path)


def _cmb(split, path):
    records = [RECORDS["cmb"](split, n) for n in (0, 1)]
    records += [{**RECORDS["cmb"](split, 0), "question": f"Which two, {split}?", "answer": "BD"}]
    if split == "test":
        records = [{**r, "id": n} for n, r in enumerate(records, 1)]
        answers = [{"id": r["id"], "answer": r.pop("answer")} for r in records]
        (path.parents[2] / "CMB-test-choice-answer.json").write_text(json.dumps(answers))
    _json(records, path)


SPECIAL = {
    "afrimed_qa": _afrimed,
    "cmedqaner": _bio(" ", lambda split: split),
    "ncbi_disease": _bio("\t", lambda split: split),
    "bc5cdr": _pubtator,
    "rqe": _rqe,
    "medquad": _medquad,
    "tico19": _tico,
    "vihealth": _aligned,
    "pubmedqa": _pubmedqa,
    "headqa": _headqa,
    "bioasq": _bioasq,
    "ddxplus": _patients,
    "cblue": _cblue,
    "meqsum": _meqsum,
    "cmb": _cmb,
}
