"""Tokenizers out of the fields of GGUF files and into them, beside the tools that made them."""

import json

import pytest
import sentencepiece
import tokenizers as hf
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from medmoe_jax.data import gguf_tokenizer, tokenizers
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.gguf_fields import tokenizer_fields
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.portable import portable_template
from medmoe_jax.data.templates import load_template
from medmoe_jax.errors import UserError
from tests import tiny

TEXTS = (
    "The patient has a fever of 38.5 degrees.",
    "  Two  spaces,\n\n\tlines and 12345; don't, I'LL naïve café 中文 🙂 <|im_end|>",
    "",
    " ",
    "x",
)
BYTE_PAIRS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def pieces_fields():
    """The tests' sentencepiece model, as llama.cpp's converter writes it."""
    model = model_pb2.ModelProto.FromString(tiny.tokenizer().path.read_bytes())
    own = model_pb2.ModelProto.SentencePiece
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            p.piece.replace("\u2581", " ") if p.type == own.USER_DEFINED else p.piece
            for p in model.pieces
        ],
        "tokenizer.ggml.scores": [p.score for p in model.pieces],
        "tokenizer.ggml.token_type": [p.type for p in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.fixture(scope="module")
def byte_pairs():
    """A byte-level BPE tokenizer of the Qwen2 kind, trained by its library."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    cut, *_ = gguf_tokenizer.CUTS["qwen2"]
    regex = cut["pretokenizers"][0]["pattern"]["Regex"]
    tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(regex), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, "the fever of the patient " * 20], trainer)
    tokenizer.add_special_tokens([hf.AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.add_tokens([hf.AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_pair_fields(tokenizer, cut="qwen2"):
    content = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = {t["content"]: 3 if t["special"] else 4 for t in content["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "tokenizer.ggml.eot_token_id": tokenizer.token_to_id("<|im_end|>"),
    }


def test_templates_with_names(tmp_path):
    fields = pieces_fields()
    more = {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_template.rag": "R"}
    fields |= {"tokenizer.chat_templates": ["rag", "tool_use"], **more}
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    assert tokenizer.other_templates == ("rag",)
    assert "{{ messages }}" in tokenizer.chat_template and "{{ tools }}" in tokenizer.chat_template
    with pytest.raises(UserError, match=r"m\.gguf: .*'\./\.\./x' is no name of a template"):
        gguf_tokenizer.unpack({**fields, "tokenizer.chat_template../../x": "T"}, "m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("cut", "told", "begun"),
    [
        ("qwen2", None, False),
        ("qwen2", True, True),
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos_before_texts_of_a_byte_level_file(byte_pairs, tmp_path, cut, told, begun):
    """As llama.cpp: the field, or else the way in which words are cut, tells."""
    fields = byte_pair_fields(byte_pairs, cut)
    fields["tokenizer.ggml.bos_token_id"] = bos = byte_pairs.token_to_id("<|im_start|>")
    if told is not None:
        fields["tokenizer.ggml.add_bos_token"] = told
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    assert tokenizer.encodes_bos == begun != tokenizer.leaves_bos
    turns = [{"role": "user", "content": "fever"}]
    for name in ("plain", "user_assistant", "llama3"):
        prompt = Encoder(tokenizer, load_template(name, tokenizer)).prompt(turns)
        # The format of llama3 has a bos of its own.
        assert (prompt[0] == bos) == (begun or name == "llama3")


def test_pieces(tmp_path):
    path = gguf_tokenizer.unpack(pieces_fields(), "m.gguf", tmp_path)
    tokenizer, own = tokenizers.load(path), tiny.tokenizer()
    assert path.name == "tokenizer.model" and tokenizer.vocab_size == own.vocab_size
    for text in TEXTS:
        for start in (False, True):
            ids = tokenizer.encode(text, start)
            assert ids == own.encode(text, start) and tokenizer.decode(ids, start) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.chat_template == "{{ messages }}" and not tokenizer.encodes_bos
    assert tokenizer.specials == {**own.specials, "<unk>": 0}
    reference = sentencepiece.SentencePieceProcessor(model_file=str(own.path))
    assert tokenizer.encode(TEXTS[0], start=True) == reference.encode(TEXTS[0])


def test_an_unknown_token_that_the_file_calls_a_control_token(tmp_path):
    fields = pieces_fields()
    fields["tokenizer.ggml.token_type"][0] = gguf_tokenizer.CONTROL
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    assert tokenizer.encode(TEXTS[0]) == tiny.tokenizer().encode(TEXTS[0])


def test_user_defined_pieces_of_spaces(tmp_path):
    """The file has them as they stand in a text, and they are found there."""
    fields = pieces_fields()
    at = len(fields["tokenizer.ggml.tokens"]) - 1
    fields["tokenizer.ggml.tokens"][at] = "    "
    fields["tokenizer.ggml.token_type"][at] = gguf_tokenizer.USER_DEFINED
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    assert (
        at in tokenizer.encode("a    b")
        and tokenizer.decode(tokenizer.encode("a    b")) == "a    b"
    )


def test_byte_pairs(byte_pairs, tmp_path):
    path = gguf_tokenizer.unpack(byte_pair_fields(byte_pairs), "m.gguf", tmp_path)
    tokenizer = tokenizers.load(path)
    byte_pairs.encode_special_tokens = True
    for text in TEXTS:
        ids = byte_pairs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.encode("caf\u0065\u0301") == tokenizer.encode("caf\u00e9")  # NFC
    ends = [byte_pairs.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>")]
    assert tokenizer.eos_id == ends[0] and set(ends) <= {tokenizer.eos_id, *tokenizer.stop_ids}
    assert tokenizer.special("<|im_start|>") == byte_pairs.token_to_id("<|im_start|>")
    assert not tokenizer.added["<tool>"].special and tokenizer.added["<|im_end|>"].special
    # The same fields are unpacked once.
    before = path.stat().st_mtime_ns
    again = gguf_tokenizer.unpack(byte_pair_fields(byte_pairs), "m.gguf", tmp_path)
    assert again == path and path.stat().st_mtime_ns == before


@pytest.mark.parametrize("cut", gguf_tokenizer.CUTS)
def test_every_way_to_cut_words_is_read_by_the_library(cut, byte_pairs, tmp_path):
    fields = byte_pair_fields(byte_pairs, cut)
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


PIECES_FAULTS = {
    "kind": ({"model": "bert"}, "tokenizer.ggml.model: 'bert' is none of gpt2, llama"),
    "no-model": ({"model": None}, "tokenizer.ggml.model: missing or of another type"),
    "no-tokens": ({"tokens": None}, "tokenizer.ggml.tokens: missing"),
    "types": ({"token_type": [1, 2]}, "tokenizer.ggml.token_type: 2 types of 300 tokens"),
    "scores": ({"scores": [0.5]}, "tokenizer.ggml.scores: 1 scores of 300 tokens"),
    "id": ({"bos_token_id": 300}, "tokenizer.ggml.bos_token_id: 300 of 300 tokens"),
    "twice": ({"tokens": ["a", "b"] * 150}, "tokenizer.ggml.tokens: 'a' is there twice"),
    "unknown": (
        {"token_type": [1] * 300, "unknown_token_id": None},
        "tokenizer.ggml.token_type: 0 unknown tokens, not one",
    ),
}


@pytest.mark.parametrize("name", PIECES_FAULTS)
def test_bad_fields_of_pieces(name, tmp_path):
    change, message = PIECES_FAULTS[name]
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    fields = {k: v for k, v in {**pieces_fields(), **changed}.items() if v is not None}
    with pytest.raises(UserError, match=f"m.gguf: {message}"):
        gguf_tokenizer.unpack(fields, "m.gguf", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"pre": "mystery"},
            "tokenizer.ggml.pre: 'mystery' is none of gpt-2, smollm.*base.tokenizer",
        ),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges: 'a b c' is no merge"),
        ({"merges": ["alone"]}, "tokenizer.ggml.merges: 'alone' is no merge"),
    ],
)
def test_bad_fields_of_byte_pairs(change, message, byte_pairs, tmp_path):
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        gguf_tokenizer.unpack({**byte_pair_fields(byte_pairs), **changed}, "m.gguf", tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; set XDG_CACHE_HOME"):
        gguf_tokenizer.unpack(pieces_fields(), "m.gguf", tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.chat_template": ["a"]}, r"tokenizer.chat_template: \['a'\] is no text"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens: 1 is of another type"),
        ({"tokenizer.ggml.token_type": ["1"]}, "token_type: '1' is of another type"),
        ({"tokenizer.ggml.token_type": "all"}, "there is no type 9"),
        ({"tokenizer.ggml.scores": ["a"]}, "scores: 'a' is of another type"),
        ({**BYTE_PAIRS, "tokenizer.ggml.merges": [7]}, "merges: 7 is of another type"),
    ],
)
def test_lists_of_another_type(change, message, tmp_path):
    fields = pieces_fields() | change
    if fields["tokenizer.ggml.token_type"] == "all":
        fields["tokenizer.ggml.token_type"] = [9] * len(fields["tokenizer.ggml.tokens"])
    with pytest.raises(UserError, match=message) as error:
        gguf_tokenizer.unpack(fields, "m.gguf", tmp_path)
    assert str(error.value).startswith("m.gguf: ") and not any(tmp_path.iterdir())


def test_a_type_of_zero_says_nothing(tmp_path):
    fields = pieces_fields()
    kinds = [0 if kind == 1 else kind for kind in fields["tokenizer.ggml.token_type"]]
    assert 0 in kinds
    fields["tokenizer.ggml.token_type"] = kinds
    found = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    assert found.encode(TEXTS[0]) == tiny.tokenizer().encode(TEXTS[0])


@pytest.mark.parametrize("lost", ["tokenizer.model", "tokenizer_config.json", "sizes.json", "cut"])
def test_a_cache_of_which_a_part_is_lost_is_written_anew(lost, tmp_path):
    path = gguf_tokenizer.unpack(pieces_fields(), "m.gguf", tmp_path)
    whole = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    if lost == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.with_name(lost).unlink()
    assert gguf_tokenizer.unpack(pieces_fields(), "m.gguf", tmp_path) == path
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == whole


@pytest.mark.parametrize("name", ["Phi-3 Mini 4k Instruct", "phi3-medium", "Llama 2 7b"])
def test_phi_s_tokens_take_the_spaces_after_them(name, tmp_path):
    """By the name of the file, as in llama.cpp, which has no field for it; and back."""
    fields = pieces_fields() | {"general.name": name}
    marks = ("<|user|>", "<|endoftext|>")
    for key, own in (("tokens", marks), ("token_type", (3, 4)), ("scores", (0.0, 0.0))):
        fields[f"tokenizer.ggml.{key}"] = [*fields[f"tokenizer.ggml.{key}"], *own]
    tokenizer = tokenizers.load(gguf_tokenizer.unpack(fields, "m.gguf", tmp_path))
    strips = "Llama" not in name
    bare, spaced = (tokenizer.encode_markup(f"<|user|>{s}fever") for s in ("", "\n"))
    assert (bare == spaced) == strips
    bare, spaced = (tokenizer.encode_markup(f"<|endoftext|>{s}fever") for s in ("", "\n"))
    assert bare != spaced
    encoder = Encoder(tokenizer, TEMPLATES["chatml"])
    template = portable_template(encoder).source
    again = tokenizer_fields(encoder, tokenizer.vocab_size, template)
    assert ("general.name" in again.values) == strips
    if strips:
        back = tokenizers.load(gguf_tokenizer.unpack(again.values, "m.gguf", tmp_path))
        text = "<|user|>\n fever<|endoftext|> x"
        assert back.encode_markup(text) == tokenizer.encode_markup(text)


# And out.


def encoder_of(path, template="chatml"):
    return Encoder(tokenizers.load(path), TEMPLATES[template])


def round_trip(encoder, folder, rows):
    """`(fields, the tokenizer that is read from them)`."""
    template = portable_template(encoder).source
    found = tokenizer_fields(encoder, rows, template)
    path = gguf_tokenizer.unpack(found.values, "m.gguf", folder)
    return found, tokenizers.load(path)


@pytest.fixture(scope="module")
def byte_pair_folder(byte_pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-pairs")
    byte_pairs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def test_byte_pairs_out(byte_pairs, byte_pair_folder, tmp_path):
    encoder = encoder_of(byte_pair_folder)
    own = encoder.tokenizer
    rows = own.vocab_size + 5
    found, back = round_trip(encoder, tmp_path, rows)
    assert found.same and not found.unnamed
    values, by_hand = found.values, byte_pair_fields(byte_pairs)
    padded = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    for key, value in by_hand.items():
        assert values[key][: len(value)] == value if key in padded else values[key] == value, key
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]" and {
        len(values[key]) for key in padded
    } == {rows}
    assert values["tokenizer.ggml.add_bos_token"] is False
    for text in TEXTS:
        assert back.encode(text) == own.encode(text)
    assert back.chat_template == values["tokenizer.chat_template"]
    assert (back.eos_id, back.pad_id, back.specials) == (own.eos_id, own.pad_id, own.specials)
    again = Encoder(back, load_template("tokenizer", back))
    turns = [{"role": "user", "content": TEXTS[1]}]
    assert again.prompt(turns) == encoder.prompt(turns)
    assert set(again.stops.ids) == set(encoder.stops.ids)


@pytest.mark.parametrize("template", ["user_assistant", "llama2"])
def test_pieces_out(template, tmp_path):
    encoder = encoder_of(tiny.tokenizer().path, template)
    own = encoder.tokenizer
    found, back = round_trip(encoder, tmp_path, own.vocab_size)
    by_hand = pieces_fields()
    by_hand["tokenizer.chat_template"] = portable_template(encoder).source
    assert found.same
    assert found.values == {**by_hand, "tokenizer.ggml.pre": "default"}
    for text in TEXTS:
        assert back.encode(text, True) == own.encode(text, True)


@pytest.fixture(scope="module")
def marked_spaces(tmp_path_factory):
    """A byte-fallback BPE tokenizer.json, as of Llama 2 and Gemma, trained by its library."""
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = hf.normalizers.Replace(" ", "\u2581")
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=360,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
    )
    tokenizer.train_from_iterator(["the fever of the patient", "a patient of theirs"] * 9, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 3]
    content["decoder"] = json.loads(
        hf.decoders.Sequence(
            [
                hf.decoders.Replace("\u2581", " "),
                hf.decoders.ByteFallback(),
                hf.decoders.Fuse(),
            ]
        ).__getstate__()
    )
    folder = tmp_path_factory.mktemp("marked")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_marked_spaces_out(marked_spaces, tmp_path):
    """They become pieces with scores, and sentencepiece then cuts words alike."""
    encoder = encoder_of(marked_spaces, "user_assistant")
    own = encoder.tokenizer
    found, back = round_trip(encoder, tmp_path, own.vocab_size)
    assert found.same and found.values["tokenizer.ggml.model"] == "llama"
    types = found.values["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[259:] == [1] * len(types[259:])
    for text in (*TEXTS[:2], TEXTS[4], "the patient of theirs; a fevered parent"):
        assert back.encode(text) == own.encode(text) and len(own.encode(text)), text
    assert len(own.encode("the patient")) < 4  # merges are at work


CHANGED = {
    "normaliser": ({"normalizer": {"type": "NFKC"}}, r'it has the step \{"type": "NFKC"\}'),
    "replace": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}},
        "it has the step .*Replace",
    ),
    "model": ({"model": {"type": "Unigram", "vocab": []}}, "a tokenizer of type 'Unigram' fits no"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_tokenizers_that_fit_no_file(name, marked_spaces, tmp_path):
    change, message = CHANGED[name]
    encoder = encoder_of(marked_spaces, "user_assistant")
    content = json.loads((marked_spaces / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    encoder.tokenizer.path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=f"tokenizer.json: {message}"):
        tokenizer_fields(encoder, 400, "{{ messages }}")


def test_words_cut_in_a_way_without_a_name(byte_pairs, tmp_path):
    content = json.loads(byte_pairs.to_str())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(UserError, match=r"cuts words in a way that has no name.*known: gpt-2"):
        tokenizer_fields(encoder_of(tmp_path), 400, "{{ messages }}")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainer_spec": {"model_type": 1}}, "only a sentencepiece model of type BPE"),
        ({"normalizer_spec": {"precompiled_charsmap": b"x"}}, "its normalisation 'identity' fits"),
    ],
)
def test_pieces_that_fit_no_file(change, message, tmp_path):
    encoder = encoder_of(tiny.tokenizer().path, "user_assistant")
    model = model_pb2.ModelProto.FromString(tiny.tokenizer().path.read_bytes())
    for part, values in change.items():
        for key, value in values.items():
            setattr(getattr(model, part), key, value)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    encoder.tokenizer.path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=f"tokenizer.model: {message}"):
        tokenizer_fields(encoder, 300, "{{ messages }}")


def test_ends_and_ids_that_the_fields_cannot_say(byte_pairs, byte_pair_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_pair_folder / "tokenizer.json").read_bytes())
    start = byte_pairs.token_to_id(SPECIALS[0])
    tokens = {
        str(start + n): {"content": text, "special": True, "rstrip": text == "<|im_start|>"}
        for n, text in enumerate(SPECIALS)
    }
    config = {"eos_token": SPECIALS[0], "added_tokens_decoder": tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [*range(start, start + 4)]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    encoder = encoder_of(tmp_path)
    spaced = portable_template(encoder).source.replace(
        '"<|im_start|>user\\n"', '"<|im_start|> user\\n"'
    )
    found = tokenizer_fields(encoder, 420, spaced)
    named = [found.values[f"tokenizer.ggml.{n}_token_id"] for n in ("eos", "eot", "eom")]
    assert len(set(named)) == 3 and len(found.unnamed) == 1
    assert {*named, *found.unnamed} == set(encoder.stops.ids)
    assert not found.same  # no token takes in the white space beside it in llama.cpp
