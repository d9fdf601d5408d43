"""Files of every kind give the same rows, each named by its place; the table in docs/data.md."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard

from medmoe_jax.data import builder
from medmoe_jax.data.blocks import make_blocks, open_files
from medmoe_jax.data.files import ENDINGS, read_items
from medmoe_jax.data.hub import plain
from medmoe_jax.data.rows import RowReader, parse_row, read_file
from medmoe_jax.data.sources import open_path
from medmoe_jax.errors import UserError
from tests.data.samples import conversation

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [
    {"prompt": "Q é 日", "response": 'A,\n"b"\r\n\tc', "language": "fr"},
    {"prompt": "second", "response": " x ", "language": "en"},
]
WANTED = [parse_row(row) for row in ROWS]


def text_of(kind):
    """The rows as the text of a file of that kind."""
    if kind in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, ROWS[0], delimiter=",\t"[kind == ".tsv"])
        writer.writeheader()
        writer.writerows(ROWS)
        return out.getvalue()
    return json.dumps(ROWS, indent=1) if kind == ".json" else "\n".join(map(json.dumps, ROWS))


def write(path, rows=ROWS):
    """Rows as a file of the kind that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, _, packed = (
        path.name.removeprefix(path.stem.split(".")[0]).partition(".")[2].partition(".")
    )
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    else:
        content = text_of(f".{kind}").encode()
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(packed, bytes)
        path.write_bytes(pack(content))
    return path


def places(path, split="train"):
    return [place for place, _ in read_items(path, split)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_gives_the_same_rows(ending, tmp_path):
    path = write(tmp_path / f"rows{ending}")
    assert list(read_file(path)) == WANTED
    first, second = places(path)
    assert first.startswith(str(path)) and first != second
    if ending.startswith((".csv", ".tsv")):  # the first row is of three lines
        assert (first, second) == (f"{path}, line 2", f"{path}, line 5")
    elif ending in (".parquet", ".arrow"):
        assert (first, second) == (f"{path}, row 0", f"{path}, row 1")


def test_an_arrow_file_in_the_other_format(tmp_path):
    path, table = tmp_path / "rows.arrow", pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert list(read_file(path)) == WANTED


def test_zstd_in_several_frames_and_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS * 4000]
    path.write_bytes(b"".join(zstandard.compress(b"".join(lines[i::2])) for i in (0, 1)))
    assert len(list(read_items(path))) == 8000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows\.jsonl\.zst: not a complete zstd file"):
        list(read_items(path))
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not a complete zstd file"):
        list(read_items(path))


BAD_TABLES = [
    ("a,a\n1,2\n", "line 1: every column needs a name of its own, found a, a"),
    ("prompt,response\nq\n", "line 2: 1 cells under 2 names of columns"),
    ('prompt,response\n"q\nr",a\nq,a,b\n', "line 4: 3 cells under 2 names of columns"),
    ('prompt,response\n"q,a\n', "line 2: not a table of text"),
    ("prompt,response,extra\nq,a,x\n", "line 2: nothing is known of 'extra'"),
    (",prompt,response\n0,q,a\n", "line 2: nothing is known of 'Unnamed: 0'"),
    ("prompt,response,\nq,a,\n", "line 2: nothing is known of 'Unnamed: 2'"),
]


@pytest.mark.parametrize("text, message", BAD_TABLES)
def test_a_bad_table_is_named_by_line(text, message, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / "d.csv"))
    assert f"d.csv, {message}" in str(caught.value)


def test_an_index_without_a_name_can_be_left_out_and_empty_rows_are_none(tmp_path):
    """As pandas writes a table with its index, and Excel one that was once longer."""
    (tmp_path / "d.csv").write_text(",prompt,response\n0,q,a\n,,\n\n7,r,b\n,,\n")
    reader = RowReader(ignore=["Unnamed: *"])
    found = [(where, reader(item, where)) for where, item in read_items(tmp_path / "d.csv")]
    said = [[turn["content"] for turn in row["conversations"]] for _, row in found]
    assert said == [["q", "a"], ["r", "b"]] and found[1][0].endswith("line 5")
    assert reader.ignored == {"Unnamed: 0": 2}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "prompt;response\nA;B, c\n", "have semicolons .* where commas are expected"),
        ("a.csv", "prompt\tresponse\nA\tB\n", r"have tabs .* commas, or name the file \.tsv"),
        ("a.tsv", "prompt,response\nA,B\n", r"have commas .* tabs, or name the file \.csv"),
        ("a.tsv", "prompt|response\nA|B\n", "have bars .* where tabs are expected"),
    ],
)
def test_another_separator_than_the_ending_promises(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}, line 1: its columns seem to {message}"):
        list(read_items(tmp_path / name))
    separator = ",\t"[name == "a.tsv"]
    (tmp_path / name).write_text(f"prompt{separator}response\nA{separator}B\nA;B\n")
    with pytest.raises(UserError, match=rf"{name}, line 3: its columns seem to have semicolons"):
        list(read_items(tmp_path / name))
    (tmp_path / name).write_text("prompt\nA; b|c\n")  # one column
    assert [row for _, row in read_items(tmp_path / name)] == [{"prompt": "A; b|c"}]


