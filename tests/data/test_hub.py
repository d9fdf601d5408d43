"""Data sets on the hub, against a stand-in that answers as the hub does."""

import hashlib
import http.server
import json
import threading
import urllib.parse

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from medmoe_jax.data.blocks import make_blocks, open_files
from medmoe_jax.data.files import read_items
from medmoe_jax.data.hub import choose_files
from medmoe_jax.data.rows import RowReader, read_file
from medmoe_jax.errors import UserError
from tests.data.test_data_files import ROWS, WANTED, write

COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories are folders below `root`, the only revision is main."""

    root, asked, ranges = None, [], []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        """What is known of some files (`paths-info`)."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = "/".join(self.path.split("/")[3:5])
        files = [(path, self.root / name / path) for path in asked["paths"]]
        self._send(
            200, json.dumps([_entry(*one) for one in files if one[1].is_file()]).encode(), {}
        )

    def _answer(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.asked.append(path)
        if path.startswith("/api/datasets/"):
            return self._describe(*path.removeprefix("/api/datasets/").split("/")[:4])
        name, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
        file = self.root / name / rest.partition("/")[2]
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        wanted = self.headers.get("Range")
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.ranges.append((rest.partition("/")[2], last + 1 - first))
            place = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], {"Content-Range": place})
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _describe(self, organisation, name, what="revision", revision="main"):
        """A repository, or the list of its files (`what` is `tree`)."""
        folder = self.root / organisation / name
        if not folder.is_dir() or revision not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        if what == "tree":
            answer = [_entry(path, file) for path, file in files.items()]
        else:
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": f"{organisation}/{name}", "sha": COMMIT, "siblings": siblings}
        return self._send(200, json.dumps(answer).encode(), {})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path, file):
    content = file.read_bytes()
    digest = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": digest}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder whose `org/name` are data sets on the hub."""
    monkeypatch.setattr(Hub, "root", tmp_path / "hub")
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "ranges", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()
    thread.join()


def files_of(path, split="train"):
    """The files that rows came from, by their places."""
    found = (place.partition(",")[0] for place, _ in read_items(path, split))
    return list(dict.fromkeys(file.partition("org/name/")[2] for file in found))


def test_a_data_set_is_read_by_its_name(hub):
    write(hub / "org" / "name" / "data" / "train-00000.parquet")
    write(hub / "org" / "name" / "data" / "test-00000.parquet", ROWS[:1])
    assert list(read_file("hf://datasets/org/name")) == WANTED
    places = [place for place, _ in read_items("hf://datasets/org/name", "test")]
    assert places == ["hf://datasets/org/name/data/test-00000.parquet, row 0"]
    for name in ("@main", "/data", "@main/data/train-00000.parquet"):
        assert list(read_file(f"hf://datasets/org/name{name}")) == WANTED
    with pytest.raises(UserError, match="hf://datasets/org/name: no file of split 'dev' among"):
        files_of("hf://datasets/org/name", "dev")


