"""config.json in and out, in old and new forms, and what is refused."""

import pytest

from medmoe_jax.base.config import DecoderConfig, RopeScaling
from medmoe_jax.base.presets import PRESETS
from medmoe_jax.checkpoints import hf_config
from medmoe_jax.checkpoints.families import FAMILIES
from medmoe_jax.checkpoints.hf_config import config_from_hf, config_to_hf
from medmoe_jax.errors import UserError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
# As the publishers' own files have them.
QWEN15_14B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "max_window_layers": 35,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA2_2B = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
LLAMA32_1B = {
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
PHI3_MINI = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}


@pytest.mark.parametrize(
    "name, hf",
    [
        ("qwen1.5-14b", QWEN15_14B),
        ("gemma2-2b", GEMMA2_2B),
        ("llama3.2-1b", LLAMA32_1B),
        ("phi3-mini", PHI3_MINI),
    ],
)
def test_published_files_give_the_presets(name, hf):
    assert config_from_hf(hf) == PRESETS[name]


FAMILY_OF = {"qwen1": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}
FAMILY_OF |= {"mistr": "mistral", "gemma2": "gemma2", "phi3-": "phi3"}
FAMILY_OF |= {"gemma3": "gemma3_text", "medgem": "gemma3_text", "phi4-": "phi3"}
FAMILY_OF |= {"smoll": "llama", "smollm3": "smollm3", "olmo2-": "olmo2", "olmo3-": "olmo3"}
FAMILY_OF |= {"granit": "granite"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    family = next(FAMILY_OF[name[:n]] for n in (7, 6, 5) if name[:n] in FAMILY_OF)
    read = config_from_hf(config_to_hf(PRESETS[name], family))
    assert not list(hf_config.differences(read, PRESETS[name]))


@pytest.mark.parametrize(
    "family, old, new",
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}),
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
        ),
        (
            "gemma2",
            {"sliding_window": 9},
            {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "original_max_position_embeddings": 4096,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
        ),
    ],
)
def test_old_and_new_forms_mean_the_same(family, old, new):
    hf = {**SIZES, "num_key_value_heads": 2, "model_type": family}
    assert config_from_hf({**hf, **old}) == config_from_hf({**hf, **new})
    assert config_from_hf({**hf, **old}) != config_from_hf(hf) or family == "gemma2"


def test_what_a_file_leaves_out_is_the_family_default():
    def read(family, **more):
        return config_from_hf({**SIZES, "model_type": family, **more})

    assert read("llama").n_kv_heads == 4 and read("llama").head_dim == 8
    assert read("gemma2", head_dim=8).tied and not read("llama").tied
    assert read("qwen3", num_key_value_heads=1).head_dim == 128
    assert read("qwen2", num_attention_heads=32, head_dim=2).n_kv_heads == 32
    assert read("phi3").norm_eps == 1e-5
    assert read("mistral", num_key_value_heads=2).windows == (4096,) * 4
    assert read("mistral", num_key_value_heads=2, sliding_window=None).windows == ()
    assert read("qwen2", num_key_value_heads=1, sliding_window=8, max_window_layers=0).windows == ()
    assert read("gemma2", attn_logit_softcapping=None).attn_softcap == 0.0