def test_a_long_cell_and_an_empty_table(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,response\n" + "q" * 200_000 + ",a\n")
    assert len(next(read_file(tmp_path / "d.csv"))["conversations"][0]["content"]) == 200_000
    for text in ("", "prompt,response\n"):
        (tmp_path / "d.csv").write_text(text)
        assert list(read_file(tmp_path / "d.csv")) == []


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_damaged_tables(name, tmp_path):
    (tmp_path / name).write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=rf"{name}: not a"):
        list(read_file(tmp_path / name))


def test_a_key_that_stands_twice(tmp_path):
    twice = '{"prompt": "q", "response": "a", "prompt": "r"}'
    for name, text in (("d.jsonl", f"\n{twice}"), ("d.json", f"[\n{twice}]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"line 2\)?: the key 'prompt' stands twice"):
            list(read_items(tmp_path / name))


def test_nulls_of_a_table_are_absent_fields(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q", "tool_calls": None}], "id": None},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}], "id": None},
    ]
    joined = {"messages": rows[0]["messages"] + rows[1]["messages"], "id": None}
    pq.write_table(pa.Table.from_pylist([joined]), tmp_path / "d.parquet")
    (row,) = read_file(tmp_path / "d.parquet")
    assert row["conversations"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def saved(folder, rows=ROWS):
    """A folder as `datasets` saves one split, in two files."""
    for number, row in enumerate(rows):
        write(folder / f"data-{number}.arrow", [row])
    names = [{"filename": f"data-{n}.arrow"} for n in range(len(rows))]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "a JSON object"), ("{}", "no list")]
)
def test_a_damaged_folder_is_named(tmp_path, content, message):
    (saved(tmp_path) / "state.json").write_text(content)
    with pytest.raises(UserError, match=rf"state\.json.*: .*{message}"):
        list(read_file(tmp_path))


def test_folders(tmp_path):
    assert list(read_file(saved(tmp_path / "saved"))) == WANTED
    several = tmp_path / "several"
    for name, rows in (("train", ROWS), ("dev", ROWS[:1])):
        saved(several / name, rows)
    (several / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    assert list(read_file(several)) == WANTED
    assert len(places(several, "dev")) == 1
    with pytest.raises(UserError, match="has no split 'test'; it has train, dev"):
        places(several, "test")
    write(tmp_path / "files" / "b.jsonl")
    write(tmp_path / "files" / "a" / "x.parquet")
    (tmp_path / "files" / "README.md").touch()
    assert [Path(p.split(",")[0]).name for p in places(tmp_path / "files")] == [
        "x.parquet", "x.parquet", "b.jsonl", "b.jsonl",
    ]  # fmt: skip
    write(tmp_path / "files" / "test-00.jsonl")
    with pytest.raises(UserError, match=r"no file of split 'train' among a/x\.parquet, b\.jso"):
        places(tmp_path / "files")
    assert len(places(tmp_path / "files", "test")) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: holds no file that ends in"):
        places(tmp_path / "none")
    with pytest.raises(UserError, match="a file has no splits, so there is no 'dev' in it"):
        places(tmp_path / "files" / "b.jsonl", "dev")


def test_files_that_name_no_split_beside_some_that_do_are_told(tmp_path, caplog):
    for name in ("train.jsonl", "my_test.jsonl", "notes.md"):
        write(tmp_path / name) if name.endswith("l") else (tmp_path / name).touch()
    assert len(places(tmp_path)) == len(places(tmp_path, "test")) == 2 and not caplog.text
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl")
    assert len(places(tmp_path)) == 2
    (told,) = caplog.messages
    assert f"{tmp_path}: 4 files are passed over, as they name no split" in told
    assert told.endswith("others name 'train': a.jsonl, b.jsonl, c.jsonl, …")


@pytest.mark.parity
def test_folders_that_datasets_itself_has_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "dict")
    assert list(read_file(tmp_path / "one")) == list(read_file(tmp_path / "dict")) == WANTED
    assert len(places(tmp_path / "dict", "dev")) == 1


