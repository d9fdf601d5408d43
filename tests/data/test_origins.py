"""What is known of where rows come from, without asking anybody."""

from huggingface_hub import constants

from medmoe_jax.data import medical
from medmoe_jax.data.origins import SourceOrigin, origin_of
from medmoe_jax.training.config import source

COMMIT = "0123456789" * 4


def test_sources_and_their_licences(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin_of(source("/home/me/rows.jsonl")) == SourceOrigin("rows.jsonl")
    assert origin_of(source("tfds://mine:1.0.0")) == SourceOrigin("tfds://mine:1.0.0")
    name, entry = next((n, e) for n, e in medical.SETS.items() if "train" in e.splits)
    found = origin_of(source(reader=name))
    assert entry.title in found.name and name in found.name and found.licence == entry.licence
    assert origin_of(source(reader="demo_general")).licence == "Apache-2.0"


def test_the_licence_of_a_set_on_the_hub_is_that_of_its_card_if_it_was_fetched(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    path = "hf://datasets/org/name/part"
    assert origin_of(source(path)) == SourceOrigin(path, "org/name", "")
    kept = tmp_path / "datasets--org--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    card = kept / "snapshots" / COMMIT / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("---\nlicense: [cc-by-4.0, mit]\n---\n")
    assert origin_of(source(path)) == SourceOrigin(path, "org/name", "cc-by-4.0, mit")
    card.write_text("a card without front matter\n")
    assert origin_of(source(path)).licence == ""
