"""What a Hugging Face model family says of itself; the families are data in `families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from medmoe_jax.base.config import DecoderConfig

Json = Mapping[str, Any]

HEAD = "lm_head.weight"
EMBED = "embed_tokens.weight"
# Our field: theirs. All of theirs but those in a family's defaults must be in config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
LOCAL_THETA = "rope_local_base_freq"

# Fields that change nothing in a frozen decoder that is run without dropout, and why.
IGNORED = {
    **dict.fromkeys(
        ("attention_dropout", "resid_pdrop", "embd_pdrop"), "the frozen base is run without dropout"
    ),
    **dict.fromkeys(("initializer_range", "initializer_factor"), "of weights that are read"),
    **dict.fromkeys(
        ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"),
        "how a caller of transformers is answered",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype"), "base.dtype says in what precision the weights are kept"
    ),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer and the template name them"
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "problem_type", "num_labels"), "of a classifier's head"
    ),
    **dict.fromkeys(
        ("architectures", "model_type", "transformers_version", "auto_map", "_name_or_path"),
        "who wrote the file, and the family that it is read as",
    ),
    "_attn_implementation": "run.attention says what computes it",
    "_sliding_window_pattern": "`layer_types` beside it says it",
    "cache_implementation": "how transformers keeps keys and values",
    "chunk_size_feed_forward": "cuts a product that is the same in one piece",
    "pretraining_tp": "how the pretraining was spread over devices",
}
# Fields that any model may have, with the only value that the decoder has a term for.
FIXED: dict[str, Any] = {
    "quantization_config": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "attention_chunk_size": None,
    "num_kv_shared_layers": 0,
}


class Spelling(NamedTuple):
    """What precedes the names of the decoder's tensors, and that of its head."""

    body: str
    head: str

    @property
    def ends(self) -> tuple[str, str]:
        """The names of head and embedding."""
        return self.head + HEAD, self.body + EMBED


PLAIN = (Spelling("model.", ""), Spelling("", ""))


def no_layer(values: Json) -> list[bool]:
    """No layer has a sliding window."""
    return [False] * values["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the class name in `architectures`.
      defaults: fields that config.json may leave out, with the value they then have.
      fixed: fields with the only value that the decoder has a term for, beside `FIXED`.
      traits: `DecoderConfig` fields the family fixes.
      computed: more such fields, from config.json's values.
      exported: config.json fields that no other entry covers, from the `DecoderConfig`.
      softcaps: our field to theirs; null is off.
      switches: theirs to ours, true or false.
      activation: the field with the activation's name.
      slides: which layers have a sliding window, where there are no `layer_types`.
      ropes: each layer's `DecoderConfig.ropes`, given which layers slide; empty = all global.
      rope_kinds: rope scalings that its class takes; empty = all.
      rope_aliases: other names of rope scalings.
      layer: tensor names of a layer, each with the leaves that make up its rows.
      spellings: of the tensors' names; the first is that of transformers' modules.
      within: the field of config.json that holds the decoder's own, and the `model_type` there;
        empty = the decoder is the whole model.
      beside: regular expression on the tensors of the model's other parts, which stay as they are.
    """

    architecture: str
    defaults: Json
    fixed: Json = field(default_factory=dict)
    traits: Json = field(default_factory=dict)
    computed: Callable[[Json], dict[str, Any]] = lambda values: {}
    exported: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    softcaps: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    activation: str = "hidden_act"
    slides: Callable[[Json], list[bool]] = no_layer
    ropes: Callable[[Json, Sequence[bool]], tuple[str, ...]] = lambda values, sliding: ()
    rope_kinds: tuple[str, ...] = ()
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spellings: tuple[Spelling, ...] = PLAIN
    within: tuple[str, ...] = ()
    beside: str = ""
