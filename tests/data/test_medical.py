"""The medical sets: sizes, known rows, splits that do not leak, strictness on corrupt files."""

import csv
import gzip
import json
import zipfile

import pytest

from medmoe_jax.data import medical
from medmoe_jax.data.medical import entities, exams, files, row, texts
from medmoe_jax.errors import UserError

SIZES = {  # train, dev
    "cmedtc": (14604, 1550),
    "cmedic": (1683, 123),
    "cmedqq": (16071, 1793),
    "cmedqaner": (1673, 175),
    "rumed_danet": (1052, 256),
    "rumed_top3": (4690, 848),
    "rumed_symptom": (2470, 415),
    "rumed_ner": (3419, 676),
    "pubmedqa": (397, 103),
    "medqa": (655, 145),
    "medmcqa": (1606, 394),
    "mmlu": (977, 248),
    "jmmlu": (575, 248),
    "mmlu_african": (180, 828),
    "frenchmedmcqa": (2171, 312),
    "jmed_crade": (0, 100),
    "jmed_smdis": (0, 100),
    "mts_dialog": (1199, 100),
    "mts_section": (1198, 100),
    "aci_bench": (67, 20),
    "meqsum": (785, 215),
    "vihealth": (1066, 260),
    "rqe": (6881, 1706),
    "medquad": (2558, 721),
    "medquad_type": (2558, 721),
    "ncbi_disease": (5420, 923),
    "bc5cdr": (4566, 4590),
    "bc5cdr_relations": (500, 500),
    "tico19": (40901, 3781),
}


def read(name, split, data_dir):
    return list(medical.rows(name, split, data_dir))


@pytest.mark.data
@pytest.mark.parametrize("name", list(medical.SETS))
def test_every_set_reads_with_its_size_and_does_not_leak(name, data_dir):
    entry = medical.SETS[name]
    dev = read(name, "dev", data_dir)
    train = read(name, "train", data_dir) if "train" in entry.splits else []
    assert (len(train), len(dev)) == SIZES[name]
    for item in train + dev:
        assert item.prompt and item.response and item.name == name and item.kind == entry.kind
        assert item.language in entry.languages
        assert bool(item.choices) == (item.kind == "choice")
        assert not item.choices or item.response in item.choices
        assert item.prompt[slice(*item.body)].strip()
    evaluated = [r for s in entry.splits if s != "train" for r in read(name, s, data_dir)]
    assert not {row.normal(r.prompt) for r in train} & {row.normal(r.prompt) for r in evaluated}
    assert {r.language for r in dev} == set(entry.languages)


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in medical.SETS if name != "tico19"])
def test_the_held_out_rows_do_not_depend_on_where_the_data_lies(name, data_dir, tmp_path):
    (tmp_path / "moved").symlink_to(data_dir)
    assert read(name, "dev", tmp_path / "moved") == read(name, "dev", data_dir)


@pytest.mark.data
def test_known_rows(data_dir):
    first = {
        n: read(n, "dev", data_dir)[0] for n in ("cmedtc", "cmedqaner", "mmlu_african", "bc5cdr")
    }
    assert first["cmedtc"].prompt == "2.伴有血流动力学不稳定或急性心力衰竭者\n类别："
    assert first["cmedtc"].response == "Disease" and len(first["cmedtc"].choices) == 44
    assert first["cmedqaner"].response == "身体实体：嘴"
    assert first["mmlu_african"].prompt.endswith("\nAntwoord (A/B/C/D):")
    assert first["bc5cdr"].response == (
        "Chemical: lithium carbonate\nDisease: Tricuspid valve regurgitation; toxicity"
    )
    several = {r.response for r in read("frenchmedmcqa", "dev", data_dir)}
    assert "E" in several and any("," in answer for answer in several)


@pytest.mark.data
def test_english_and_japanese_hold_out_the_same_mmlu_questions(data_dir):
    def answers(path):
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [fields[5].strip() for fields in csv.reader(file)]

    for subject, (start, stop, ja_start) in exams.MMLU_HELD_OUT.items():
        en = answers(data_dir / f"mmlu_medical_en/{subject}_test.csv")[1:]
        en = ["ABCD"[int(a)] for a in en]
        ja = answers(data_dir / f"jmmlu_medical_ja/{subject}.csv")
        # Every Japanese question follows the English order, none is added.
        rest = iter(en[:start])
        assert all(a in rest for a in ja[:ja_start])
        rest = iter(en[start:stop])
        assert all(a in rest for a in ja[ja_start:])
        assert 0 <= (stop - start) - (len(ja) - ja_start) <= 2


@pytest.mark.data
def test_exam_questions_of_one_set_are_not_held_out_in_another(data_dir):
    names = ("medqa", "medmcqa", "mmlu", "mmlu_african")
    question = {
        split: {
            row.normal(r.prompt[slice(*r.body)])
            for n in names
            for r in read(n, split, data_dir)
            if r.body[1] - r.body[0] > 80
        }
        for split in ("train", "dev")
    }
    assert not question["train"] & question["dev"]


@pytest.mark.data
def test_tico_is_split_by_document_in_every_language(data_dir):
    for code in texts.LANGUAGE_NAMES:
        with gzip.open(data_dir / f"tico19_multilingual/en-{code}.jsonl.gz", "rt") as file:
            documents = {json.loads(line)["id"].split(":")[0] for line in file}
        assert documents >= texts.TICO_HELD_OUT
    english = {
        split: {r.prompt[slice(*r.body)] for r in read("tico19", split, data_dir)}
        for split in ("train", "dev")
    }
    assert not english["train"] & english["dev"]


@pytest.mark.data
def test_one_language_of_a_set(data_dir):
    zulu = read("mmlu_african:zu", "dev", data_dir)
    assert len(zulu) == 69 and {r.language for r in zulu} == {"zu"}