def test_only_the_files_of_the_split_are_brought(hub):
    for name in ("train.jsonl", "dev.jsonl", "large.bin.jsonl"):
        write(hub / "org" / "name" / name)
    assert files_of("hf://datasets/org/name") == ["train.jsonl"]
    brought = {path for path in Hub.asked if "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in brought} == {"train.jsonl"}


CARD = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: one/*.csv
  - split: dev
    path: [two/a.csv, two/b.csv]
- config_name: second
  data_files: two/*.csv
---
# A data set
"""


def test_the_card_tells_subsets_and_splits(hub):
    for name in ("one/x.csv", "two/a.csv", "two/b.csv", "one/.x.csv", "two/.y/a.csv"):
        write(hub / "org" / "name" / name)
    (hub / "org" / "name" / "README.md").write_text(CARD)
    assert files_of("hf://datasets/org/name/first") == ["one/x.csv"]
    assert files_of("hf://datasets/org/name/first", "dev") == ["two/a.csv", "two/b.csv"]
    assert files_of("hf://datasets/org/name/second") == ["two/a.csv", "two/b.csv"]
    assert files_of("hf://datasets/org/name/two/b.csv") == ["two/b.csv"]
    with pytest.raises(UserError, match="name one of its subsets: first, second"):
        files_of("hf://datasets/org/name")
    with pytest.raises(UserError, match="has no split 'dev'; it has train"):
        files_of("hf://datasets/org/name/second", "dev")


def test_what_was_brought_is_read_offline(hub, monkeypatch):
    write(hub / "org" / "name" / "train.jsonl.gz")
    assert list(read_file("hf://datasets/org/name")) == WANTED
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(Hub.asked)
    assert list(read_file("hf://datasets/org/name")) == WANTED and len(Hub.asked) == before
    missing = "hf://datasets/org/other: is not in the hub's cache, and HF_HUB_OFFLINE is set"
    with pytest.raises(UserError, match=missing):
        files_of("hf://datasets/org/other")


@pytest.mark.parametrize("name", ["org/other", "org/name@gone", "org", "org/na me"])
def test_what_is_not_there(hub, name):
    write(hub / "org" / "name" / "train.jsonl")
    with pytest.raises(UserError, match=f"hf://datasets/{name}: "):
        files_of(f"hf://datasets/{name}")


def test_files_of_a_split_by_their_names():
    def choose(names, split="train"):
        return choose_files("x", names, split, (".csv",))

    assert choose(["a.csv", "b.csv", "c.txt"]) == ["a.csv", "b.csv"]
    assert choose(["train-0.csv", "training.csv", "x/train.csv"]) == ["train-0.csv", "x/train.csv"]
    assert choose(["constraint.csv"]) == ["constraint.csv"]
    assert choose([".a.csv", "b/._train.csv", ".c/train.csv", "d.csv"]) == ["d.csv"]
    assert choose(["train.csv", "dev.csv"], "dev") == ["dev.csv"]
    for names, split in ((["dev.csv"], "train"), (["a.csv"], "dev"), (["a.txt"], "train")):
        with pytest.raises(UserError, match=r"no file (of split|that ends)"):
            choose(names, split)


@pytest.mark.parametrize("name", ["hf://datasets/org/name", "hf://datasets/org/name@main/data"])
def test_files_that_stay_on_the_hub_are_read_in_ranges(hub, name):
    rows = [{"prompt": "q", "response": f"{i} " + "word " * 2000} for i in range(40)]
    for file in ("data/train-0.parquet", "data/test-0.parquet"):
        (hub / "org" / "name" / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(
            table, hub / "org" / "name" / file, row_group_size=10, compression=None,
            use_dictionary=False,
        )  # fmt: skip
    write(hub / "org" / "name" / "data" / "train-1.jsonl")
    table, lines = open_files(name, "train")
    blocks = make_blocks([table, lines], 1)
    assert [type(block).__name__ for block in blocks] == ["Group"] * 4 + ["Lines"]
    whole = (hub / "org" / "name" / "data" / "train-0.parquet").read_bytes()
    assert table.digest() == hashlib.sha1(whole).hexdigest() and table.size == len(whole)
    assert [row["response"][:2] for _, row in blocks[2].read()] == [f"{i}" for i in range(20, 30)]
    assert blocks[2].place(blocks[2].read()[3]).endswith("data/train-0.parquet, row 23")
    assert [RowReader()(blocks[4].decode(row)) for row in blocks[4].read()] == WANTED
    assert blocks[4].place(blocks[4].read()[1]).endswith("data/train-1.jsonl, line 2")
    assert {file for file, _ in Hub.ranges} == {"data/train-0.parquet", "data/train-1.jsonl"}
    assert not any("/resolve/" in p and "test-0" in p for p in Hub.asked)
    with pytest.raises(UserError, match="no file of split 'dev' among"):
        open_files(name, "dev")
    with pytest.raises(UserError, match="hf://datasets/org/none"):
        open_files("hf://datasets/org/none", "train")


def test_a_hub_that_cannot_be_reached_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"^hf://datasets/org/none: .*refused") as caught:
        list(read_items("hf://datasets/org/none", "train"))
    assert "\n" not in str(caught.value)
