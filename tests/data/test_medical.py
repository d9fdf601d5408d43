"""The medical sets: sizes, known rows, splits that do not leak, strictness on corrupt files."""

import gzip
import json
import shutil
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from medmoe_jax.data import medical
from medmoe_jax.data.medical import cards, fields, files, formats, forms, locate, registry, row
from medmoe_jax.data.sources import open_source
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import source
from tests.data import upstream

NAMES = list(medical.SETS)
SIZES = {  # rows of the data folder: train, dev, test; 0 where no file is there
    "cmedtc": (14443, 1550, 0),
    "cmedic": (1683, 123, 0),
    "cmedqq": (16063, 1793, 0),
    "cmedqaner": (1673, 175, 0),
    "rumed_danet": (1052, 256, 0),
    "rumed_top3": (4690, 848, 0),
    "rumed_symptom": (2470, 415, 0),
    "rumed_ner": (3416, 676, 0),
    "pubmedqa": (397, 103, 0),
    "medqa": (0, 0, 800),
    "medmcqa": (0, 2000, 0),
    "mmlu": (45, 0, 1180),
    "jmmlu": (0, 0, 823),
    "mmlu_african": (180, 828, 0),
    "frenchmedmcqa": (2170, 312, 0),
    "jmed_crade": (0, 0, 100),
    "jmed_smdis": (0, 0, 100),
    "mts_dialog": (1198, 100, 200),
    "mts_section": (1197, 100, 200),
    "aci_bench": (67, 20, 0),
    "meqsum": (785, 215, 0),
    "vihealth": (0, 1326, 0),
    "rqe": (6881, 1706, 0),
    "medquad": (2558, 721, 0),
    "medquad_type": (2558, 721, 0),
    "ncbi_disease": (5420, 923, 0),
    "bc5cdr": (4566, 4590, 0),
    "bc5cdr_relations": (500, 500, 0),
    "tico19": (40901, 3781, 0),
}


def read(name, split, root):
    return list(medical.rows(name, split, root))


def there(name, root):
    """The splits of a set whose files are there."""
    entry = medical.SETS[name]
    source = {s: s if s in entry.files else "train" for s in entry.splits}
    return [s for s in entry.splits if locate.has_files(entry, source[s], root)]


def check_rows(name, rows):
    entry = medical.SETS[name]
    for item in rows:
        assert item.prompt and item.response and item.name == name and item.kind == entry.kind
        assert item.language in entry.languages
        assert bool(item.choices) == (item.kind == "choice")
        assert not item.choices or item.response in item.choices
        assert item.prompt[slice(*item.body)].strip() and "{" not in item.guide
        assert not item.texts or len(item.texts) >= 2


@pytest.mark.data
@pytest.mark.parametrize("name", SIZES)
def test_every_set_reads_with_its_size_and_does_not_leak(name, data_dir):
    rows = {split: read(name, split, data_dir) for split in there(name, data_dir)}
    assert tuple(len(rows.get(s, ())) for s in cards.SPLITS) == SIZES[name]
    check_rows(name, [r for split in rows.values() for r in split])
    seen = {row.normal(r.prompt) for s in rows if s != "train" for r in rows[s]}
    assert not {row.normal(r.prompt) for r in rows.get("train", ())} & seen


@pytest.mark.data
@pytest.mark.parametrize("name", ["medquad", "pubmedqa", "rqe", "meqsum"])
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
    text = first["bc5cdr"].prompt[slice(*first["bc5cdr"].body)]
    assert [(kind, text[a:b]) for kind, a, b in first["bc5cdr"].spans] == [
        ("Disease", "Tricuspid valve regurgitation"),
        ("Chemical", "lithium carbonate"),
        ("Disease", "toxicity"),
    ]
    several = {r.response for r in read("frenchmedmcqa", "dev", data_dir)}
    assert "E" in several and any("," in answer for answer in several)


@pytest.mark.data
@pytest.mark.parametrize("name", ["cmedqaner", "rumed_ner", "ncbi_disease", "bc5cdr"])
def test_spans_stand_where_they_say(name, data_dir):
    for item in read(name, "dev", data_dir)[:400]:
        text = item.prompt[slice(*item.body)]
        named = {(kind, text[start:stop]) for kind, start, stop in item.spans}
        for kind, mention in named:
            assert mention == mention.strip() and kind in item.response and mention in item.response
        assert bool(named) == (
            "\n" in item.response or ": " in item.response or "：" in item.response
        )


