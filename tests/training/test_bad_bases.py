"""Bases that cannot be used: refused by `train` before anything is trained or written."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from medmoe_jax.data import tokenizers
from medmoe_jax.errors import UserError
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import tiny
from tests.data.samples import texts


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny base."""
    return shutil.copytree(tiny.base_path(), tmp_path / "base")


def refused(folder, match, **base):
    """The error of a run on that base, which leaves no work directory."""
    config = tiny.medcare_config()
    config.base.update({"path": str(folder), **base})
    workdir = folder.parent / "work"
    with pytest.raises(UserError, match=match) as caught:
        train(Run(open_setup(config), workdir))
    assert not workdir.exists()
    return str(caught.value)


def change(folder, name=None, **config):
    """Change fields of config.json, and give the tensors of a file another form."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if name:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.extra.weight"] = tensors.pop(name)
        save_file(tensors, folder / "model.safetensors")


def test_a_torn_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"1 problems\n  model\.safetensors: truncated or damaged")


@pytest.mark.parametrize("quantise", ["", "nf4"])
def test_all_that_is_wrong_with_the_tensors(folder, quantise):
    change(folder, "model.norm.weight", intermediate_size=32)
    text = refused(folder, "8 problems", quantise=quantise)
    assert "model.norm.weight: missing" in text
    assert "model.extra.weight: unknown to this architecture" in text
    assert text.count("shape (24, 16), config.json asks for (32, 16)") == 4
    assert text.count("shape (16, 24), config.json asks for (16, 32)") == 2


def test_an_unsupported_model(folder):
    change(folder, model_type="mamba")
    refused(folder, r"config\.json: model_type: 'mamba' is none of gemma2, gemma3")


def test_an_unsupported_rope_scaling(folder):
    change(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    refused(folder, r"config\.json: rope_scaling: 'dynamic' is none of default, linear, llama3")


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(folder, tmp_path):
    many = tokenizers.train(texts(), 330, tmp_path / "many.model")
    refused(folder, "has 330 ids but the model's vocabulary has 304", tokenizer=str(many.path))
    # A token that the config adds behind the model's own counts where it ends texts.
    (tmp_path / "few").mkdir()
    few = shutil.copy(tiny.tokenizer().path, tmp_path / "few" / "tokenizer.model")
    added = {"added_tokens_decoder": {"304": {"content": "<note>"}}, "eos_token": "<note>"}
    (tmp_path / "few" / "tokenizer_config.json").write_text(json.dumps(added))
    refused(folder, "has 305 ids but the model's vocabulary has 304", tokenizer=str(few))
