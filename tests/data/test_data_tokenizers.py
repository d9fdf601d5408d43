"""Tokenizers: exact round trips piece by piece, special tokens, digests, a known model."""

import json
import pickle
import shutil

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from medmoe_jax.data import templates as tp
from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.pieces import CALLED, SAMPLE, TOOLS
from medmoe_jax.errors import UserError
from tests import tiny
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
    config = tmp_path / "t" / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}))
    read = tk.load(tmp_path / "t")
    assert (read.chat_template, read.other_templates) == ("D", ("tools",))
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(UserError, match=r"no chat template named 'default', only tools; save"):
        tp.load_template("tokenizer", tk.load(tmp_path / "t"))
    config.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(UserError, match=r"chat_template: .* lacks 'name' or 'template'"):
        tk.load(tmp_path / "t")


def test_more_templates_in_files(byte_level_tokenizer, tmp_path):
    """Where the default has a file, those of the config are not read, as in transformers."""
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(byte_level_tokenizer.chat_template)
    (tmp_path / "t" / "additional_chat_templates").mkdir()
    (tmp_path / "t" / "additional_chat_templates" / "rag.jinja").write_text("T")
    read = tk.load(tmp_path / "t")
    (told,) = tp.doubts(tp.load_template("tokenizer", read), read)
    assert "more chat templates, which are not read: rag; to use one" in told
    assert tp.doubts(tp.load_template("chatml", read), read) == []
    (tmp_path / "t" / "chat_template.jinja").unlink()
    read = tk.load(tmp_path / "t")
    own = byte_level_tokenizer.chat_template
    assert (read.chat_template, read.other_templates) == (own, ("rag",))


# Line ends and white space at their ends, and names that both set.
PLAIN = (
    "{% set x = 'p' %}\n  {% for m in messages %}{{ m.role }}{{ x }}{{ m.content }}</s>"
    "{% endfor %}\n\n",
    "\n{%- macro f(m) %}{{ m.content }}{% endmacro -%}\n{% for m in messages %}{{ f(m) }}</s>"
    "{% endfor %}{% if add_generation_prompt %}?{% endif %}  ",
)
WITH_TOOLS = (
    "\n  {% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}\n{% macro f(m) %}"
    "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m) }}</s>{% endfor %}\r\n",
)


@pytest.mark.parametrize("where", ["files", "config"])
@pytest.mark.parametrize("with_tools", WITH_TOOLS)
@pytest.mark.parametrize("plain", PLAIN)
def test_the_template_for_talks_with_tools(plain, with_tools, where, tmp_path):
    """The text of each is what the template by itself writes."""
    shutil.copy(tiny.tokenizer().path, tmp_path / "tokenizer.model")
    if where == "config":
        named = [
            {"name": "tool_use", "template": with_tools},
            {"name": "default", "template": plain},
        ]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    else:
        (tmp_path / "chat_template.jinja").write_bytes(plain.encode())
        (tmp_path / "additional_chat_templates").mkdir()
        file = tmp_path / "additional_chat_templates" / "tool_use.jinja"
        file.write_bytes(with_tools.encode())
    read = tk.load(tmp_path)
    assert read.other_templates == ()
    template = tp.load_template("tokenizer", read)
    assert isinstance(template, Jinja)
    for turns, tools, source in (
        (SAMPLE, (), plain),
        (SAMPLE[:1], (), plain),
        (CALLED, TOOLS, with_tools),
        (SAMPLE, TOOLS, with_tools),
    ):
        alone = Jinja(source, read.names, read.specials)
        for asks in (False, True):
            assert template.render(turns, tools, asks) == alone.render(turns, tools, asks)
        assert template.rows(turns, tools) == alone.rows(turns, tools)
    (source,) = template.sources("", "")
    again = Jinja(source, read.names, read.specials)
    assert again.render(CALLED, TOOLS, True) == template.render(CALLED, TOOLS, True)


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
    assert tk.within_rows(plain_tokenizer, 420) is plain_tokenizer
    with pytest.raises(UserError, match="has 420 ids but the model's vocabulary has 419"):
        tk.within_rows(plain_tokenizer, 419)


MORE = ("<image_soft_token>", "<PRE>")  # the second is not special, and so found in any text


def in_the_json(folder):
    library = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([MORE[0]])
    library.add_tokens([MORE[1]])
    library.save(str(folder / "tokenizer.json"))