@pytest.mark.data
def test_exam_questions_of_one_set_are_not_evaluated_in_another(data_dir):
    """What trains in one set, and the test questions of the others."""
    names = ("medqa", "medmcqa", "mmlu", "mmlu_african")
    question = {
        trained: {
            row.normal(r.prompt[slice(*r.body)])
            for n in names
            for s in there(n, data_dir)
            if (s == "train") == trained
            for r in read(n, s, data_dir)
            if r.body[1] - r.body[0] > 80
        }
        for trained in (True, False)
    }
    assert not question[True] & question[False]


@pytest.mark.data
def test_one_language_or_subject_of_a_set(data_dir):
    zulu = read("mmlu_african:zu", "dev", data_dir)
    assert len(zulu) == 69 and {r.language for r in zulu} == {"zu"}
    anatomy = read("mmlu:anatomy", "test", data_dir)
    assert len(anatomy) == 135 and {r.part for r in anatomy} == {"anatomy"}


@pytest.mark.data
def test_the_two_tests_of_a_document_are_on_one_side(data_dir):
    answers = {r.prompt for r in read("medquad", "dev", data_dir)}
    types = {r.prompt.removesuffix("\nType:") for r in read("medquad_type", "train", data_dir)}
    assert not answers & types


@pytest.mark.data
def test_near_duplicates_of_dev_leave_train_and_are_counted(data_dir):
    """Width, punctuation and spaces are folded; signs that change the meaning are not."""
    split = medical.read_split("cmedtc", "train", data_dir)
    dev = medical.read_split("cmedtc", "dev", data_dir)
    assert split.left_out == 167 and dev.duplicates == 11
    assert row.normal("（2）年龄18～70岁，男女不限；") == row.normal("2 年龄18-70岁,男女不限")
    assert row.normal("年龄＞18岁") != row.normal("年龄<18岁")
    assert row.normal("Ｆever, chills.") == row.normal("fever chills")


