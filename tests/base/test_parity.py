"""The decoder against transformers, family by family: logits, loss, packing, decoding, export.

The models are small and uneven with random weights, biases and norms, and every case names
switches whose absence must be seen, so that a missing term cannot hide.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, loss, trees
from medmoe_jax.base.execution import Execution
from medmoe_jax.checkpoints import huggingface
from medmoe_jax.checkpoints.families import FAMILIES
from medmoe_jax.inference.engine import Engine
from medmoe_jax.parallel.mesh import make_mesh
from tests.torch_side import VISION

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # max|a - b| / max|b|, float32; seen: below 4e-6
VISIBLE = 0.02  # what leaving a term out must change at least, in the same measure
LENGTH = 29
EXECUTION = Execution()
SIZES = dict(vocab_size=53, hidden_size=48, intermediate_size=37, num_hidden_layers=3)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GQA = dict(num_attention_heads=6, num_key_value_heads=2)
ALL_HEADS = dict(num_attention_heads=4, num_key_value_heads=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformers configuration, and changes of ours that must break the equality."""

    family: str
    options: dict[str, Any]
    without: tuple[dict[str, Any], ...] = ()
    repair: Callable[[Any], Any] = lambda model: model

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' configuration class takes."""
        own = {**SIZES, **SPECIAL, **self.options}
        within = FAMILIES[self.family].within
        return {within[0]: own, **VISION} if within else own


def rope(kind, **options):
    return {"rope_theta": 1000.0, "rope_type": kind, **options}


def longrope(original):
    return dict(
        **GQA,
        max_position_embeddings=64,
        original_max_position_embeddings=original,
        rope_parameters=rope(
            "longrope",
            short_factor=[1.0, 1.5, 2.0, 3.0],
            long_factor=[4.0, 6.0, 9.0, 20.0],
        ),
    )


