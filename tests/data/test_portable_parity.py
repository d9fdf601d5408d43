"""Exported templates, rendered and encoded by transformers, against the ids that were trained."""

import json

import jinja2
import pytest

from medmoe_jax.checkpoints import companions
from medmoe_jax.checkpoints.huggingface import write_companions
from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.portable import portable_template
from medmoe_jax.errors import UserError
from tests.data import chat_templates as chat
from tests.data.samples import conversation
from tests.data.test_jinja_template import byte_level
from tests.data.test_tokenizer_parity import metaspace, sentence_pieces, write

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

MARKS = (
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
PROMPTS = [
    conversation("What is fever?")["conversations"],
    conversation("What is fever?", system="You are a doctor.\n")["conversations"],
    conversation("chest pain?", "aspirin ", " and fever?\n", "no", "x")["conversations"],
    conversation("患者发热 {braces} 'quotes' \\n")["conversations"],
]


def bytes_with_marks(folder):
    byte_level(folder, specials=MARKS, config={"bos_token": "<s>", "eos_token": "</s>"})


def bytes_without(folder):
    byte_level(folder, specials=("<|endoftext|>",))


def space_before_every_run(folder):
    write(folder, metaspace(folder))


def pieces(folder, **options):
    fields = sentence_pieces(folder, user_defined_symbols=list(MARKS[3:]), **options)
    write(folder, {**fields, "tokenizer_class": "LlamaTokenizer", "legacy": False})


def pieces_legacy(folder):
    write(folder, {**sentence_pieces(folder), "tokenizer_class": "LlamaTokenizer", "legacy": True})


def pieces_alone(folder):
    """No other file: a sentencepiece model as it is trained here."""
    sentence_pieces(folder, user_defined_symbols=list(MARKS[3:]), add_dummy_prefix=False)


def pieces_alone_spaced(folder):
    sentence_pieces(folder)


def json_alone(folder):
    metaspace(folder)


VOCABULARIES = (
    bytes_with_marks, bytes_without, space_before_every_run, pieces, pieces_legacy, pieces_alone,
    pieces_alone_spaced, json_alone,
)  # fmt: skip


@pytest.fixture(scope="module", params=VOCABULARIES, ids=lambda make: make.__name__)
def words(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return tk.load(folder)


def exported(encoder, folder):
    """What transformers reads of an exported folder."""
    source, same = portable_template(encoder)
    folder.mkdir()
    write_companions(companions.prompting_files(encoder.tokenizer, source), folder)
    return transformers.AutoTokenizer.from_pretrained(folder), same


def prompts(encoder, theirs):
    """`(ids of ours, ids of theirs)` of every prompt; one refuses what the other refuses."""
    for turns in PROMPTS:
        try:
            ours = encoder.prompt(turns)
        except UserError:
            with pytest.raises(jinja2.TemplateError):
                theirs.apply_chat_template(turns, add_generation_prompt=True)
            continue
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        yield ours, theirs.apply_chat_template(turns, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates(words, name, tmp_path):
    encoder = Encoder(words, TEMPLATES[name])
    theirs, same = exported(encoder, tmp_path / "out")
    found = list(prompts(encoder, theirs))
    assert same and all(ours == ids for ours, ids in found)
    assert len(found) >= 3


@pytest.mark.parametrize("name", sorted(set(chat.ALL) - {"looks"}))
def test_a_template_in_jinja_with_its_options(name, tmp_path):
    words = byte_level(tmp_path)
    options = {"dated": {"strftime_now": "2026-01-31"}, "thinking": {"enable_thinking": False}}
    template = Jinja(chat.ALL[name], words.names, words.specials, options.get(name))
    encoder = Encoder(words, template)
    theirs, same = exported(encoder, tmp_path / "out")
    found = list(prompts(encoder, theirs))
    assert same and len(found) == len(PROMPTS) and all(ours == ids for ours, ids in found)
    if name == "thinking":  # an option is a default: who asks may set another
        turns = PROMPTS[0]
        text = theirs.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=True
        )
        assert "<think>" not in text


@pytest.mark.parametrize("make, kind", [(bytes_with_marks, "json"), (pieces_alone, "model")])
def test_a_vocabulary_of_any_name_beside_others(make, kind, tmp_path):
    """transformers would choose one of the others, which have the standard names."""
    make(tmp_path)
    (tmp_path / f"tokenizer.{kind}").rename(tmp_path / f"mine.{kind}")
    metaspace(tmp_path)
    sentence_pieces(tmp_path, add_dummy_prefix=True)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").touch()
    words = tk.load(tmp_path / f"mine.{kind}")
    encoder = Encoder(words, TEMPLATES["chatml"])
    theirs, same = exported(encoder, tmp_path / "out")
    assert same and all(ours == ids for ours, ids in prompts(encoder, theirs))
    again = Encoder(tk.load(tmp_path / "out"), encoder.template)
    assert all(again.prompt(turns) == encoder.prompt(turns) for turns in PROMPTS)


def test_the_template_stands_in_one_place(tmp_path):
    words = byte_level(tmp_path, jinja=chat.PLAIN)
    files = companions.prompting_files(words, "{{ messages }}")
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert "chat_template" not in files["tokenizer_config.json"]
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"
    assert "chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())