# Upstream's layouts.


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The folder of a set in its upstream layout, made once."""
    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = root, upstream.write(name, root)
        return made[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_upstream_layout_is_read_in_its_split(name, laid_out, monkeypatch):
    root, paths = laid_out(name)
    entry = medical.SETS[name]
    opened = []
    real = formats.records

    def records(card, found):
        opened.append(found.path)
        return real(card, found)

    monkeypatch.setattr(registry.formats, "records", records)
    rows = {}
    for split in entry.splits:
        opened.clear()
        rows[split] = registry._read(entry, split, root, None)[0]
        collected = entry.read.get("labels") == "collected"
        own = paths.get(split, paths.get("train"))
        assert set(opened) >= set(own) and (collected or set(opened) == set(own))
        check_rows(name, rows[split])
    assert {r.language for split in rows.values() for r in split} <= set(entry.languages)
    trained = (
        {r.prompt for r in medical.read_split(name, "train", root).rows}
        if "train" in rows
        else set()
    )
    assert not trained & {r.prompt for r in rows.get("test", ())}
    if "test" in rows:
        with pytest.raises(UserError, match="'test' is for evaluation only"):
            medical.training_rows(name, "test", root)


def test_a_source_of_a_recipe_is_no_test_split(tmp_path, monkeypatch):
    upstream.write("cmedic", tmp_path)
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path))
    fields = source(reader="cmedic").to_dict()
    assert len(open_source("x", fields).rows) == 2
    with pytest.raises(UserError, match="cmedic: its split 'test' is for evaluation only"):
        open_source("x", fields | {"split": "test"})


def test_expected_rows_of_some_layouts(laid_out):
    def first(name, split="test"):
        return medical.read_split(name, split, laid_out(name)[0]).rows[0]

    assert (
        first("medmcqa", "dev").response == "B" and first("medmcqa", "dev").part == "Pharmacology"
    )
    assert first("medxpertqa").prompt.startswith("Which drug, test 0?\nA. aspirin\nB.")
    assert first("mmlu_pro_health").choices == tuple("ABCDEFGHIJ")
    assert first("headqa").language == "es" and first("headqa").prompt.endswith("/D/E):")
    assert first("xmedbench").language == "en" and first("xmedbench").part == "medmcqa"
    assert first("cmb").choices == tuple("ABCD")  # an option without text is none
    assert first("cmb_several").response == "B, D"
    assert (
        first("pubmedqa").prompt == "We asked test. We saw.\nDoes it help, test 0? (yes/no/maybe):"
    )
    case = first("ddxplus")
    assert case.prompt.startswith("Age: 30, sex: female\nDo you cough? yes\nWhat colour? red\nA. ")
    assert (
        case.texts["ABCDEFGHIJ".index(case.response)] == "Disease 3" and "Disease 4" in case.texts
    )
    assert first("ncbi_disease").response == 'Disease: "flu ;"'
    assert first("jmed_mrner_disease").response == '表現: "発熱;嚥下障害"; 咳'
    assert first("cblue_ctc", "dev").choices == ("年龄", "性别", "非上述类型")
    assert first("cblue_cdn", "dev").allowed == ("感冒", "咳嗽", "肺炎")
    assert first("medcalc").allowed == ("19.0", "21.0")
    assert first("medec_correction").response == "Treated with aspirin."
    assert first("bioasq").prompt == "It is 0.\nIs it so, test 0? (yes/no):"
    assert first("medquad", "dev").response == "Rest 1."


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_mmlu_with_and_without_a_header(tmp_path):
    """As upstream has it, and with the header and number of other copies."""
    plain = 'Which, "one"?,a,b,c,d,C\n'
    named = "question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,2\n"
    for place, text in (("data/test/anatomy_test.csv", plain), ("anatomy_test.csv", named)):
        write(tmp_path / place.replace("/", "") / "mmlu" / place, text.replace(', "one"', ""))
        split = medical.read_split("mmlu:anatomy", "test", tmp_path / place.replace("/", ""))
        assert [r.response for r in split.rows] == ["C"] and split.rows[0].texts == tuple("abcd")


@pytest.mark.parametrize(
    ("record", "path", "first", "right"),
    [
        ({"opa": "a", "opb": "", "opc": "c", "opd": "d", "cop": 3}, "opa,opb,opc,opd", 1, "c"),
        ({"opa": "a", "opb": None, "opc": "c", "opd": "d", "cop": 4}, "opa,opb,opc,opd", 1, "d"),
        ({"o": ["", "b", "c"], "cop": 2}, "o", 0, "c"),
        ({"o": {"A": "a", "B": "n/a", "C": "c"}, "cop": "2"}, "o", 0, "c"),
        ({"o": ["a", "b"], "cop": 1}, "o", 1, "a"),
    ],
)
def test_numbers_count_the_options_without_text_too(record, path, first, right):
    options = fields.options_of(record, path, "x")
    (place,) = fields.answers_of(record, "cop", options, first, "x")
    assert options[place][1] == right


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A 甲\nB \nC 丙\nD 丁", "A甲 B C丙 D丁"),
        ("A. x\nB.\nC. z", "Ax B Cz"),
        ("(A) x\n(B)\n(C) z", "Ax B Cz"),
        ("Pick one:\nA. one\ntwo\n\nB. y", "Aone two By"),
        ("A. take\nI would not\nB. y", "Atake I would not By"),
        ("A. x\nB. y\nD. w", "Ax By Dw"),
        ("A C 反应蛋白\nB D 二聚体", "AC 反应蛋白 BD 二聚体"),
        ("A．甲\nＢ：乙\r\nC、丙", "A甲 B乙 C丙"),
        ("a) x\nb) a cat\na cat\nc) z", "Ax Ba cat a cat Cz"),
        ("(A) x (B) y (C) z", "Ax By Cz"),
    ],
)
def test_options_of_one_text(text, want):
    options = fields.options_of({"o": text}, "o", "x")
    assert " ".join(key + option for key, option in options) == want


def test_what_a_lost_quotation_left_is_no_part_of_an_option():
    texts = ['gout\n"', 'the "spoon" sign', 'said\n"so"', 'six feet 2"']
    options = fields.options_of({"o": texts}, "o", "x")
    assert [option for _, option in options] == ["gout", *texts[1:]]


@pytest.mark.parametrize("gold", [1, "B"])
def test_a_right_option_without_text_is_told_apart(gold):
    record = {"o": ["a", "", "c"], "cop": gold}
    with pytest.raises(fields.GoldWithoutText, match="names an option without text"):
        fields.answers_of(record, "cop", fields.options_of(record, "o", "x"), 0, "x")


def test_records_whose_right_option_has_no_text_are_left_out_and_counted(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(registry, "SETS", dict(medical.SETS))
    medical.add_cards(write(tmp_path / "mine.toml", CARD.replace('"a, b"', '"a, b, c"')))
    items = "q,a,b,c,right\nWhich?,x,y,n/a,B\nNone?,x,y,N/A,C\nLast?,x,,z,C\nAll?,n/a,n/a,n/a,A\n"
    write(tmp_path / "mine" / "items.csv", items)
    split = medical.read_split("mine", "test", tmp_path)
    assert [(r.response, r.texts) for r in split.rows] == [("B", ("x", "y")), ("B", ("x", "z"))]
    assert split.without_gold == 2 and "2 records of test left out" in caplog.text


@pytest.mark.parametrize(
    ("texts", "said", "first", "right"),
    [
        (["8", "10", "12", "14"], "12", None, "12"),  # it counts to none: it is a text
        (["0", "1", "2", "3"], "2", None, "2"),  # both say the same
        (["1", "2", "3", "4"], "2", 0, "3"),  # the card says that numbers count
        (["1", "2", "3", "4"], "2", 1, "2"),
        (["1", "2", "3", "4"], "B", None, "2"),
        (["7.2", "7.4"], "7.4", None, "7.4"),
        (["1", "2", "3", "4"], "3", None, None),
        (["4", "5", "1", "2"], 1, None, None),
    ],
)
def test_a_number_that_is_an_option_s_text_is_no_guess(texts, said, first, right):
    record = {"o": texts, "key": said}
    options = fields.options_of(record, "o", "x")
    if right is None:
        with pytest.raises(UserError, match=r"may count to option .*counts_from = 0"):
            fields.answers_of(record, "key", options, first, "x")
    else:
        (place,) = fields.answers_of(record, "key", options, first, "x")
        assert options[place][1] == right


def test_a_part_that_no_row_has_is_named_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SETS", dict(medical.SETS))
    medical.add_cards(write(tmp_path / "mine.toml", CARD + 'part = "of"\n'))
    items = "q,a,b,right,of\nWhich?,x,y,A,Anatomy\nWho?,x,y,B,Surgery\n"
    write(tmp_path / "mine" / "items.csv", items)
    assert [r.part for r in medical.rows("mine:Surgery", "test", tmp_path)] == ["Surgery"]
    message = r"no part 'Anatmy' in split 'test' \(did you mean 'Anatomy'\?\); it has Anatomy, Surg"
    with pytest.raises(UserError, match=message):
        medical.read_split("mine:Anatmy", "test", tmp_path)


def test_metamedqa_is_read_by_its_letters(tmp_path):
    options = dict(zip("ABCDEF", ("2", "3", "5", "6", "7", "8"), strict=True))
    record = {"question": "How many?", "options": options, "answer": "5", "answer_idx": "C"}
    write(tmp_path / "metamedqa" / "test.jsonl", json.dumps(record) + "\n")
    assert [r.response for r in medical.rows("metamedqa", "test", tmp_path)] == ["C"]


def test_medmcqa_counts_from_one_in_json_and_from_zero_in_parquet(tmp_path):
    record = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2}
    write(tmp_path / "json/medmcqa/dev.json", json.dumps(record) + "\n")
    path = tmp_path / "parquet/medmcqa/data/validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    found = [read("medmcqa", "dev", tmp_path / kind)[0].response for kind in ("json", "parquet")]
    assert found == ["B", "C"]


def test_pubmedqa_in_its_forms(tmp_path):
    """One file with the list of test rows or without it, as an object or as a list."""
    record = {"QUESTION": "Q?", "CONTEXTS": ["c"], "final_decision": "no"}
    whole = {str(i): {**record, "QUESTION": f"Q{i}?"} for i in range(20)}
    base = tmp_path / "pubmedqa" / "data"
    write(base / "ori_pqal.json", json.dumps(whole))
    with pytest.raises(UserError, match=r"test_ground_truth\.json, which names the test rows"):
        read("pubmedqa", "test", tmp_path)
    write(base / "test_ground_truth.json", json.dumps({str(i): "no" for i in range(10)}))
    splits = {s: {r.prompt for r in read("pubmedqa", s, tmp_path)} for s in cards.SPLITS}
    assert len(splits["test"]) == 10 and len(splits["train"]) + len(splits["dev"]) == 10
    assert splits["test"] == {f"c\nQ{i}? (yes/no/maybe):" for i in range(10)}
    listed = [{"pubid": int(k), **v} for k, v in whole.items()]
    write(base / "ori_pqal.json", json.dumps(listed))
    assert {r.prompt for r in read("pubmedqa", "test", tmp_path)} == splits["test"]


def test_what_is_missing_is_said_and_the_rest_is_read(tmp_path, caplog):
    paths = upstream.write("tico19", tmp_path)["train"]
    for path in paths:
        if "en-fr" in path.name or "en-zu" in path.name:
            path.unlink()
    split = medical.read_split("tico19", "dev", tmp_path)
    assert len(split.missing) == 2 and "2 files of dev are not there" in caplog.text
    assert {r.language for r in split.rows} == set(medical.SETS["tico19"].languages) - {"fr", "zu"}
    assert len(read("tico19:ar", "dev", tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match=r"tico19: no file .*get it from https://"):
        read("tico19:fr", "dev", tmp_path)
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="tico19: no file of split 'train'"):
        read("tico19", "train", tmp_path)


def test_the_default_split_is_dev_or_test_where_no_dev_is_there(tmp_path):
    paths = upstream.write("medqa", tmp_path)
    entry = medical.SETS["medqa"]
    assert medical.default_split(entry, tmp_path) == "dev"
    paths["dev"][0].unlink()
    assert medical.default_split(entry, tmp_path) == "test"
    shutil.rmtree(tmp_path / "MedQA")
    assert medical.default_split(entry, tmp_path) == "dev"


def test_more_options_than_letters(tmp_path):
    path = tmp_path / "mmlu_pro" / "data" / "test-0.parquet"
    path.parent.mkdir(parents=True)
    for count in (26, 27):
        record = {"question": "Q", "options": [f"o{i}" for i in range(count)], "answer": "Z"}
        table = pyarrow.Table.from_pylist([{**record, "category": "health"}])
        pyarrow.parquet.write_table(table, path)
        if count == 26:
            assert read("mmlu_pro_health", "test", tmp_path)[0].response == "Z"
    with pytest.raises(UserError, match="row 1: 27 options in field 'options'"):
        read("mmlu_pro_health", "test", tmp_path)


def test_sets_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path / "medmcqa")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    upstream.write("medmcqa", tmp_path)
    rows = read("medmcqa", "dev", "hf://")
    assert len(rows) == 2 and asked[0][:2] == ("openlifescienceai/medmcqa", "dataset")
    assert "data/train-*.parquet" in asked[0][2]
    with pytest.raises(UserError, match=r"cmedtc is not read from the hub; get it from https"):
        read("cmedtc", "dev", "hf://")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no net")),
    )
    with pytest.raises(UserError, match=r"medmcqa: hf://openlife.* cannot be read \(no net\)"):
        read("medmcqa", "dev", "hf://")


# Bad input.


def test_unknown_names_and_splits(tmp_path):
    with pytest.raises(UserError, match="'cmedtd' is not a medical set; did you mean cmedtc"):
        next(medical.rows("cmedtd", "dev", tmp_path))
    with pytest.raises(UserError, match="tico19 has no language 'xx'"):
        next(medical.rows("tico19:xx", "dev", tmp_path))
    with pytest.raises(UserError, match="jmed_smdis has no split 'train'; it has test"):
        next(medical.rows("jmed_smdis", "train", tmp_path))


def test_missing_folder_names_the_variable(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"MEDMOE_DATA.*chineseblue_zh.*https://github"):
        next(medical.rows("cmedtc", "dev", tmp_path))
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="MEDMOE_DATA"):
        medical.data_root()


CORRUPT = [
    ("cmedtc", "cMedTC/dev.txt", "Disease\t文\nDisease 文\n", r"dev\.txt:2: 1 col"),
    (
        "cmedtc",
        "cMedTC/dev.txt",
        "Disease\t文\nFoo\t文\n",
        r"dev\.txt:2: label 'Foo' is not one of",
    ),
    ("cmedqaner", "cMedQANER/dev.txt", "好 O\n好X\n", r"dev\.txt:2"),
    ("rumed_danet", "RuMedDaNet/dev_v1.jsonl", "{}\n", r"jsonl:1: field 'answer' is missing"),
    ("rumed_danet", "RuMedDaNet/dev_v1.jsonl", "\n{,\n", r"jsonl:2: not JSON"),
    ("medqa", "medqa_test.jsonl", "[1]\n", r"jsonl:1: not a JSON obj"),
    ("medqa", "medqa_test.jsonl", '{"question": "q", "options": {"A": "x"}}', r"1 options in"),
    (
        "medqa",
        "medqa_test.jsonl",
        '{"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "C"}',
        r"jsonl:1: answer 'C' names none of the options A, B; restore the file",
    ),
    (
        "medqa",
        "medqa_test.jsonl",
        '{"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": 2}',
        r"answer 2 names none of the options A, B; where numbers count from 1, say counts_from = 1",
    ),
    (
        "medqa",
        "medqa_test.jsonl",
        '{"question": "q", "options": {"A": "x", "B": "y"}}',
        r"jsonl:1: field 'answer_idx' is missing",
    ),
    ("jmed_smdis", "smdis.csv", "tag,question\na\n", r"smdis\.csv:2: 1 columns"),
    ("jmed_smdis", "smdis.csv", 'tag,q\na,"b"c\n', r"smdis\.csv:2: not CSV"),
    ("rqe", "RQE_Test_302_pairs_AMIA2016.xml", "<a>\n<b></a>", r"xml:2: not XML"),
    ("medquad", "1_CancerGov_QA.zip", "no zip", r"QA\.zip: not a whole zip"),
    ("tico19", "en-ar.jsonl.gz", "no gzip", r"gz: not a whole gzip"),
    ("frenchmedmcqa", "dev.json", "[\n{]", r"dev\.json:2: not JSON"),
    ("frenchmedmcqa", "dev.json", "3", r"dev\.json: neither a list nor an object of records"),
    ("headqa", "dev_HEAD.json", '{"version": 1}', r"no 'exams\.\*\.data' in it"),
    ("bc5cdr", "CDR_DevelopmentSet.PubTator.txt", "1|t|a b\n1\t0\t1\tx\tD\ti\n", r"txt:2"),
    *(
        ("bc5cdr", "CDR_DevelopmentSet.PubTator.txt", f"1|t|a\n1\t{n}\t1\ta\tD\ti\n", r"txt:2")
        for n in ("²", "-1", "0" * 5000)
    ),
    (
        "medqa",
        "medqa_test.jsonl",
        json.dumps({"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "9" * 5000}),
        r"jsonl:1: answer '9{79}… names none of the options A",
    ),
    ("ncbi_disease", "devel.tsv", b"a\tO\n\xff\xfe\tO\n", r"tsv:2: not UTF-8"),
    ("meqsum", "MeQSum_ACL2019_BenAbacha_Demner-Fushman.xlsx", "x", r"not a whole Excel file"),
    ("mmlu_pro_health", "data/test-0.parquet", "x", r"not a whole Parquet file"),
    ("cmedtc", "cMedTC/dev.txt", "", r"dev\.txt: the file is empty"),
    ("medqa", "medqa_test.jsonl", "\n\n", r"jsonl: the file is empty"),
    ("medbullets", "medbullets_op4.csv", "question,opa\n", r"op4\.csv: no record is in the file"),
]


@pytest.mark.parametrize(("name", "file", "text", "message"), CORRUPT)
def test_a_corrupt_file_is_named_with_its_line(tmp_path, name, file, text, message):
    entry = medical.SETS[name]
    write(tmp_path / entry.folder[0] / file, text)
    split = "test" if "est" in file or "test" in entry.splits[:1] else "dev"
    with pytest.raises(UserError, match=message):
        list(medical.rows(name, split, tmp_path))


ODD = [
    *(
        b"",
        b"\n",
        b"[]",
        b"{}",
        b"null",
        b"[null]",
        b'[{"a": []}]',
        b'{"a": {"b": 1}}',
        b"\x00\x00",
    ),
    *(b'{"question": 5, "options": [], "answer_idx": {}}', b"a,b\n1,2\n", b"a\tb\n", b"x", b"<a/>"),
    *(
        b'[{"question": null, "options": {"A": 1}}]',
        b'"text"',
        b"1|t|x\n",
        b"\xef\xbb\xbf",
        b"[" * 999,
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_odd_files_give_one_clear_error(name, tmp_path):
    paths = upstream.write(name, tmp_path)
    (split, own), refused = next(iter(paths.items())), 0
    own = [file for path in own for file in (path.iterdir() if path.is_dir() else [path])]
    for content in ODD:
        for path in own:
            path.write_bytes(content)
        try:
            assert medical.read_split(name, split, tmp_path).rows  # it was a file of this format
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) or name in str(error)
    assert refused >= len(ODD) - 3


def test_a_truncated_member_of_a_zip_file(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.xml", "<a>" + "text " * 500 + "</a>")
    data = bytearray(path.read_bytes())
    data[50:60] = b"\0" * 10
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip"):
        list(files.members(path, ".xml"))


def test_duplicates_of_dev_and_test_leave_train(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "chineseblue_zh" / "cMedIC"
    write(folder / "train.txt", "1\t头 痛\n2\t发烧！\n1\t发烧\n2\t咳嗽。\n")
    write(folder / "dev.txt", "2\t发烧\n")
    write(folder / "test.txt", "2\t(咳嗽)\n")
    split = medical.read_split("cmedic", "train", tmp_path)
    assert [r.prompt for r in split.rows] == ["头 痛\n就医意图："] and split.left_out == 3
    assert "cmedic: 3 of 4 training rows left out" in caplog.text
    assert split.rows[0].conversation() == {
        "conversations": [
            {"role": "user", "content": "头 痛\n就医意图："},
            {"role": "assistant", "content": "弱"},
        ],
        "language": "zh",
    }


CARD = """
[mine]
title = "Mine"
folder = "mine"
get = "me"
licence = "CC0"
checked = "files"
group = "knowledge"
form = "exam"
question = "q"
options = "a, b"
answer = "right"
files = { test = ["items.csv"] }
"""


def test_cards_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SETS", dict(medical.SETS))
    path = write(tmp_path / "mine.toml", CARD)
    assert medical.add_cards(path) == ["mine"]
    write(tmp_path / "mine" / "items.csv", "q,a,b,right\nWhich?,x,y,y\n")
    assert [r.response for r in medical.rows("mine", "test", tmp_path)] == ["B"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("csv", "Q1,A,B,Right\nW?,x,y,y\n", r"csv:2: field 'a, b' is missing .*'A'\?\), there a"),
        (
            "csv",
            "question,a,b,Right\nW?,x,y,y\n",
            r"field 'right' is missing \(did you mean 'Right'\?\), there are 'question', 'a', 'b', "
            "'Right'; name in the card those of the file, or restore",
        ),
        ("csv", "stem,a,b,right\nW?,x,y,y\n", r"'q' is missing, there are 'stem', 'a', 'b', 'r"),
        ("csv", "q,a,b,right\nW?,x,y,\n", r"csv:2: field 'right' has no value; fill it in, or"),
        ("csv", "q,a,b,right\nW?,x,y,z,y\n", r"csv:2: 5 columns instead of 4 \(q, a, b, right"),
        ("csv", "q,a,B,right\nW?,x,y,a\n", r"field 'b' is missing \(did you mean 'B'\?\), there a"),
        ("csv", "q,a,a,right\nW?,x,y,a\n", r"csv:1: 'a' is the name of two columns; rename one"),
        ("tsv", "q\ta\ta\tright\nW?\tx\ty\ta\n", r"tsv:1: 'a' is the name of two columns"),
        (
            "csv",
            "q;a;b;right\nW?;x, z;y;y\n",
            r"csv:1: its columns seem to have semicolons between them, where commas are expected; "
            "save the table with commas$",
        ),
        ("csv", "q\ta\tb\tright\nW?\tx\ty\ty\n", r"have tabs .* commas, or name the file \.tsv$"),
        ("tsv", "q,a,b,right\nW?,x,y,y\n", r"tsv:1: .* have commas .* tabs, or name .* \.csv$"),
        ("tsv", "q\ta\tb\tright\nW?;x;y;y\n", r"tsv:2: its columns seem to have semicolons"),
        ("tsv", "q\ta\tb\tright\nW?, x\n", r"tsv:2: 1 columns instead of 4"),
    ],
)
def test_a_file_that_is_not_as_the_card_of_a_user_says(tmp_path, monkeypatch, name, text, message):
    """The columns that there are, and what parts them: the file may be whole."""
    monkeypatch.setattr(registry, "SETS", dict(medical.SETS))
    medical.add_cards(write(tmp_path / "mine.toml", CARD.replace(".csv", f".{name}")))
    write(tmp_path / "mine" / f"items.{name}", text)
    with pytest.raises(UserError, match=message):
        list(medical.rows("mine", "test", tmp_path))


def test_a_table_by_tabs_may_name_its_columns_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SETS", dict(medical.SETS))
    medical.add_cards(write(tmp_path / "mine.toml", CARD.replace(".csv", ".tsv")))
    write(tmp_path / "mine" / "items.tsv", "right\tq\ta\tb\ny\tWhich?\tx\ty\n")
    assert [r.response for r in medical.rows("mine", "test", tmp_path)] == ["B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('form = "exam"', 'form = "poem"'), "mine.form: 'poem' is none of exam"),
        (('question = "q"\n', ""), "mine: the field 'question' is missing"),
        (('get = "me"\n', ""), "mine: the field 'get' is missing"),
        (('question = "q"', 'question = "q"\nqestion = "q"'), "has no field 'qestion'"),
        (("files = {", "files = { testing = [], "), "mine.files: write lists of files for some of"),
        (('["items.csv"]', '"items.csv"'), "mine.files.test: must be a list of texts"),
        (("[mine]", "[mine"), "not TOML"),
        (('options = "a, b"', 'options = ["a", "b"]'), r"mine.options: .* must be a text"),
        (('question = "q"', "question = 3"), "mine.question: 3 must be a text"),
        (('get = "me"', 'get = "me"\nlanguages = "en"'), "mine.languages: 'en' must be a list"),
        (('get = "me"', 'get = "me"\nmax_tokens = "8"'), "mine.max_tokens: '8' must be a whole"),
        (
            ('question = "q"', 'question = "q"\nseveral = "yes"'),
            "mine.several: 'yes' is none of drop, only, keep",
        ),
        (
            ('question = "q"', 'question = "q"\nseveral = "keep"'),
            "mine.metric: say how answers with several right options are scored",
        ),
        (
            ('question = "q"', 'question = "q"\ncounts_from = "1"'),
            "counts_from: '1' must be 0 or 1",
        ),
        (('get = "me"', "get = 1"), "mine.get: 1 must be a text"),
        (('form = "exam"', 'form = "exam"\nlike = "yours"'), "mine.like: there is no card 'yours'"),
    ],
)
def test_bad_cards(tmp_path, change, message):
    path = write(tmp_path / "mine.toml", CARD.replace(*change))
    with pytest.raises(UserError, match=message):
        cards.load_cards(path)


def test_every_card_says_what_people_need():
    for entry in medical.SETS.values():
        assert entry.title and "http" in entry.get and entry.licence
        assert entry.checked in ("files", "code", "docs")
        assert (
            entry.form != "label"
            or entry.read["labels"] != "collected"
            or "{labels}" in entry.guide
        )


def test_spans_of_bio_tags():
    tags = ["B-A", "I-A", "I-B", "O", "I-A", "B-A", "B-A"]
    assert list(forms.spans(tags)) == [
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


@pytest.mark.data
def test_tico_is_split_by_document_in_every_language(data_dir):
    for path in sorted((data_dir / "tico19_multilingual").glob("en-*.jsonl.gz"))[:4]:
        with gzip.open(path, "rt") as file:
            documents = {json.loads(line)["id"].split(":")[0] for line in file}
        assert documents >= formats._TICO_HELD_OUT
    english = {
        split: {r.prompt[slice(*r.body)] for r in read("tico19:fr", split, data_dir)}
        for split in ("train", "dev")
    }
    assert not english["train"] & english["dev"]


def test_a_card_does_not_take_another_sets_name(tmp_path):
    name, card = next(iter(medical.SETS.items()))
    path = tmp_path / "cards.toml"
    write(path, CARD.replace("[mine]", f"[{name}]"))
    with pytest.raises(UserError, match=rf"cards\.toml: '{name}' is the name of another set"):
        medical.add_cards(path)
    assert medical.SETS[name] is card


def test_hidden_files_are_no_records(tmp_path):
    names = ("a.csv", "b/c.csv", "._a.csv", "__MACOSX/._a.csv", ".d/e.csv")
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
            (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "r" / name).write_text(name)
    for place in ("r.zip", "r"):
        assert [content for _, content in files.members(tmp_path / place, ".csv")] == [
            b"a.csv",
            b"b/c.csv",
        ]