UPPER = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
NO_ROPE_SCALING, NO_WINDOWS = {"rope_scaling": None}, {"windows": ()}
GEMMA3 = Case(
    "gemma3_text",
    dict(
        **GQA,
        head_dim=10,
        sliding_window=5,
        sliding_window_pattern=2,
        query_pre_attn_scalar=13,
        rope_parameters={
            "full_attention": rope("linear", factor=4.0),
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    ),
    (
        NO_WINDOWS,
        NO_ROPE_SCALING,
        {"ropes": ()},
        {"local_rope_theta": 0.0},
        {"qk_norm": False},
        {"norm_offset": 0.0},
        {"post_norms": False},
        {"embed_scale": 1.0},
        {"query_scale": 0.0},
    ),
)
MIXED = dict(
    sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)


def unscaled_windows(model):
    """OLMo 3 as its makers run it: rotary embeddings are scaled in layers without a window only.

    Release 5 of transformers scales them everywhere (its issue 45945).
    """
    config = model.config

    def plain(layer, args, kwargs):
        cos, _ = kwargs["position_embeddings"]
        half = torch.arange(0, cos.shape[-1], 2, dtype=torch.float32) / cos.shape[-1]
        angles = kwargs["position_ids"][..., None] / config.rope_parameters["rope_theta"] ** half
        angles = torch.cat([angles, angles], -1)
        return args, {**kwargs, "position_embeddings": (angles.cos(), angles.sin())}

    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(plain, with_kwargs=True)
    return model


CASES = {
    "qwen1.5": Case("qwen2", dict(**ALL_HEADS)),
    "qwen2-tied-window": Case(
        "qwen2", dict(**GQA, **UPPER, tie_word_embeddings=True), (NO_WINDOWS, {"windows": (5,) * 3})
    ),
    "qwen2.5-yarn": Case(
        "qwen2",
        dict(
            **GQA,
            max_position_embeddings=32,
            rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32),
        ),
        (NO_ROPE_SCALING,),
    ),
    "qwen3": Case(
        "qwen3", dict(**GQA, head_dim=10, tie_word_embeddings=True), ({"qk_norm": False},)
    ),
    "qwen3-biases": Case("qwen3", dict(**GQA, head_dim=10, attention_bias=True)),
    "qwen3-window": Case("qwen3", dict(**GQA, **UPPER, head_dim=10), (NO_WINDOWS,)),
    "llama2": Case("llama", dict(**ALL_HEADS, rms_norm_eps=0.05), ({"norm_eps": 1e-6},)),
    "llama3.2": Case(
        "llama",
        dict(
            **GQA,
            head_dim=12,
            tie_word_embeddings=True,
            rope_parameters=rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        (NO_ROPE_SCALING,),
    ),
    "llama-linear": Case(
        "llama", dict(**GQA, rope_parameters=rope("linear", factor=3.0)), (NO_ROPE_SCALING,)
    ),
    "llama-yarn": Case(
        "llama",
        dict(
            **GQA,
            rope_parameters=rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=24,
                beta_fast=8.0,
                beta_slow=0.5,
                mscale=1.0,
                mscale_all_dim=0.5,
                truncate=False,
            ),
        ),
        (NO_ROPE_SCALING,),
    ),
    "llama-biases": Case("llama", dict(**GQA, attention_bias=True, mlp_bias=True)),
    "mistral": Case("mistral", dict(**GQA, head_dim=14, sliding_window=6), (NO_WINDOWS,)),
    "mistral-gelu": Case(
        "mistral",
        dict(**GQA, sliding_window=None, hidden_act="gelu_pytorch_tanh"),
        ({"activation": "silu"},),
    ),
    "ministral": Case("ministral", dict(**GQA, head_dim=14, **MIXED), (NO_WINDOWS,)),
    "smollm3": Case(
        "smollm3",
        dict(**GQA, no_rope_layer_interval=2, rope_parameters=rope("default")),
        ({"ropes": ()}, {"ropes": ("none",) * 3}),
    ),
    "smollm3-window": Case(
        "smollm3",
        dict(
            **GQA,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
        ),
        ({"ropes": ()}, NO_WINDOWS),
    ),
    "olmo2": Case("olmo2", dict(**GQA), ({"qk_norm": False}, {"post_norms": False})),
    "olmo3": Case("olmo3", dict(**GQA, **MIXED), (NO_WINDOWS,)),
    "olmo3-yarn": Case(
        "olmo3",
        dict(**GQA, **MIXED, max_position_embeddings=64, rope_parameters=rope("yarn", factor=8.0)),
        (NO_ROPE_SCALING, {"ropes": ()}),
        unscaled_windows,
    ),
    "granite": Case(
        "granite",
        dict(
            **GQA,
            tie_word_embeddings=True,
            embedding_multiplier=3.0,
            attention_multiplier=0.6,
            residual_multiplier=0.4,
            logits_scaling=5.0,
        ),
        (
            {"embed_scale": 1.0},
            {"query_scale": 0.0},
            {"residual_scale": 1.0},
            {"output_scale": 1.0},
        ),
    ),
    "gemma2": Case(
        "gemma2",
        dict(
            **GQA,
            head_dim=10,
            sliding_window=5,
            query_pre_attn_scalar=13,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        (
            NO_WINDOWS,
            {"norm_offset": 0.0},
            {"post_norms": False},
            {"embed_scale": 1.0},
            {"query_scale": 0.0},
            {"attn_softcap": 0.0},
            {"final_softcap": 0.0},
            {"activation": "silu"},
        ),
    ),
    "gemma3": GEMMA3,
    "gemma3-tower": dataclasses.replace(GEMMA3, family="gemma3"),
    "phi3": Case("phi3", dict(**GQA, sliding_window=7), (NO_WINDOWS,)),
    "phi3-longrope-within": Case("phi3", longrope(original=40), (NO_ROPE_SCALING,)),
    "phi3-longrope-beyond": Case("phi3", longrope(original=10), (NO_ROPE_SCALING,)),
    # Of the packed texts and the scored ones some lie within, of a prompt's completions too.
    "phi3-longrope-across": Case("phi3", longrope(original=17), (NO_ROPE_SCALING,)),
    "phi4-mini": Case(
        "phi3",
        dict(
            **GQA,
            max_position_embeddings=64,
            original_max_position_embeddings=10,
            rope_parameters=rope(
                "longrope",
                short_factor=[1.0, 3.0],
                long_factor=[4.0, 9.0],
                partial_rotary_factor=0.5,
            ),
        ),
        (NO_ROPE_SCALING, {"rotary_dim": 0, "rope_scaling": None}),
    ),
    "llama3": Case(
        "llama",
        dict(**GQA, rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
        ({"rope_theta": 10000.0},),
    ),
}

FIRST_OF_FAMILY = list({case.family: name for name, case in reversed(CASES.items())}.values())


def build(case: Case, seed: int):
    """A transformers model whose every parameter is random."""
    config = transformers.AutoConfig.for_model(
        case.family, **case.arguments, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.5 * torch.randn_like(weight)
            elif name.endswith("bias"):
                weight.copy_(torch.randn_like(weight))
            else:
                weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    return case.repair(model)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """`(case, torch model, its folder, our config, our params)`."""
    case = CASES[request.param]
    model = build(case, seed=list(CASES).index(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return case, model, folder, *huggingface.load(folder, jnp.float32)


def ids(rows: int, length: int = LENGTH, seed: int = 7):
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], (rows, length))


def theirs(model, tokens_BxT):
    with torch.no_grad():
        return model(torch.tensor(tokens_BxT)).logits.numpy()


def ours(config, params, tokens_BxT, segments_BxT=None, positions_BxT=None, execution=EXECUTION):
    B, T = tokens_BxT.shape
    segments = np.ones((B, T), np.int32) if segments_BxT is None else segments_BxT
    positions = np.tile(np.arange(T), (B, 1)) if positions_BxT is None else positions_BxT
    arrays = (jnp.asarray(a, jnp.int32) for a in (tokens_BxT, segments, positions))
    x_BxTxD, z_BxTxV = _forward(config, execution, params, *arrays)
    return x_BxTxD, np.asarray(z_BxTxV)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, execution, params, *arrays):
    x_BxTxD, _, _ = decoder.hidden(config, params, *arrays, execution=execution)
    return x_BxTxD, loss.logits(config, decoder.head(params), x_BxTxD)


def error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def test_logits(pair):
    _, model, _, config, params = pair
    tokens_BxT = ids(2)
    assert error(ours(config, params, tokens_BxT)[1], theirs(model, tokens_BxT)) <= TOLERANCE


def test_every_switch_and_every_leaf_is_seen(pair):
    case, model, _, config, params = pair
    tokens_BxT = ids(1)
    want = theirs(model, tokens_BxT)
    for path, leaf in trees.flatten(params):
        changed = trees.overlay(params, trees.unflatten([(path, jnp.zeros_like(leaf))]))
        off = error(ours(config, changed, tokens_BxT)[1], want)
        assert off > VISIBLE, f"without {path} the logits change by {off} only"
    for change in case.without:
        off = error(ours(config.replace(**change), params, tokens_BxT)[1], want)
        assert off > VISIBLE, f"{change} changes the logits by {off} only"


def test_loss(pair):
    _, model, _, config, params = pair
    tokens_BxT = ids(2)
    ones = jnp.ones(tokens_BxT.shape, jnp.int32)
    targets, weights = loss.next_token_targets(jnp.asarray(tokens_BxT), ones, ones)
    x_BxTxD, _ = ours(config, params, tokens_BxT)
    total = loss.cross_entropy(config, False, decoder.head(params), x_BxTxD, targets, weights)
    tokens = torch.tensor(tokens_BxT)
    with torch.no_grad():
        want = model(tokens, labels=tokens).loss.item()
    assert float(total / weights.sum()) == pytest.approx(want, rel=TOLERANCE)


def test_packed_rows_equal_separate_sequences(pair):
    _, model, _, config, params = pair
    lengths = (18, 11, 12)
    samples = [ids(1, length, seed=length) for length in lengths]
    padding = np.zeros((1, 3), np.int64)
    tokens_BxT = np.concatenate([*samples, padding], axis=1)
    segments_T = np.repeat([1, 2, 3, 0], [*lengths, 3])
    positions_T = np.concatenate([np.arange(n) for n in (*lengths, 3)])
    _, packed = ours(config, params, tokens_BxT, segments_T[None], positions_T[None])
    start = 0
    for sample, length in zip(samples, lengths, strict=True):
        want = theirs(model, sample)[0]
        assert error(packed[0, start : start + length], want) <= TOLERANCE
        start += length


PROMPTS = (12, 19, 15)  # beyond the pretraining context of the longrope case, or within it


@pytest.fixture(scope="module")
def engine(pair):
    """Cached decoding of a batch of prompts of different lengths, padded on the left."""
    _, _, _, config, params = pair
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])
    return Engine(AdaptedConfig(config), params, {}, {}, mesh, batch=len(PROMPTS))