@pytest.mark.data
def test_the_two_tests_of_a_document_are_on_one_side(data_dir):
    answers = {r.prompt for r in read("medquad", "dev", data_dir)}
    types = {r.prompt.removesuffix("\nType:") for r in read("medquad_type", "train", data_dir)}
    assert not answers & types


def test_unknown_names_and_splits(tmp_path):
    with pytest.raises(UserError, match="cmedtd"):
        next(medical.rows("cmedtd", "dev", tmp_path))
    with pytest.raises(UserError, match="tico19 has no language 'xx'"):
        next(medical.rows("tico19:xx", "dev", tmp_path))
    with pytest.raises(UserError, match="jmed_smdis has no split 'train'"):
        next(medical.rows("jmed_smdis", "train", tmp_path))


def test_missing_folder_names_the_variable(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"MEDMOE_DATA.*chineseblue_zh"):
        next(medical.rows("cmedtc", "dev", tmp_path))
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="MEDMOE_DATA"):
        medical.data_root()


CORRUPT = [
    ("cmedtc", "chineseblue_zh/cMedTC/dev.txt", "Disease\t文\nDisease 文\n", r"dev\.txt:2: 1 col"),
    (
        "cmedtc",
        "chineseblue_zh/cMedTC/dev.txt",
        "Disease\t文\nFoo\t文\n",
        r"dev\.txt:2: topic 'Foo'",
    ),
    ("cmedqaner", "chineseblue_zh/cMedQANER/dev.txt", "好 O\n好X\n", r"dev\.txt:2"),
    ("rumed_danet", "rumedbench_ru/RuMedDaNet/dev_v1.jsonl", "{}\n", r"jsonl:1: field 'answer'"),
    ("rumed_danet", "rumedbench_ru/RuMedDaNet/dev_v1.jsonl", "\n{,\n", r"jsonl:2: not JSON"),
    ("medqa", "medqa_usmle_en/medqa_rows_0001_0800.jsonl", "[1]\n", r"jsonl:1: not a JSON obj"),
    ("jmed_smdis", "jmed_llm_ja/smdis.csv", "tag,question\na\n", r"smdis\.csv:2: 1 columns"),
    ("jmed_smdis", "jmed_llm_ja/smdis.csv", 'tag,q\na,"b"c\n', r"smdis\.csv:2: not CSV"),
    ("rqe", "rqe_en/RQE_Train_8588_AMIA2016.xml", "<a>\n<b></a>", r"xml:2: not XML"),
    ("medquad", "medquad_en/1_CancerGov_QA.zip", "no zip", r"QA\.zip: not a whole zip"),
    ("tico19", "tico19_multilingual/en-ar.jsonl.gz", "no gzip", r"gz: not a whole gzip"),
    ("frenchmedmcqa", "frenchmedmcqa_fr/dev.json", "[\n{]", r"dev\.json:2: not JSON"),
    (
        "bc5cdr",
        "bc5cdr_en/CDR_DevelopmentSet.PubTator.txt",
        "1|t|a b\n1\t0\t1\tx\tD\ti\n",
        r"txt:2",
    ),
    ("ncbi_disease", "ncbi_disease_en/devel.tsv", b"a\tO\n\xff\xfe\tO\n", r"tsv:2: not UTF-8"),
]


@pytest.mark.parametrize(("name", "file", "text", "message"), CORRUPT)
def test_a_corrupt_file_is_named_with_its_line(tmp_path, name, file, text, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        list(medical.rows(name, "dev", tmp_path))


def test_a_truncated_member_of_a_zip_file(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.xml", "<a>" + "text " * 500 + "</a>")
    data = bytearray(path.read_bytes())
    data[50:60] = b"\0" * 10
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip"):
        list(files.read_zip(path, ".xml"))


def test_duplicates_of_dev_leave_train(tmp_path):
    folder = tmp_path / "chineseblue_zh" / "cMedIC"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("1\t头 痛\n2\t发烧\n1\t发烧\n", encoding="utf-8")
    (folder / "dev.txt").write_text("2\t发烧\n", encoding="utf-8")
    train = list(medical.rows("cmedic", "train", tmp_path))
    assert [r.prompt for r in train] == ["头 痛\n就医意图："]
    assert train[0].conversation() == {
        "conversations": [
            {"role": "user", "content": "头 痛\n就医意图："},
            {"role": "assistant", "content": "弱"},
        ],
        "language": "zh",
    }


def test_spans_of_bio_tags():
    tags = ["B-A", "I-A", "I-B", "O", "I-A", "B-A", "B-A"]
    assert list(entities.spans(tags)) == [
        ("A", 0, 2),
        ("B", 2, 3),
        ("A", 4, 5),
        ("A", 5, 6),
        ("A", 6, 7),
    ]


def test_shorten_cuts_only_the_body():
    whole = row.build("x", "en", "abcdefgh", "yes", before="Q: ", after=" (y/n):", choices=("y",))
    assert medical.shorten(whole, 18) is whole
    cut = medical.shorten(whole, 14)
    assert cut.prompt == "Q: abcd (y/n):" and cut.prompt[slice(*cut.body)] == "abcd"
    assert medical.shorten(whole, 3).prompt == "Q:  (y/n):"
    by_bytes = medical.shorten(row.build("x", "zh", "头痛发烧", "y"), 7, lambda t: len(t.encode()))
    assert by_bytes.prompt == "头痛"


def test_hold_out_is_fixed_and_near_its_share():
    assert row.held_out("A  question") == row.held_out("a question")
    share = sum(row.held_out(f"question {i}") for i in range(4000)) / 4000
    assert abs(share - 0.2) < 0.02