class Quiz(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    name = "quiz"

    def _info(self):
        text = tfds.features.Text()
        turn = {"role": text, "content": text}
        features = {"messages": tfds.features.Sequence(turn), "language": text}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, row in enumerate(WANTED):
            yield number, {"messages": row["conversations"], "language": row["language"]}


def test_named_data_sets_of_tfds(tmp_path, monkeypatch):
    Quiz(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    real = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: real(name, data_dir=tmp_path))
    assert list(read_file("tfds://quiz")) == WANTED
    assert places("tfds://quiz:1.0.0") == ["tfds://quiz:1.0.0, row 0", "tfds://quiz:1.0.0, row 1"]
    with pytest.raises(UserError, match="tfds://quiz: has no split 'dev'; it has train"):
        places("tfds://quiz", "dev")
    with pytest.raises(UserError, match="tfds://no_such_set: "):
        places("tfds://no_such_set")


def test_values_of_tfds_become_plain():
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"n": np.int64, "t": tfds.features.Sequence(text)})
    value = {"n": np.int64(3), "t": np.array([b"a", "é".encode()], object)}
    assert plain(value, features) == {"n": 3, "t": ["a", "é"]}


def test_a_built_data_set_is_a_path_like_any_other(tmp_path):
    rows = [conversation("q", "a"), conversation("r", "b")]
    folder = builder.build(rows, tmp_path, "demo")
    found = open_path(folder, RowReader())
    assert list(found.rows) == rows and found.built
    assert found.rows.place(1) == f"{folder}, row 1"
    for reader, split in ((RowReader(columns={"prompt": "q"}), "train"), (RowReader(), "dev")):
        with pytest.raises(UserError, match="one split and our own columns"):
            open_path(folder, reader, split)


def tables():
    """The rows of the tables in docs/data.md, by their headings."""
    found = {}
    for part in DOCS.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")][1:]
        found[title] = [re.split(r" \| ", line.strip("| "), maxsplit=1) for line in lines]
    return found


FORMS = {name: json.loads(row.strip("`")) for name, row in tables()["Forms of rows"]}


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_of_the_table_are_read(name):
    row = RowReader()(FORMS[name])
    said = [turn["content"] for turn in row["conversations"]]
    assert said[-1] == "A" and any(text.startswith("Q") for text in said)
    assert ("S" in said) == ('"S"' in json.dumps(FORMS[name]))
    assert ("tools" in row) == ("tools" in FORMS[name])


def test_the_kinds_of_the_table_are_all():
    kinds = tables()["Kinds of files"]
    named = {name for _, cell in kinds for name in re.findall(r"`rows(\.[\w.]+)`", cell)}
    assert named <= set(ENDINGS)
    assert {ending.removesuffix(".gz").removesuffix(".zst") for ending in ENDINGS} <= named
    assert {"hf://datasets/", "tfds://"} <= set(
        re.findall(r"(?:hf|tfds)://(?:datasets/)?", str(kinds))
    )


# The first line of a file of text, and those behind it.
LINES = {
    ".json": ("[0,", '"e",'),
    ".jsonl": ('["e"]', '["e"]'),
    ".ndjson": ('["e"]', '["e"]'),
    ".csv": ("a,b", "d,e"),
    ".tsv": ("a\tb", "d\te"),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", LINES)
def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path, kind, packed):
    """However far behind the first read: a file in Latin-1 may be ASCII up to there."""
    first, line = LINES[kind]
    lines = [first, *[line] * 2999, line.replace("e", "é"), line]
    path = tmp_path / f"late{kind}{packed}"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(packed, bytes)
    path.write_bytes(pack("\n".join(lines).encode("latin-1")))
    with pytest.raises(UserError) as caught:
        list(read_items(path))
    wanted = f"{path}, line 3001: not UTF-8 text (byte 0xe9); convert the file to UTF-8"
    assert str(caught.value) == wanted


def called(name, arguments, parameters):
    """A row in which a function is called."""
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"tools": [tool], "messages": [{"role": "user", "content": "q"}, answer]}