def test_greedy_continuation(pair, engine):
    _, model, _, _, _ = pair
    prompts = [ids(1, length, seed=length)[0].tolist() for length in PROMPTS]
    got = engine.generate(prompts, max_tokens=6, stop_ids=[SIZES["vocab_size"]])
    for prompt, continuation in zip(prompts, got, strict=True):
        assert continuation == greedy(model, prompt)


def greedy(model, prompt, count=6):
    """A continuation by transformers, without a cache."""
    text = list(prompt)
    for left in range(count, 0, -1):
        # Tokens still to come are not seen, but count: rotary embeddings ask for the whole.
        z_TxV = theirs(model, [[*text, *[0] * left]])[0]
        text.append(int(z_TxV[len(text) - 1].argmax()))
    return text[len(prompt) :]


def test_scores_of_completions(pair, engine):
    """Completions of different lengths and numbers, so rows are padded on both sides."""
    _, model, _, _, _ = pair
    prompts = [ids(1, length, seed=length)[0].tolist() for length in PROMPTS]
    lengths = [(3, 1), (5,), (2, 3, 1)]
    completions = [[ids(1, n, seed=n)[0].tolist() for n in row] for row in lengths]
    for prompt, options, scores in zip(
        prompts, completions, engine.score(prompts, completions), strict=True
    ):
        for option, score in zip(options, scores, strict=True):
            logits = torch.tensor(theirs(model, [prompt + option])[0, len(prompt) - 1 : -1])
            logp = torch.log_softmax(logits, -1)[range(len(option)), option]
            assert score == pytest.approx(logp.sum().item(), rel=1e-4)