def test_rope_scalings():
    def scaling(family="llama", **rope):
        more = rope.pop("more", {})
        hf = {**SIZES, "model_type": family, "max_position_embeddings": 4096, **more}
        return config_from_hf({**hf, "rope_scaling": rope}).rope_scaling

    yarn = scaling(type="yarn", factor=4.0, original_max_position_embeddings=1024, beta_fast=16.0)
    assert yarn == RopeScaling("yarn", factor=4.0, original_max_positions=1024, beta_fast=16.0)
    assert scaling(type="yarn", original_max_position_embeddings=512).factor == 8.0
    assert scaling(rope_type="default") is None
    long = scaling(
        "phi3",
        type="longrope",
        short_factor=[1, 2, 3, 4],
        long_factor=[5, 6, 7, 8],
        more={"original_max_position_embeddings": 256},
    )
    assert (long.factor, long.original_max_positions) == (16.0, 256)
    assert long.long_factor == (5.0, 6.0, 7.0, 8.0)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("mixtral", {}, "model_type: 'mixtral' is none of gemma2, gemma3, gemma3_text, granite"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: 'gelu' is not supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"'linear': missing \['factor'\]"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, r"supported \['x'\]"),
        *(
            ("llama", {"rope_scaling": {"type": kind, "factor": 4.0, **one}}, rf"{name}: .*above 0")
            for kind, one, name in (
                ("linear", {"factor": 0}, "factor"),
                ("linear", {"factor": -2.0}, "factor"),
                ("yarn", {"attention_factor": 0}, "attention_factor"),
                ("yarn", {"beta_fast": 0}, "beta_fast"),
                ("llama3", {"low_freq_factor": 0, "high_freq_factor": 4}, "low_freq_factor"),
            )
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "low_freq_factor: must be below high_freq_factor",
        ),
        ("llama", {"rope_theta": -1e4}, "rope_theta: -10000.0 is not above 0"),
        ("llama", {"partial_rotary_factor": 0.75}, "partial_rotary_factor: 0.75 is not supported"),
        ("phi3", {"partial_rotary_factor": 0.4}, "head_dim 8, rotary_dim 3: both must be even"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling: 'yarn' is not a set of fields"),
        ("llama", {"rope_theta": "1e6"}, "rope_theta: '1e6' is not a number or null"),
        ("llama", {"rope_scaling": {"type": "default", "factor": 2.0}}, r"supported \['factor'\]"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "needs one set a layer type"),
        ("llama", {"is_causal": False}, "is_causal: False is not supported"),
        ("llama", {"sliding_window": 7}, "sliding_window: 7 is not supported"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types: not supported in this"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: 1 entries for 4 layers"),
        ("smollm3", {"no_rope_layers": 3}, "json: no_rope_layers: 3 is not a list of a whole"),
        ("smollm3", {"no_rope_layers": ["1", "0"] * 2}, "no_rope_layers: .* is not a list of"),
        *(
            (
                family,
                {"use_sliding_window": True, **change},
                f"json: {next(iter(change))}: .* is not",
            )
            for family in ("qwen2", "qwen3")
            for change in (
                {"max_window_layers": None},
                {"max_window_layers": "2"},
                {"use_sliding_window": "false"},
            )
        ),
        ("granite", {"logits_scaling": 0}, "logits_scaling: 0 is not a positive number"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"rope_scaling\.short_factor: 1 numbers, expected 4",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "one set a layer type"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: .* not supported"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: 1 entries for 4 layers"),
        ("qwen2", {"layer_types": ["chunked"] * 4}, "layer_types: .*not supported: chunked"),
        ("gemma2", {"sliding_window": None}, "sliding_window: missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size: '32' is not a positive whole number"),
        ("llama", {"num_key_value_heads": 3}, r"n_heads \(4\) must be a multiple"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(family, change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf({**SIZES, "model_type": family, **change})


def test_a_field_of_another_family_may_hold_anything():
    idle = {"max_window_layers": None, "no_rope_layers": 3, "use_sliding_window": None}
    read = config_from_hf({**SIZES, "model_type": "llama", **idle})
    assert read == config_from_hf({**SIZES, "model_type": "llama"})


def test_missing_fields_are_listed_together():
    with pytest.raises(UserError, match="lacks vocab_size, hidden_size, num_hidden_layers"):
        config_from_hf({"model_type": "llama"})


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"windows": (4, 4)}, "windows"),
        ("mistral", {"windows": (4, 0)}, "windows"),
        ("qwen2", {"qkv_bias": True, "windows": (4, 8)}, "windows"),
        ("llama", {"query_scale": 0.3}, "query_scale"),
        ("gemma2", {"post_norms": True, "norm_offset": 1.0}, "embed_scale"),
        ("llama", {"final_softcap": 30.0}, "final_softcap: 30.0 would be read as 0.0"),
    ],
)
def test_a_family_that_cannot_express_a_decoder_says_why(family, change, message):
    config = DecoderConfig(32, 16, 2, 2, 2, 8, 24, **change)
    with pytest.raises(UserError, match=f"a '{family}' model cannot express .*{message}"):
        config_to_hf(config, family)


def test_the_first_family_that_can_express_a_decoder():
    config = DecoderConfig(32, 16, 2, 2, 2, 8, 24)
    changes = {"llama": {}, "mistral": {"windows": (4, 4)}, "qwen2": {"qkv_bias": True}}
    for family, change in changes.items():
        assert hf_config.expressing(config.replace(**change)) == family
    with pytest.raises(UserError, match="no Hugging Face family can express this decoder") as error:
        hf_config.expressing(config.replace(qkv_bias=True, qk_norm=True))
    alone = [name for name, family in FAMILIES.items() if not family.within]
    assert all(f"a '{family}' model cannot" in str(error.value) for family in alone)
    with pytest.raises(UserError, match="a 'gemma3' model has other parts too"):
        config_to_hf(config, "gemma3")