def beside(folder):
    size = tk.load(folder).vocab_size
    described = {str(size + i): {"content": text, "special": not i} for i, text in enumerate(MORE)}
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps({**fields, "added_tokens_decoder": described}))


def in_the_model(folder):
    path = next(folder.glob("*.model"))
    model = ModelProto.FromString(path.read_bytes())
    for text, kind in zip(MORE, ("CONTROL", "USER_DEFINED"), strict=True):
        model.pieces.add(piece=text, type=getattr(ModelProto.SentencePiece, kind))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("byte_level_tokenizer", in_the_json),
        ("byte_level_tokenizer", beside),
        ("plain_tokenizer", beside),
        ("dummy_tokenizer", in_the_model),
    ],
)
def test_tokens_beyond_the_embedding_are_text(kind, place, request, tmp_path):
    """Every text has the ids that it has without them."""
    without = request.getfixturevalue(kind)
    shutil.copytree(without.path.parent, tmp_path / "t")
    place(tmp_path / "t")
    whole, rows = tk.load(tmp_path / "t"), without.vocab_size
    assert whole.vocab_size == rows + 2 and set(MORE) <= set(whole.specials)
    read = pickle.loads(pickle.dumps(tk.within_rows(whole, rows)))
    assert read.vocab_size == rows and read.set_aside == set(MORE)
    assert (read.specials, read.names) == (without.specials, without.names)
    assert read.digest != whole.digest
    for text in (*MORE, f"a {MORE[0]}b {MORE[1]} c", "<PR", "fever"):
        for start in (True, False):
            ids = read.encode(text, start)
            assert ids == without.encode(text, start)
            assert read.decode(ids, start) == text
            assert read.encode_markup(text, start) == without.encode_markup(text, start)
    first = tk.within_rows(whole, rows + 1)
    assert first.set_aside == {MORE[1]} and first.special(MORE[0]) == rows
    (told,) = tp.doubts(tp.load_template("user_assistant", first), first)
    assert f"its tokens {MORE[1]} lie beyond the {rows + 1} rows" in told


def test_a_merge_into_a_token_beyond_the_embedding(byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    in_the_json(tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    model, rows = content["model"], byte_level_tokenizer.vocab_size
    model["vocab"] |= {text: rows + i for i, text in enumerate(MORE)}
    left = model["merges"][0]
    content["added_tokens"][-1]["content"] = merged = "".join(left) + "!"
    model["vocab"][merged] = model["vocab"].pop(MORE[1])
    model["merges"].append(["".join(left), "!"])
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    read = tk.within_rows(tk.load(tmp_path / "t"), rows)
    assert read.encode(merged) == byte_level_tokenizer.encode(merged)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
def test_a_token_that_is_needed_beyond_the_embedding(name, byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    in_the_json(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({name: MORE[0]}))
    with pytest.raises(UserError, match=f"its tokens {MORE[0]} among them"):
        tk.within_rows(tk.load(tmp_path / "t"), byte_level_tokenizer.vocab_size)


def test_an_end_or_a_mark_of_the_template_beyond_the_embedding(byte_level_tokenizer, tmp_path):
    shutil.copytree(byte_level_tokenizer.path.parent, tmp_path / "t")
    in_the_json(tmp_path / "t")
    whole, rows = tk.load(tmp_path / "t"), byte_level_tokenizer.vocab_size
    (tmp_path / "marked.jinja").write_text("<PRE>" + whole.chat_template)
    marked = str(tmp_path / "marked.jinja")
    read = tk.within_rows(whole, rows)
    tp.load_template("tokenizer", read)
    tp.load_template(marked, whole)
    with pytest.raises(UserError, match=rf"data\.template: it writes <PRE>, .* {rows} rows"):
        tp.load_template(marked, read)
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, rows]}))
    with pytest.raises(UserError, match=f"its tokens {MORE[0]} among them"):
        tk.within_rows(tk.load(tmp_path / "t"), rows)


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


@pytest.mark.parametrize(
    "text", ["患者 has 🩺", "naïve ½ ­", "\n\t\x00 a", "".join(map(chr, range(1, 400)))]
)
def test_bytes_of_tokens_joined_are_the_text(any_tokenizer, text):
    """Parts of characters too, whose text alone cannot be told."""
    ids = any_tokenizer.encode(text)
    assert b"".join(map(any_tokenizer.bytes_of, ids)) == any_tokenizer.decode(ids).encode()
