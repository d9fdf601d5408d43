"""GGUF files as llama.cpp's converter writes them, made with the `gguf` package's own writer.

The names, the order of rows and the offset of norms are written out here once more, apart from the
library's tables.
"""

import gguf
import numpy as np

from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.hf_config import config_from_hf

SIZES = dict(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
HF = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {"rope_theta": 1e6},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 5,
        "num_hidden_layers": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"sliding_window": 7},
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def hf_config(name):
    """The config.json of a case of `HF`."""
    return {**SIZES, "model_type": name.split("-")[0], **HF[name]}


def hf_tensors(hf, seed=0):
    """Random tensors of a Hugging Face checkpoint."""
    rng = np.random.default_rng(seed)
    config = config_from_hf(hf)
    out = {}
    for tensor in families.tensors(config, hf["model_type"]):
        gain = 0.3 if len(tensor.shape) == 1 else tensor.shape[-1] ** -0.5
        x = gain * rng.standard_normal(tensor.shape)
        out[tensor.name] = (x + (config.norm_offset == 0) * ("norm" in tensor.name)).astype("f4")
    return out


def gguf_name(name, arch):
    """A tensor's name in the file."""
    if name in TOP:
        return TOP[name]
    _, _, layer, *middle, kind = name.split(".")
    middle = ".".join(middle)
    if middle == "post_attention_layernorm":
        middle = "post_attention_norm" if arch.startswith("gemma") else "ffn_norm"
    return f"blk.{layer}.{NAMES.get(middle, middle)}.{kind}"


def gguf_value(name, x, arch, hf):
    """A tensor as the converter rewrites it."""
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:])
        return np.swapaxes(halves, 1, 2).reshape(x.shape)
    return x + np.float32(1) if arch.startswith("gemma") and "norm" in name else x


def add_fields(writer, arch, hf):
    """The fields of the architecture."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config_from_hf(hf).norm_eps)
    writer.add_rope_freq_base(config_from_hf(hf).rope_theta)
    if "sliding_window" in hf:
        writer.add_sliding_window(hf["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if scaling := hf.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])


def quantise(x, kind):
    """A matrix as bytes of a kind."""
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])


def write(path, name="llama", kind="F32", store=quantise, more=lambda writer: None, **changes):
    """A file of a case of `HF`; returns its Hugging Face tensors.

    Args:
      path: where.
      name: of the case.
      kind: of the matrices; vectors are F32.
      store: makes a matrix's bytes.
      more: adds fields or tensors.
      changes: of config.json.
    """
    arch, hf = name.split("-")[0], {**hf_config(name), **changes}
    tensors = hf_tensors(hf)
    writer = gguf.GGUFWriter(path, arch)
    add_fields(writer, arch, hf)
    for theirs, x in tensors.items():
        x = gguf_value(theirs, x, arch, hf)
        data, own = (store(x, kind), kind) if x.ndim > 1 else (x, "F32")
        writer.add_tensor(gguf_name(theirs, arch), data, raw_dtype=gguf.GGMLQuantizationType[own])
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