def test_gradients(pair, tmp_path):
    """Gradients of the mean loss: transformers' own are read as the weights they belong to."""
    _, model, folder, config, params = pair
    tokens_BxT = ids(2)
    tokens = torch.tensor(tokens_BxT)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    changed = {name: p.data for name, p in model.named_parameters()}
    try:
        for p in model.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        model.save_pretrained(tmp_path)
    finally:
        for name, p in model.named_parameters():
            p.data = changed[name]
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    _, want = huggingface.load(tmp_path, jnp.float32)
    got = _gradient(config, params, jnp.asarray(tokens_BxT, jnp.int32))
    for path, leaf in trees.flatten(got):
        assert error(np.asarray(leaf), np.asarray(trees.get(want, path))) <= 1e-4, path


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, params, tokens_BxT):
    ones = jnp.ones_like(tokens_BxT)
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1])[None], tokens_BxT.shape)
    targets, weights = loss.next_token_targets(tokens_BxT, ones, ones)

    def mean(params):
        x_BxTxD, _, _ = decoder.hidden(config, params, tokens_BxT, ones, positions)
        head = decoder.head(params)
        total = loss.cross_entropy(config, True, head, x_BxTxD, targets, weights)
        return total / weights.sum()

    return jax.grad(mean)(params)


def test_transformers_loads_what_we_save(pair, tmp_path):
    case, model, source, config, params = pair
    within = FAMILIES[case.family].within
    processor = "preprocessor_config.json"  # how images are made ready, no part of the decoder
    (source / processor).write_text('{"size": 4}')
    folder = huggingface.save_hf(
        tmp_path / "out",
        config,
        params,
        case.family,
        source=source if within else None,
        extra=None if within else SPECIAL,
        max_shard_bytes=30_000,
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert (folder / processor).exists() == bool(within)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    assert type(back) is type(model)
    back, tokens_BxT = case.repair(back), ids(2)
    assert error(theirs(back.eval(), tokens_BxT), theirs(model, tokens_BxT)) <= 1e-6
    for name, weight in model.state_dict().items():
        if "vision" in name or "projector" in name:
            assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize("pair", FIRST_OF_FAMILY, indirect=True)
def test_bfloat16_stays_near(pair):
    """In bf16 the error is at most twice that of transformers' own bf16 model."""
    _, model, folder, _, _ = pair
    config, params = huggingface.load(folder, jnp.bfloat16)
    tokens_BxT = ids(2)
    want = theirs(model, tokens_BxT)
    half = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    with torch.no_grad():
        limit = error(half(torch.tensor(tokens_BxT)).logits.float().numpy(), want)
    execution = Execution(dtype=jnp.bfloat16)
    assert error(ours(config, params, tokens_BxT, execution=execution)[1], want) <= 2 * limit
