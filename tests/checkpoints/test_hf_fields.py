"""Every field of config.json that transformers' classes read is used, refused, or known to be idle.

The fields are found by looking at the classes and at what their code takes from a configuration.
A field that changes the model has a deviating value here: with it, either our logits are those of
transformers, or it is an error that names the field.
"""

import dataclasses
import importlib
import inspect
import json
import re
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.checkpoints import huggingface
from medmoe_jax.checkpoints.families import FAMILIES
from medmoe_jax.checkpoints.family import FIXED, IGNORED
from medmoe_jax.checkpoints.family import SIZES as SIZE_FIELDS
from medmoe_jax.checkpoints.hf_config import (
    config_from_hf,
    differences,
    known_fields,
    unknown_fields,
)
from medmoe_jax.errors import UserError
from tests.base.test_parity import GQA, SIZES, SPECIAL, error, ids, ours, theirs
from tests.torch_side import VISION, torch, transformers

pytestmark = pytest.mark.parity
SMALL = dict(
    **{**SIZES, "num_hidden_layers": 4}, **SPECIAL, **GQA, head_dim=8, max_position_embeddings=64
)
# Of Gemma 3, that both kinds of layers be there.
PATTERN = {"sliding_window_pattern": 3}
# How a model is called, and what its other parts read.
IDLE = {"get_text_config", "text_config", "vision_config", "image_token_id", "mm_tokens_per_image"}
IDLE |= {"boi_token_index", "eoi_token_index", "image_token_index"}
LINEAR = {"rope_type": "linear", "factor": 3.0}
SHORT = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 6.0, 9.0, 20.0]}
DEVIATIONS = [
    *({key: name} for key in ("hidden_act", "hidden_activation") for name in ("gelu_new", "relu")),
    {"rms_norm_eps": 0.3},
    {"head_dim": 10},
    {"num_key_value_heads": 3},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"clip_qkv": 0.01},
    {"sliding_window": 5},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
    {"sliding_window": 5, "sliding_window_pattern": 2},
    {"rope_theta": 50.0},
    {"rope_local_base_freq": 50.0},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
    {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
        "original_max_position_embeddings": 16,
    },
    {"rope_scaling": {"type": "longrope", **SHORT}, "original_max_position_embeddings": 8},
    {"rope_parameters": {**LINEAR, "rope_theta": 50.0}},
    {
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"query_pre_attn_scalar": 17},
    {"attn_logit_softcapping": 0.5},
    {"final_logit_softcapping": 0.5},
    {"use_bidirectional_attention": True},
    {"is_causal": False},
    {"no_rope_layers": [1, 0, 0, 1]},
    {"no_rope_layer_interval": 2},
    {"embedding_multiplier": 3.0},
    {"attention_multiplier": 0.2},
    {"residual_multiplier": 0.2},
    {"logits_scaling": 7.0},
    {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    {"initializer_range": 0.5, "use_cache": False, "pretraining_tp": 2},
]


