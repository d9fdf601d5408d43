"""Which files a card gives a subset and split: the same as `datasets` takes, or an error."""

import posixpath

import pytest
from huggingface_hub import constants

from medmoe_jax.data.files import ENDINGS
from medmoe_jax.data.hub import fetched_licence, hub_files
from medmoe_jax.errors import UserError

COMMIT = "0123456789" * 4
FILES = (
    "train.jsonl", "extra.jsonl", "data/train-0.jsonl", "data/test-0.jsonl", "data/.train.jsonl",
    "data/notes.md", "sub/dir/x.jsonl", "train_v2/dev.jsonl", "train_v2/more.jsonl",
    "eval-en/a.jsonl",
)  # fmt: skip
ROW = '{"prompt": "q", "response": "a"}\n'


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Writes the card of `hf://datasets/org/name`, which was fetched; gives its folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "datasets--org--name"
    folder = kept / "snapshots" / COMMIT
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)

    def write(text):
        (folder / "README.md").write_text(f"---\n{text}\n---\n# A data set\n")
        return folder

    return write


def chosen(subset="", split="train"):
    """The files of a subset and split, by their names."""
    name = "hf://datasets/org/name" + (f"/{subset}" if subset else "")
    found = hub_files(name, split, ENDINGS)
    return [place.removeprefix("hf://datasets/org/name/") for _, place in found]


def of_paths(*paths):
    """A card whose split train has these paths."""
    return (
        f"configs: [{{config_name: a, data_files: [{{split: train, path: [{', '.join(paths)}]}}]}}]"
    )


EVERY = [name for name in sorted(FILES) if name.endswith(".jsonl") and "/." not in name]
TWO = "configs: [{config_name: a, data_files: train.jsonl}, {config_name: %s, %sdata_files: %s}]"
CARDS = {
    "a path": ("configs: [{config_name: a, data_files: train.jsonl}]", ["train.jsonl"]),
    "a list of paths": (
        "configs: [{config_name: a, data_files: [train.jsonl, extra.jsonl]}]",
        ["extra.jsonl", "train.jsonl"],
    ),
    "a list of a split": (
        of_paths("train.jsonl", "data/train-*"),
        ["data/train-0.jsonl", "train.jsonl"],
    ),
    "in one folder": (of_paths("'*.jsonl'"), ["extra.jsonl", "train.jsonl"]),
    "in one folder below": (of_paths("'*/*.jsonl'"), [f for f in EVERY if f.count("/") == 1]),
    "at any depth": (of_paths("'**/*.jsonl'"), EVERY),
    "a whole folder": (of_paths("data/**"), ["data/test-0.jsonl", "data/train-0.jsonl"]),
    "signs": (of_paths("'data/t[!e]*-?.jsonl'"), ["data/train-0.jsonl"]),
    "a dot": (of_paths("./train.jsonl"), ["train.jsonl"]),
    "a pattern of nothing beside": (of_paths("train.jsonl", "more/*"), ["train.jsonl"]),
    "a folder": ("configs: [{config_name: a, data_dir: data}]", ["data/train-0.jsonl"]),
    "a folder with a dot": (
        "configs: [{config_name: a, data_dir: ./data/}]",
        ["data/train-0.jsonl"],
    ),
    "a folder named as a split": (
        "configs: [{config_name: a, data_dir: eval-en}]",
        ["eval-en/a.jsonl"],
    ),
    "the one that is the default": (TWO % ("b", "default: true, ", "extra.jsonl"), ["extra.jsonl"]),
    "the one called so": (TWO % ("default", "", "extra.jsonl"), ["extra.jsonl"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_files_are_those_of_the_card(card, name):
    text, wanted = CARDS[name]
    card(text)
    assert chosen() == wanted


@pytest.mark.parity
@pytest.mark.parametrize("name", CARDS)
def test_datasets_takes_the_same_files(card, name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    text, wanted = CARDS[name]
    folder = card(text)
    theirs = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "theirs"))
    files = theirs.config.data_files["train"]
    found = {posixpath.normpath(posixpath.relpath(file, folder)) for file in files}
    assert {file for file in found if file.endswith(".jsonl")} == set(wanted)


def test_paths_begin_at_the_folder_of_the_subset(card):
    card("configs: [{config_name: a, data_dir: data, data_files: 'test-*'}]")
    assert chosen() == ["data/test-0.jsonl"]
    card("configs: [{config_name: a, data_dir: train_v2}]")
    assert chosen(split="dev") == ["train_v2/dev.jsonl"]
    with pytest.raises(UserError, match=r"no file of split 'train' among dev\.jsonl, more\.jsonl"):
        chosen()


LOST = "and there is no such file that can be read; add the path of one file to the set's name"
FORM = "a subset has a `config_name`, and as `data_files` a path, a list of paths, or a list of"
TWICE = "configs: [{config_name: a, data_files: [{split: t, path: x}, {split: t, path: y}]}]"
BAD = [
    (of_paths("absent.jsonl", "'*.jsonl'"), f"split 'train': the card names absent.jsonl, {LOST}"),
    (of_paths("'*.csv'", "data/notes.md"), f"split 'train': the card names data/notes.md, {LOST}"),
    (of_paths("'*.csv'", "'*.tsv'"), f"split 'train': the card names *.csv, *.tsv, {LOST}"),
    (of_paths("data/**.jsonl"), "the card's path 'data/**.jsonl' (Invalid pattern"),
    (of_paths(), "the card names no file"),
    (TWO % ("b", "", "extra.jsonl"), "name one of its subsets: a, b"),
    (TWO % ("default", "", "x}, {config_name: c, default: true"), "subsets: a, default, c"),
    ("configs: [{data_files: x}]", f"README.md: `configs` holds {{'data_files': 'x'}}; {FORM}"),
    ("configs: [a]", f"README.md: `configs` holds 'a'; {FORM}"),
    ("configs: 3", f"README.md: `configs` holds 3; {FORM}"),
    ("configs: [{config_name: a, data_files: {train: x}}]", FORM),
    ("configs: [{config_name: a, data_files: [{path: x}]}]", FORM),
    ("configs: [{config_name: a, data_files: [x, {split: train, path: y}]}]", FORM),
    ("configs: [{config_name: a, data_dir: [data]}]", FORM),
    (TWICE, FORM),
    ("configs: [", "README.md: its front matter cannot be read"),
    ("- configs", "README.md: its front matter cannot be read"),
]


@pytest.mark.parametrize("text, message", BAD)
def test_a_card_that_names_no_files_is_told(card, text, message):
    card(text)
    with pytest.raises(UserError) as caught:
        chosen()
    error = str(caught.value)
    assert error.startswith("hf://datasets/org/name") and message in error and "\n" not in error
    assert chosen("train.jsonl") == ["train.jsonl"]  # which the messages advise


def test_a_licence_in_a_card_that_cannot_be_read(card):
    path = card("license: [") / "README.md"
    with pytest.raises(UserError, match=f"^{path}: its front matter cannot be read"):
        fetched_licence("hf://datasets/org/name")
