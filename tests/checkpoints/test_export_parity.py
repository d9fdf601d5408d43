"""Exports as transformers and PEFT load them, and PEFT's own adapters as banks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig, hidden
from medmoe_jax.base import decoder, trees
from medmoe_jax.base.loss import logits
from medmoe_jax.checkpoints import families, huggingface, peft_options
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.checkpoints.peft import read_peft
from medmoe_jax.checkpoints.peft_export import TrainedLeaves, save_peft
from tests import naive
from tests.torch_side import VISION, load_adapter, load_model, peft, torch, transformers
from tests.torch_side import logits as theirs

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5  # max|a - b| / max|b|, float32
SIZES = dict(vocab_size=53, hidden_size=48, intermediate_size=37, num_hidden_layers=3)
GQA = dict(num_attention_heads=6, num_key_value_heads=2)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=10),
    "llama": dict(tie_word_embeddings=False),
    "mistral": dict(head_dim=14, sliding_window=6),
    "gemma2": dict(head_dim=10, sliding_window=5, query_pre_attn_scalar=13),
    "gemma3": dict(head_dim=10, sliding_window=5, sliding_window_pattern=2),
    "phi3": dict(sliding_window=7),
}
BIASED = dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
# MedCare's end, on uneven layers; one bank has several experts with Λ and mixing weights.
SPECS = (
    BankSpec("attention", ATTENTION, 0, 3, rank=3, alpha=6.0),
    BankSpec("knowledge", MLP, 0, 3, rank=4, alpha=8.0),
    BankSpec("alignment", MLP, 1, 3, rank=5, alpha=4.0, rank_stabilised=True),
    BankSpec("skills", ("attn.v", "mlp.up"), 0, 2, experts=3, rank=2, alpha=4.0, gate="skill",
             learned_scale=True, mix_per_layer=True),
)  # fmt: skip


def build(family, seed=0, **more):
    """A transformers model whose every weight is random."""
    options = {**SIZES, **GQA, **SPECIAL, **FAMILIES[family], **more}
    if within := families.FAMILIES[family].within:
        options = {within[0]: options, **VISION}
    config = transformers.AutoConfig.for_model(family, **options, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            small = "norm" in name or name.endswith("bias")
            gain = 0.3 if small else weight.shape[-1] ** -0.5
            weight.copy_(gain * torch.randn_like(weight) + (weight if small else 0))
    return model


def tokens(vocabulary=SIZES["vocab_size"]):
    return np.random.default_rng(7).integers(3, vocabulary, (2, 17))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, banks, ids_BxT):
    ones = jnp.ones_like(ids_BxT)
    positions = jnp.tile(jnp.arange(ids_BxT.shape[1])[None], (ids_BxT.shape[0], 1))
    x, _, _ = hidden(config, params, banks, ids_BxT, ones, positions)
    return logits(config.decoder, decoder.head(params), x)


def ours(config, params, members, ids_BxT):
    """Our logits with the banks beside the base."""
    adapted = AdaptedConfig(config, tuple(spec for spec, _ in members))
    banks = {spec.name: params for spec, params in members}
    return np.asarray(_forward(adapted, params, banks, jnp.asarray(ids_BxT, jnp.int32)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """`(family, the base's folder, our config, our params, members)`."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder)
    config, params = huggingface.load(folder, jnp.float32)
    banks = naive.random_banks(SPECS, config, size=2.0)
    return request.param, folder, config, params, [(s, banks[s.name]) for s in SPECS]