def fields_read(family):
    """The fields of the class, and those that its modules and the shared ones ask for."""
    cls = type(transformers.AutoConfig.for_model(family))
    package = cls.__module__.rsplit(".", 1)[0]
    name = package.rsplit(".", 1)[1]
    own, rope = inspect.getmodule(cls), transformers.modeling_rope_utils
    modules = [importlib.import_module(f"{package}.modeling_{name}"), transformers.masking_utils]
    text = "\n".join(inspect.getsource(module) for module in (own, rope, *modules))
    asked = re.findall(r"(?<!\w)config\.([a-z]\w*)", text)
    asked += re.findall(r"getattr\(\s*(?:self\.)?config,\s*\"([a-z]\w*)\"", text)
    text = inspect.getsource(own) + inspect.getsource(rope)
    asked += re.findall(r"kwargs\.(?:pop|get)\(\s*\"([a-z]\w*)\"", text)
    declared = {field.name for field in dataclasses.fields(cls)}
    methods = {name for name in dir(transformers.PreTrainedConfig) if not name.startswith("__")}
    return (set(asked) | declared) - (methods - declared) - {"json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_known(family):
    read = fields_read(family)
    assert {"rope_parameters", "attention_dropout", "vocab_size"} <= read
    unknown = read - known_fields(FAMILIES[family]) - IDLE
    assert not unknown, f"'{family}': neither used, nor refused, nor in IGNORED: {sorted(unknown)}"


def test_the_table_deviates_in_every_field():
    """Fields that change a model; the sizes of its arrays are seen by their shapes."""
    used = set().union(*(known_fields(family) for family in FAMILIES.values()))
    deviating = {key for change in DEVIATIONS for key in change}
    apart = {*IGNORED, *FIXED, *SIZE_FIELDS.values()}
    assert used - apart <= deviating


def config_json(family, change):
    within = FAMILIES[family].within
    own = {**SMALL, **PATTERN, **change}
    return {"model_type": family, **({within[0]: own, **VISION} if within else own)}


def seen(folder, family, change):
    """transformers' logits with this config.json, each weight as its name and shape say; or None.

    None where it cannot be built or run.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(family, change)))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                draw = torch.Generator().manual_seed(zlib.crc32(f"{name}{weight.shape}".encode()))
                size = 0.5 if weight.ndim == 1 else 1.5 * weight.shape[-1] ** -0.5
                weight.copy_(size * torch.randn(weight.shape, generator=draw))
        return model, theirs(model, ids(1))
    except Exception:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_changes_the_model_is_used_or_refused(family, tmp_path):
    _, plain = seen(tmp_path / "plain", family, {})
    ours_plain = config_from_hf(config_json(family, {}))
    used = 0
    for change in DEVIATIONS:
        try:
            differs = list(differences(config_from_hf(config_json(family, change)), ours_plain))
        except UserError as refusal:
            named = re.findall(r"'(\w+)'", str(change))
            assert any(name in str(refusal) for name in named), f"{change}: {refusal}"
            continue
        run = seen(tmp_path / "changed", family, change)
        if run is None:
            assert not differs, f"{change}: accepted, but transformers cannot run it"
            continue
        changed = run[1].shape != plain.shape or bool(np.abs(run[1] - plain).max() > 1e-5)
        assert bool(differs) == changed, f"{change}: we see {differs}, transformers {changed}"
        used += changed
    assert used >= 4


ROPES = {
    "yarn-outer-context": (
        "llama",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "longrope-outer-context": (
        "qwen2",
        {"rope_scaling": {"type": "longrope", **SHORT}, "original_max_position_embeddings": 8},
    ),
    "scaling-before-parameters": (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 9.0}},
    ),
    "inner-theta": (
        "mistral",
        {"rope_theta": 900.0, "rope_scaling": {**LINEAR, "rope_theta": 9.0}},
    ),
    "phi-partial": ("phi3", {"rope_theta": 50.0, "partial_rotary_factor": 0.5}),
    "phi-partial-longrope": (
        "phi3",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 3.0],
                "long_factor": [4.0, 9.0],
            },
            "original_max_position_embeddings": 8,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gemma-old": (
        "gemma3_text",
        {
            "rope_theta": 90.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": LINEAR,
            "sliding_window_pattern": 3,
            "sliding_window": 6,
        },
    ),
    "gemma-llama3": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
                "sliding_attention": {**LINEAR, "rope_theta": 20.0},
            },
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "sliding_window": 6,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_fields_in_every_place_mean_what_transformers_takes(name, tmp_path):
    family, change = ROPES[name]
    model, want = seen(tmp_path / "model", family, change)
    model.save_pretrained(tmp_path / "saved")
    for form in ("model", "saved"):
        folder = tmp_path / form
        if form == "model":
            shutil.copyfile(tmp_path / "saved" / "model.safetensors", folder / "model.safetensors")
        config, params = huggingface.load(folder, jnp.float32)
        assert error(ours(config, params, ids(1))[1], want) <= 2e-5, form
    assert error(seen(tmp_path / "plain", family, {})[1], want) > 0.02


def test_what_nobody_knows_is_told():
    more = {"nonsense": 3, "other": None, "initializer_range": 0.1}
    hf = {"model_type": "llama", **SMALL, **more}
    assert unknown_fields(hf) == ["nonsense"]
