"""Tokenizers: exact round trips piece by piece, special tokens, digests, a known model."""

import json
import pickle
import shutil

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmoe_jax.data import tokenizers as tk
from medmoe_jax.errors import UserError
from tests.data.samples import CHATML, texts

# Any text but the mark that these vocabularies themselves write for a space.
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=12)
COMMON = st.sampled_from([" ", "  ", "\n", "\t", "fever", "two words", " a", "b ", "é", "患"])
TEXT = ANY | st.lists(COMMON, max_size=5).map("".join)
PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(pieces=st.lists(TEXT, max_size=5))
def test_pieces_decode_to_the_exact_text(any_tokenizer, pieces):
    ids = [i for piece in pieces for i in any_tokenizer.encode(piece)]
    assert any_tokenizer.decode(ids) == "".join(pieces)
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


@PROPERTY
@given(first=TEXT.filter(bool), rest=TEXT)
def test_a_started_text_decodes_to_the_exact_text(any_tokenizer, first, rest):
    ids = any_tokenizer.encode(first, start=True) + any_tokenizer.encode(rest)
    assert any_tokenizer.decode(ids, start=True) == first + rest


def test_no_dummy_space_between_pieces(metaspace_tokenizer):
    started = metaspace_tokenizer.encode("patient", start=True)
    continued = metaspace_tokenizer.encode("patient")
    assert metaspace_tokenizer.text_of(started[0]).startswith("▁")
    assert not metaspace_tokenizer.text_of(continued[0]).startswith("▁")
    assert metaspace_tokenizer.encode(" patient") == started


def test_ids_by_kind(chatml_tokenizer, plain_tokenizer, byte_level_tokenizer, metaspace_tokenizer):
    t = chatml_tokenizer
    assert (t.bos_id, t.eos_id, t.pad_id, t.vocab_size) == (1, 2, 3, 450)
    assert [t.special(s) for s in CHATML] == [4, 5]
    assert plain_tokenizer.special("<|im_end|>") is None
    t = byte_level_tokenizer
    assert (t.bos_id, t.eos_id, t.pad_id) == (None, 2, 0)
    assert t.special("<|im_start|>") == 1
    t = metaspace_tokenizer
    assert (t.bos_id, t.eos_id, t.pad_id) == (1, 2, 2)
    assert t.text_of(1) == "<s>" and t.text_of(None) == ""


def test_markup_has_special_tokens_and_text_has_not(chatml_tokenizer, byte_level_tokenizer):
    for t in (chatml_tokenizer, byte_level_tokenizer):
        start, end = (t.special(s) for s in CHATML)
        ids = t.encode_markup("<|im_start|>user\nfever<|im_end|>\n")
        assert ids == [start, *t.encode("user\nfever"), end, *t.encode("\n")]
    assert not {1, 2} & set(byte_level_tokenizer.encode("a<|im_start|>b<|im_end|>"))


def test_control_tokens_vanish_when_decoding(chatml_tokenizer):
    ids = [1, *chatml_tokenizer.encode("fever"), 2]
    assert chatml_tokenizer.decode(ids) == "fever"


def test_pickle_and_digest(any_tokenizer, tmp_path):
    any_tokenizer.encode("warm")
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.encode("chest pain", start=True) == any_tokenizer.encode("chest pain", start=True)
    assert copy.digest == any_tokenizer.digest and len(copy.digest) == 64
    shutil.copytree(any_tokenizer.path.parent, tmp_path / "moved")
    moved = tk.load(tmp_path / "moved")
    assert moved.digest == any_tokenizer.digest
    assert moved.chat_template == any_tokenizer.chat_template


def test_digest_sees_added_tokens_and_not_the_chat_template(byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = tk.load(tmp_path / "t")
    assert changed.chat_template == "{{ messages[0].content }}"
    assert changed.digest == byte_level_tokenizer.digest  # a template is compared by itself
    digests = {changed.digest}
    for token in ({"content": "<x>"}, {"content": "<x>", "normalized": True}):
        added = {"added_tokens_decoder": {str(changed.vocab_size): token}}
        (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(added))
        digests.add(tk.load(tmp_path / "t").digest)
    assert len(digests) == 3


def test_named_templates_of_a_config(byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert tk.load(tmp_path / "t").chat_template == "D"


def test_training_is_deterministic(tmp_path, chatml_tokenizer):
    again = tk.train(texts(), 450, tmp_path / "again.model", CHATML)
    assert again.digest == chatml_tokenizer.digest


def test_digits_are_split_and_space_is_kept(plain_tokenizer):
    assert plain_tokenizer.decode(plain_tokenizer.encode("  75  mg\t\n ")) == "  75  mg\t\n "
    pieces = [plain_tokenizer.text_of(i) for i in plain_tokenizer.encode("75")]
    assert pieces == ["7", "5"]


def test_bad_requests(tmp_path, plain_tokenizer):
    with pytest.raises(UserError, match="holds no tokenizer"):
        tk.load(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer file"):
        tk.load(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"hello world, this is not a model")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        tk.load(tmp_path / "bad.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        tk.load(tmp_path / "empty.model")
    for content in ("{", "{}", "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json.*: .*(JSON|tokenizer that can)"):
            tk.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="vocab_size 100 is too small"):
        tk.train(texts(), 100, tmp_path / "t.model")
    with pytest.raises(UserError, match="give more text or a smaller vocab_size"):
        tk.train(["a b c"], 5000, tmp_path / "t.model")
    assert not list(tmp_path.glob(".partial*")) and not (tmp_path / "t.model").exists()
    tk.check_vocabulary(plain_tokenizer, 420)
    with pytest.raises(UserError, match="has 420 ids but the model's vocabulary has 419"):
        tk.check_vocabulary(plain_tokenizer, 419)


@pytest.mark.data
def test_the_known_small_model(data_dir):
    folder = data_dir / "tiny_lm_stories260K"
    golden = json.loads((folder / "derived_golden_greedy.json").read_text())
    t = tk.load(folder / "tok512.model")
    assert t.decode(golden["token_ids"], start=True) == golden["text"]
    assert t.decode([t.bos_id, *golden["token_ids"]], start=True) == golden["text"]
    start = "Once upon a time, there was a little girl"
    upstream = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok512.model"))
    assert t.encode(start, start=True) == upstream.encode(start)
    assert golden["token_ids"][: len(upstream.encode(start))] == upstream.encode(start)


def test_a_file_that_contradicts_the_vocabulary(byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text('{"<new>": 405}')
    with pytest.raises(
        UserError, match=r"'<new>' the id 405, but in tokenizer\.json it becomes 400"
    ):
        tk.load(tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text("[]")
    with pytest.raises(UserError, match=r"added_tokens\.json: expected a JSON object"):
        tk.load(tmp_path / "t")


@pytest.mark.parametrize("text", ["щука ёж ", "щука\u00a0", "щука\n\tёж", "щ"])
def test_a_line_is_trained_on_however_long_it_is(text, tmp_path):
    line = text * ((1 << 21) // len(text.encode()))
    parts = list(tk._short(line))
    assert "".join(parts) == line and len(parts) > 1
    assert all(len(part.encode()) <= 1 << 20 for part in parts)
    assert all(part[0].isspace() for part in parts[1:]) or text == "щ"
    trained = tk.train([*texts(), line], 450, tmp_path / "t.model")
    assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode("щ")) < 2  # a piece, not bytes


def test_a_line_that_is_short_enough_stays_whole():
    for line in ("", "a b", "a " * (1 << 19), "\U0001f600" * (1 << 18)):
        assert list(tk._short(line)) == [line]