def test_transformers_and_peft_load_equal_logits(case, tmp_path):
    family, base, config, params, members = case
    want = ours(config, params, members, tokens())
    assert naive.rel(ours(config, params, [], tokens()), want) >= 0.1
    merged = lifecycle.merge_into(params, members[:1])
    whole = bool(families.FAMILIES[family].within)  # its folder names the special ids itself
    huggingface.save_hf(
        tmp_path / "hf",
        config,
        merged,
        family,
        members=members[1:],
        source=base if whole else None,
        extra=None if whole else SPECIAL,
        max_shard_bytes=40_000,
    )
    save_peft(tmp_path / "peft", config, family, members)
    folded = theirs(load_model(tmp_path / "hf"), tokens())
    adapted = theirs(load_adapter(base, tmp_path / "peft"), tokens())
    assert naive.rel(folded, want) <= TOLERANCE
    assert naive.rel(adapted, want) <= TOLERANCE
    half = theirs(load_model(tmp_path / "hf", torch.bfloat16), tokens())
    half_adapted = theirs(load_adapter(base, tmp_path / "peft", torch.bfloat16), tokens())
    assert naive.rel(half_adapted, want) <= 2 * naive.rel(half, want)


@pytest.mark.parametrize("case", ["qwen2", "phi3"], indirect=True)
def test_without_any_one_bank_or_scale_the_logits_differ(case, tmp_path):
    family, base, config, params, members = case
    want = ours(config, params, members, tokens())
    for spec, bank in members:
        others = [member for member in members if member[0] is not spec]
        doubled = (dataclasses.replace(spec, alpha=2 * spec.alpha), bank)
        for name, wrong in (("without", others), ("doubled", [*others, doubled])):
            folder = save_peft(tmp_path / f"{name}-{spec.name}", config, family, wrong)
            adapted = theirs(load_adapter(base, folder), tokens())
            assert naive.rel(adapted, want) >= 0.02, f"{name} {spec.name}"


ADAPTERS = {
    "plain": ("qwen2", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])),
    "rslora": (
        "llama",
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    ),
    "patterns": (
        "gemma2",
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=r".*\.layers\.(0|2)\..*\.(k_proj|up_proj)",
            rank_pattern={"k_proj": 2, r"layers\.2\.mlp\.up_proj": 7},
            alpha_pattern={"model.layers.0.self_attn.k_proj": 3},
        ),
    ),
    "fused": (
        "phi3",
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["qkv_proj", "gate_up_proj", "o_proj"],
            layers_to_transform=[1, 2],
        ),
    ),
    "adalora": (
        "mistral",
        peft.AdaLoraConfig(
            init_r=4,
            lora_alpha=6,
            target_modules=["q_proj", "up_proj"],
            total_step=10,
            rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]},
        ),
    ),
}


# What was trained beside banks: the adapter, and the leaves of the base that it changes.
BESIDE = {
    "saved": (
        "llama",
        {},
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "model.norm"]),
        {"embed", "head", "final_norm"},
    ),
    "parts of layers": (
        "phi3",
        {},
        dict(
            target_modules=["gate_up_proj"],
            modules_to_save=["layers.1.self_attn", "input_layernorm", "layers.2.mlp"],
            layers_to_transform=[0, 2],
            layers_pattern=["h", "layers"],
        ),
        {
            *("layers.attn_norm", "layers.attn.q.kernel", "layers.attn.k.kernel"),
            *("layers.attn.v.kernel", "layers.attn.o.kernel", "layers.mlp.gate.kernel"),
            *("layers.mlp.up.kernel", "layers.mlp.down.kernel"),
        },
    ),
    "biases": (
        "llama",
        BIASED,
        dict(target_modules=["q_proj", "up_proj"], bias="all"),
        {f"layers.{site}.bias" for site in (*ATTENTION, *MLP)},
    ),
    "ends": (
        "llama",
        {},
        dict(
            target_modules=["embed_tokens", "lm_head", "v_proj"],
            use_rslora=True,
            alpha_pattern={"lm_head": 3},
            rank_pattern={"embed_tokens": 2},
        ),
        {"embed", "head"},
    ),
    "dora": (
        "llama",
        BIASED,
        dict(target_modules=["q_proj", "down_proj"], use_dora=True),
        {"layers.attn.q.kernel", "layers.mlp.down.kernel"},
    ),
    "dora of all": (
        "phi3",
        {},
        dict(
            target_modules=["qkv_proj", "o_proj", "embed_tokens", "lm_head"],
            use_dora=True,
            rank_pattern={"o_proj": 6},
            modules_to_save=["model.norm"],
        ),
        {
            *("embed", "head", "final_norm", "layers.attn.q.kernel", "layers.attn.k.kernel"),
            *("layers.attn.v.kernel", "layers.attn.o.kernel"),
        },
    ),
    "tied": (
        "qwen2",
        {},
        dict(target_modules=["k_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        {"embed"},
    ),
    "tied ends": (
        "gemma2",
        {},
        dict(target_modules=["embed_tokens", "k_proj"], ensure_weight_tying=True),
        {"embed"},
    ),
    "tokens": (
        "llama",
        {},
        dict(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [30]},
        ),
        {"embed", "head"},
    ),
    "tied tokens": (
        "qwen2",
        {},
        dict(target_modules=["q_proj"], trainable_token_indices=[9, 4, 30, 31, 32]),
        {"embed"},
    ),
    "no bank": (
        "mistral",
        {},
        dict(target_modules=["lm_head"], modules_to_save=["layers.0.mlp.up_proj"]),
        {"head", "layers.mlp.up.kernel"},
    ),
}