CALLED = [
    called("dose", {"drug": "aspirin"}, {"properties": {"drug": {"type": "string"}}}),
    called("place", {"at": [{"city": "Rome"}, {"zip": 1}]}, {"properties": {}, "required": []}),
    called("now", {}, {}),
]


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "saved"])
def test_a_table_adds_no_key_to_the_objects_of_a_row(name, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CALLED))
    wanted = list(read_file(tmp_path / "d.jsonl"))
    path = tmp_path / name
    if name == "saved":
        table = pa.Table.from_pylist(CALLED)
        path.mkdir()
        with (
            pa.OSFile(str(path / "data-0.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
        (path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    else:
        write(path, CALLED)
    assert list(read_file(path)) == wanted
    if name == "d.parquet":
        read = [
            RowReader()(block.decode(row), block.place(row))
            for block in make_blocks(open_files(str(path), "train"), 1)
            for row in block.read()
        ]
        assert read == wanted


def test_a_file_of_a_folder_whose_name_is_not_utf8(tmp_path):
    write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    with pytest.raises(UserError, match=r"/caf\\udce9\.jsonl' is not UTF-8 text; write it"):
        list(read_items(tmp_path))


def test_hidden_files_of_a_folder_are_no_rows(tmp_path):
    folder = tmp_path / ".home" / "rows"  # a folder that is hidden itself may be asked for
    write(folder / "a" / "rows.jsonl")
    for name in (".rows.jsonl", "._rows.jsonl", ".ipynb_checkpoints/rows.jsonl", "a/.b/c/d.jsonl"):
        write(folder / name)
    assert places(folder) == places(folder / "a" / "rows.jsonl")
    assert [file.shown for file in open_files(str(folder), "train")] == [
        str(folder / "a" / "rows.jsonl")
    ]
    assert len(list(read_file(folder / ".rows.jsonl"))) == len(ROWS)


VALUES = {
    "Decimal": decimal.Decimal("7.5"),
    "date": datetime.date(2026, 1, 31),
    "datetime": datetime.datetime(2026, 1, 31, 12),
    "timedelta": datetime.timedelta(days=1),
    "bytes": b"\xff",
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_json_lacks_are_named_by_row_and_field(kind, tmp_path):
    path = tmp_path / "d.parquet"
    in_tools = called("dose", {"mg": None}, {"properties": {"mg": {"top": VALUES[kind]}}})
    in_call = called("dose", {"mg": VALUES[kind]}, {"properties": {"mg": {"top": None}}})
    for row, field in (
        (in_tools, "tools[0].function.parameters.properties.mg.top"),
        (in_call, "conversations[1].tool_calls[0].function.arguments.mg"),
        ({"prompt": VALUES[kind], "response": "a"}, "'prompt' must be text, found a value"),
    ):
        write(path, [row])
        message = re.escape(f"{path}, row 0: {field}") + f" (is )?of the type {kind}"
        with pytest.raises(UserError, match=message):
            open_path(path, RowReader())
        with pytest.raises(UserError, match=message):
            builder.build_from_files([path], tmp_path / "built")
    write(path, [{"prompt": "q", "response": "a", "made": {"at": VALUES[kind]}}])
    (row,) = open_path(path, RowReader(ignore=["made"])).rows
    assert row == parse_row({"prompt": "q", "response": "a"})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_numbers_that_are_none_are_named_by_row_and_field(kind, number, tmp_path):
    """pandas writes NaN for what is missing, and Python takes it for JSON."""
    path = tmp_path / f"d.{kind}"
    row = called("dose", {"mg": float(number)}, {"properties": {"mg": {"type": "number"}}})
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(row), [json.dumps(cell) for cell in row.values()]])
    elif kind == "jsonl":
        path.write_text(json.dumps(row).replace("Infinity", "1e999") + "\n")
    else:
        write(path, [row])
    place = r"conversations\[1\]\.tool_calls\[0\]\.function\.arguments\.mg"
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*: {place} is -?(nan|inf), "):
        open_path(path, RowReader())


def test_half_a_character_in_the_json_text_of_a_cell(tmp_path):
    talk = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "d.csv").open("w") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(talk)]])
    with pytest.raises(UserError, match=r"d\.csv, line 2: holds .*half of a surrogate pair"):
        list(read_file(tmp_path / "d.csv"))


def readers(path):
    """What reads a Parquet file: whole, and in blocks."""
    return (
        lambda: list(read_file(path)),
        lambda: [
            row for block in make_blocks(open_files(str(path), "train"), 1) for row in block.read()
        ],
    )


def test_a_name_that_two_columns_or_keys_of_a_table_have(tmp_path):
    turns = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["x"]), pa.array(["y"])], ["role", "content", "content"]
    )
    talk = pa.ListArray.from_arrays(pa.array([0, 1]), turns)
    for table, message in (
        (pa.table([["a"], ["b"], ["c"]], ["prompt", "response", "prompt"]),
         "the name 'prompt' stands twice in its columns"),
        (pa.table({"messages": talk}),
         "the name 'content' stands twice in an object of column 'messages'"),
    ):  # fmt: skip
        pq.write_table(table, tmp_path / "d.parquet")
        for read in readers(tmp_path / "d.parquet"):
            with pytest.raises(UserError, match=rf"d\.parquet: {message}"):
                read()


def test_a_table_whose_text_is_no_text(tmp_path):
    ends = pa.array([0, 3, 6], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"abc\xff\xfe\xfd"))
    pq.write_table(pa.table({"prompt": text, "response": ["a", "b"]}), tmp_path / "d.parquet")
    messages = []
    for read in readers(tmp_path / "d.parquet"):
        with pytest.raises(UserError, match=r"not a Parquet file .*Invalid UTF8") as found:
            read()
        messages.append(str(found.value))
    assert messages[0] == messages[1]
