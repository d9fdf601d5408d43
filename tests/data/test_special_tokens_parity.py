"""Special tokens of every file beside a vocabulary, against transformers on the same folder."""

import inspect
import json

import pytest

from medmoe_jax.data import special_tokens
from medmoe_jax.data import tokenizers as tk
from tests.data.samples import CHATML
from tests.data.test_jinja_template import byte_level
from tests.data.test_tokenizer_parity import metaspace, sentence_pieces, write

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto.tokenization_auto")


def save(folder, **files):
    """JSON files beside the vocabulary, by their stems; what stands there is replaced."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def ids(first):
    return {mark: first + i for i, mark in enumerate(CHATML)}


def described(first):
    return {str(i): {"content": mark, "special": True} for mark, i in ids(first).items()}


def added_to_sentence_pieces(folder):
    write(folder, sentence_pieces(folder) | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    save(folder, tokenizer_config=config | {"eos_token": CHATML[1]}, added_tokens=ids(450))


def added_to_json(folder):
    byte_level(folder, specials=("<|endoftext|>",), config={"eos_token": CHATML[1]})
    save(folder, added_tokens=ids(403))


def added_in_the_config(folder):
    tokens = {"added_tokens_decoder": described(403)}
    byte_level(folder, specials=("<|endoftext|>",), config={"eos_token": CHATML[1], **tokens})


def a_plain_token_added(folder):
    """Beside special ones, one that is no special token: it stays when ids are decoded."""
    byte_level(folder, specials=("<|endoftext|>",), config={"eos_token": CHATML[1]})
    save(folder, added_tokens={**ids(403), "<note>": 405})


def named_in_the_map(folder):
    byte_level(folder)
    save(
        folder,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens_map={"eos_token": {"content": CHATML[1], "lstrip": False}},
    )


def the_map_over_the_config(folder):
    byte_level(folder, config={"eos_token": "<|endoftext|>"})
    save(folder, special_tokens_map={"eos_token": CHATML[1]})


def the_decoder_over_the_map(folder):
    """Where the config describes added tokens, older files are not asked."""
    byte_level(folder, config={"added_tokens_decoder": {}, "eos_token": "<|endoftext|>"})
    save(folder, special_tokens_map={"eos_token": CHATML[1]}, added_tokens={"<x>": 405})


def named_but_nowhere(folder):
    """A token that is only named comes behind all others."""
    byte_level(folder, config={"eos_token": "<|end|>", "additional_special_tokens": ["<|tool|>"]})


def free_ids(folder):
    """A vocabulary with free ids; a token that is only named comes behind those with one."""
    byte_level(folder, config={"eos_token": "<|end|>"})
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 20
    (folder / "tokenizer.json").write_text(json.dumps(content))


def by_class_qwen(folder):
    byte_level(folder)
    save(folder, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})


def by_class_llama(folder):
    metaspace(folder)
    save(folder, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"})


def null_beats_the_class(folder):
    byte_level(folder)
    save(folder, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "pad_token": None})


FOLDERS = (
    added_to_sentence_pieces,
    added_to_json,
    added_in_the_config,
    a_plain_token_added,
    named_in_the_map,
    the_map_over_the_config,
    the_decoder_over_the_map,
    named_but_nowhere,
    free_ids,
    by_class_qwen,
    by_class_llama,
    null_beats_the_class,
)


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_special_tokens_are_those_of_transformers(make, tmp_path):
    make(tmp_path)
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for mark in CHATML:
        wanted = theirs.convert_tokens_to_ids(mark)
        assert ours.special(mark) == (None if wanted == theirs.unk_token_id else wanted)
    assert ours.eos_id == theirs.eos_token_id and ours.bos_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    text = f"fever{CHATML[1]}<note> cough"
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode_markup(text, True) == ids
    assert ours.decode(ids, start=True) == theirs.decode(ids, skip_special_tokens=True)
    named = {name: text for name, text in theirs.special_tokens_map.items() if text in CHATML}
    assert named.items() <= ours.names.items()


def test_the_classes_name_what_transformers_classes_name():
    def default(parameter):
        value = getattr(parameter.default, "content", parameter.default)
        return None if value is inspect.Parameter.empty else value

    for name, tokens in special_tokens._CLASSES.items():
        parameters = inspect.signature(getattr(transformers, name).__init__).parameters
        theirs = {key: default(p) for key, p in parameters.items() if key in special_tokens.NAMED}
        keys = ("bos_token", "eos_token", "unk_token", "pad_token")
        assert {key: text for key, text in zip(keys, tokens, strict=True) if text} == {
            key: theirs[key] for key in keys if theirs.get(key)
        }
    for model, name in special_tokens._CLASS_OF.items():
        assert auto.TOKENIZER_MAPPING_NAMES[model].removesuffix("Fast") == name