def made_by_peft(model, options, folder):
    """The model under an adapter whose every weight is random, which is saved too."""
    made = peft.get_peft_model(model, options)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            noise = torch.randn_like(weight)
            if "magnitude" in key:
                weight.mul_(1 + 0.3 * noise)
            elif "lora_" in key:
                a = "lora_A" in key or "embedding_B" in key
                weight.copy_((weight.shape[-1] ** -0.5 if a else 0.3) * noise)
            elif weight.requires_grad:
                weight.add_(0.3 * noise / (1 if weight.ndim == 1 else weight.shape[-1] ** 0.5))
    made.save_pretrained(folder)
    return made.eval()


def check_there_and_back(tmp_path, family, model, options):
    """An adapter of PEFT read by us, and what we make of it read by PEFT; its changed leaves."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    made = made_by_peft(model, options, adapter)
    config, params = huggingface.load(base, jnp.float32)
    spec, bank, leaves, _ = read_peft(adapter, config, family, "adapter", lambda: params)
    members = [(spec, bank)] if spec else []
    want = theirs(load_adapter(base, adapter), tokens())
    if options.peft_type != "ADALORA":  # which loses ranks when it is saved
        assert naive.rel(theirs(made, tokens()), want) <= TOLERANCE
    whole = trees.overlay(params, leaves)
    got = ours(config, whole, members, tokens())
    assert naive.rel(ours(config, params, [], tokens()), want) >= 0.1
    assert naive.rel(got, want) <= TOLERANCE
    paths = {path for path, _ in trees.flatten(leaves)}
    trained = TrainedLeaves(paths, whole, members, lambda: params)
    again = save_peft(tmp_path / "again", config, family, members, trained=trained)
    assert naive.rel(theirs(load_adapter(base, again), tokens()), want) <= TOLERANCE
    for path in paths:
        rest = trees.without(leaves, trees.unflatten([(path, None)]))
        less = ours(config, trees.overlay(params, rest), members, tokens())
        assert naive.rel(less, want) >= 1e-3, path
    return paths, read_json(again / "adapter_config.json")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_peft_made_are_banks(name, tmp_path):
    family, options = ADAPTERS[name]
    paths, _ = check_there_and_back(tmp_path, family, build(family), options)
    assert paths == set()


@pytest.mark.parametrize("name", BESIDE)
def test_what_peft_trained_beside_banks_is_leaves(name, tmp_path):
    family, more, options, leaves = BESIDE[name]
    options = peft.LoraConfig(r=4, lora_alpha=6, **options)
    paths, again = check_there_and_back(tmp_path, family, build(family, **more), options)
    assert paths == leaves
    assert again["use_dora"] == options.use_dora


def test_every_field_of_pefts_configurations_has_a_place():
    """Read, refused, or known to change nothing; and what PEFT writes is without a note."""
    for kind in (peft.LoraConfig, peft.AdaLoraConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names <= {*peft_options.READ, *peft_options.REFUSED, *peft_options.ELSEWHERE}
