"""What PEFT adapters hold beside linear layers, in every spelling, against the formulas in float64.

What PEFT itself makes of such adapters is in test_export_parity.py.
"""

import functools
import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import trees
from medmoe_jax.checkpoints import peft, released
from medmoe_jax.checkpoints.peft_export import TrainedLeaves, save_peft, serving
from medmoe_jax.checkpoints.peft_names import linear_modules
from medmoe_jax.errors import UserError
from tests import naive, torch_zip
from tests.stored import save_by_hand

CONFIG = naive.TINY.replace(qkv_bias=True)
R, ALPHA = 2, 3.0
LAYERS = (1, 2)
OPTIONS = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": ALPHA,
    "bias": "none",
    # The ends lie in no layer: their names are whole.
    "target_modules": ["q_proj", "model.embed_tokens", "lm_head"],
    "layers_to_transform": list(LAYERS),
    "layers_pattern": "layers",
    "modules_to_save": ["norm", "layers.0.mlp"],
    "use_dora": True,
}
D, V, F = CONFIG.d_model, CONFIG.vocab_size, CONFIG.d_ff
Q = CONFIG.n_heads * CONFIG.head_dim
P = "base_model.model."


@functools.cache
def base():
    return naive.random_params(CONFIG)


def adapter_tensors(dtype=np.float32):
    """A DoRA adapter over both ends and a projection of two layers, with what was saved whole."""
    rng = np.random.default_rng(3)
    shapes = {
        "model.embed_tokens.lora_embedding_A": (R, V),
        "model.embed_tokens.lora_embedding_B": (D, R),
        "model.embed_tokens.lora_magnitude_vector": (D,),
        "lm_head.lora_A.weight": (R, D),
        "lm_head.lora_B.weight": (V, R),
        "lm_head.lora_magnitude_vector": (V,),
        "model.layers.1.self_attn.q_proj.base_layer.bias": (Q,),
    }
    for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
        shapes[f"model.layers.0.mlp.{name}_proj.weight"] = shape
    for i in range(CONFIG.n_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    for i in LAYERS:
        at = f"model.layers.{i}.self_attn.q_proj"
        shapes |= {f"{at}.lora_A.weight": (R, D), f"{at}.lora_B.weight": (Q, R)}
        shapes[f"{at}.lora_magnitude_vector"] = (Q,)
    draw = {k: rng.normal(size=s) + 2.0 * ("magnitude" in k) for k, s in shapes.items()}
    return {P + name: x.astype(dtype) for name, x in draw.items()}


def dora(w, delta, magnitude, axis):
    """`m V / |V|` in float64."""
    v = w + delta
    return v * np.expand_dims(magnitude / np.sqrt((v**2).sum(axis)), axis)


def wanted(tensors):
    """`{leaf: values}` and `{layer: W' [D, O] of the projection}`, from the formulas."""
    t = {name.removeprefix(P): np.asarray(x, np.float64) for name, x in tensors.items()}
    b, s = naive.f64(base()), ALPHA / R
    delta = (t["model.embed_tokens.lora_embedding_B"] @ t["model.embed_tokens.lora_embedding_A"]).T
    leaves = {
        "embed": dora(b["embed"], s * delta, t["model.embed_tokens.lora_magnitude_vector"], 0),
        "final_norm": t["model.norm.weight"],
        "layers.attn.q.bias": b["layers"]["attn"]["q"]["bias"].copy(),
    }
    leaves["layers.attn.q.bias"][1] = t["model.layers.1.self_attn.q_proj.base_layer.bias"]
    if "lm_head.lora_A.weight" in t:
        delta = s * t["lm_head.lora_B.weight"] @ t["lm_head.lora_A.weight"]
        leaves["head"] = dora(b["head"], delta, t["lm_head.lora_magnitude_vector"], 1)
    for ours, theirs in {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}.items():
        leaves[f"layers.{ours}_norm"] = np.stack(
            [t[f"model.layers.{i}.{theirs}.weight"] for i in range(CONFIG.n_layers)]
        )
    for name in ("gate", "up", "down"):
        kernel = b["layers"]["mlp"][name]["kernel"].copy()
        kernel[0] = t[f"model.layers.0.mlp.{name}_proj.weight"].T
        leaves[f"layers.mlp.{name}.kernel"] = kernel
    kernels = {0: b["layers"]["attn"]["q"]["kernel"][0]}
    for i in LAYERS:
        at = f"model.layers.{i}.self_attn.q_proj."
        w = b["layers"]["attn"]["q"]["kernel"][i].T
        delta = s * t[f"{at}lora_B.weight"] @ t[f"{at}lora_A.weight"]
        kernels[i] = dora(w, delta, t[f"{at}lora_magnitude_vector"], 1).T
    return leaves, kernels


def named(name):
    """With the adapter's name in it, as a whole model's state has it."""
    name = re.sub(r"(lora_\w+)(\.weight)?$", r"\1.default\2", name)
    return re.sub(r"(norm|mlp)\.(?=weight|\w+_proj\.w)", r"\1.modules_to_save.default.", name)


SPELLINGS = {
    "plain": lambda name: name,
    "named": named,
    "no prefix": lambda name: name.removeprefix(P),
    "bare decoder": lambda name: name.replace(f"{P}model.", P),
    "vision model": lambda name: name.replace(f"{P}model.", f"{P}model.language_model."),
    "old magnitude": lambda name: re.sub(r"(magnitude_vector)$", r"\1.weight", name),
}
KINDS = ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def write(folder, tensors, options=OPTIONS, pickled=False):
    (folder / "adapter_config.json").write_text(json.dumps(options))
    name = "adapter_model.bin" if pickled else "adapter_model.safetensors"
    (torch_zip.save if pickled else lambda path, x: save_by_hand(x, path))(folder / name, tensors)


def read(folder, config=CONFIG):
    return peft.read_peft(folder, config, "llama", "lora", base)


def check(adapter, tensors, tolerance=2e-6):
    leaves, kernels = wanted(tensors)
    found = dict(trees.flatten(adapter.leaves))
    scaled = found.pop("layers.attn.q.kernel")
    assert set(found) == set(leaves)
    for path, want in leaves.items():
        assert found[path].dtype == np.float32
        assert naive.rel(found[path], want) <= tolerance, path
    spec, bank = adapter.spec, naive.f64(adapter.params)["attn.q"]
    assert spec.sites == ("attn.q",) and (spec.start, spec.stop) == (1, 3)
    for i, want in kernels.items():
        got = scaled[i].astype(np.float64)
        if i in LAYERS:
            got = got + spec.s * bank["lora_a"][i - 1, :, 0] @ bank["lora_b"][i - 1, 0]
        assert naive.rel(got, want) <= tolerance, i


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_spelling_and_file(tmp_path, spelling, pickled):
    tensors = adapter_tensors()
    targets = ["q_proj", "lm_head"]
    if spelling == "bare decoder":  # which has no head
        tensors = {name: x for name, x in tensors.items() if "lm_head" not in name}
        targets = ["q_proj"]
    end = SPELLINGS[spelling](f"{P}model.embed_tokens").removeprefix(P)
    options = {**OPTIONS, "target_modules": [*targets, end]}
    stored = {SPELLINGS[spelling](name): x for name, x in tensors.items()}
    assert (stored == tensors) == (spelling == "plain") or len(stored) == len(tensors)
    write(tmp_path, stored, options, pickled)
    check(read(tmp_path), tensors)


@pytest.mark.parametrize("pickled", [False, True])
def test_what_peft_saves_more_than_once(tmp_path, pickled):
    """What a module was before it was saved whole, and its weight by two names."""
    tensors = adapter_tensors()
    at, norm = f"{P}model.norm", tensors[f"{P}model.norm.weight"]
    more = {f"{at}.original_module.weight": norm + 1, f"{at}.modules_to_save.weight": norm}
    write(tmp_path, {**tensors, **more}, pickled=pickled)
    check(read(tmp_path), tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pickled", [False, True])
def test_numbers_of_every_width(tmp_path, kind, pickled):
    tensors = adapter_tensors(kind)
    write(tmp_path, tensors, pickled=pickled)
    check(read(tmp_path), tensors)


def test_the_host_holds_changed_kernels_once(tmp_path):
    """DoRA on every linear layer changes the whole base, in float32."""
    config = naive.TINY.replace(n_layers=12, d_model=96, d_ff=128, n_heads=8, head_dim=12)
    params, rng, tensors = naive.random_params(config), np.random.default_rng(0), {}
    for module, weight in linear_modules(config, "llama").items():
        shapes = {"lora_A.weight": (1, weight.shape[1]), "lora_B.weight": (weight.shape[0], 1)}
        shapes["lora_magnitude_vector"] = weight.shape[:1]
        for leaf, shape in shapes.items():
            tensors[f"{P}{module}.{leaf}"] = rng.normal(size=shape).astype(np.float32)
    options = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "use_dora": True}
    write(tmp_path, tensors, {**options, "target_modules": "all-linear"})
    tracemalloc.start()
    try:
        leaves = peft.read_peft(tmp_path, config, "llama", "lora", lambda: params).leaves
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = sum(leaf.nbytes for _, leaf in trees.flatten(leaves))
    assert kept == 12 * 4 * (96 * (96 + 24 + 24 + 96) + 3 * 96 * 128)
    assert peak < 1.7 * kept


def test_what_is_written_again_is_the_same(tmp_path):
    """Row-scaled kernels with their banks are DoRA again, in one rank; all else stands whole."""
    options = {**OPTIONS, "modules_to_save": ["norm"]}
    tensors = {k: x for k, x in adapter_tensors().items() if ".mlp." not in k}
    write(tmp_path, tensors, options)
    adapter = read(tmp_path)
    whole = trees.overlay(base(), adapter.leaves)
    paths = [path for path, _ in trees.flatten(adapter.leaves)]
    members = [(adapter.spec, adapter.params)]
    trained = TrainedLeaves(paths, whole, members, base)
    folder = save_peft(tmp_path / "out", CONFIG, "llama", members, trained=trained)
    again = read(folder)
    want, got = (dict(trees.flatten(x.leaves)) for x in (adapter, again))
    assert set(got) == set(want)
    for path, leaf in want.items():
        assert naive.rel(got[path], leaf) <= 2e-6, path
    for leaf in ("lora_a", "lora_b"):
        scale = again.spec.s / adapter.spec.s if leaf == "lora_b" else 1.0
        x, y = (one.params["attn.q"][leaf] for one in (again, adapter))
        assert naive.rel(scale * x, y) <= 2e-6
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["use_dora"] and fields["bias"] == "all" and fields["rank_pattern"] == {}
    assert "model.norm" in fields["modules_to_save"] and "lm_head" in fields["modules_to_save"]
    assert not any("q_proj" in module for module in fields["modules_to_save"])
    assert "vLLM loads no adapter with modules_to_save, use_dora, bias" in next(serving(fields))


@pytest.mark.parametrize("changed", [True, False])
def test_a_tied_embedding_is_saved_at_both_ends_or_at_none(tmp_path, changed):
    """A stage may name it and change no number of it: bfloat16 takes no small steps."""
    config = CONFIG.replace(tied=True)
    before = {name: leaf for name, leaf in base().items() if name != "head"}
    leaves = {"final_norm": 2 * before["final_norm"]}
    leaves |= {"embed": before["embed"] + 1} if changed else {}
    whole = trees.overlay(before, leaves)
    spec = BankSpec("b", ("attn.q",), 0, 2, rank=3, alpha=6.0)
    members = [(spec, naive.random_banks((spec,), config)["b"])]
    trained = TrainedLeaves(["embed", "final_norm"], whole, members, lambda: before)
    save_peft(tmp_path / "out", config, "llama", members, trained=trained)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ends = ["lm_head", "model.embed_tokens"] if changed else []
    assert fields["modules_to_save"] == [*ends, "model.norm"]
    back = peft.read_peft(tmp_path / "out", config, "llama", "again", lambda: before)
    found = dict(trees.flatten(back.leaves))
    assert found.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_kernels_are_saved_whole_unless_their_rows_are_scaled(tmp_path):
    """As far as rounding tells: one value off by two units in the last place is not."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base())
    old = half["layers"]["attn"]["q"]["kernel"]
    g = np.random.default_rng(0).uniform(0.5, 2.0, (CONFIG.n_layers, 1, Q))
    scaled = jnp.asarray(np.asarray(old, np.float64) * g, jnp.bfloat16)
    nudged = scaled.view(jnp.uint16).at[1, 2, 3].add(2).view(jnp.bfloat16)
    spec = BankSpec("b", ("attn.q", "mlp.up"), 0, 2, rank=3, alpha=6.0)
    bank = naive.random_banks((spec,), CONFIG)["b"]
    own = naive.f64(bank)["attn.q"]
    for name, kernel in {"scaled": scaled, "nudged": nudged}.items():
        whole = trees.overlay(half, {"layers": {"attn": {"q": {"kernel": kernel}}}})
        trained = TrainedLeaves(["layers.attn.q.kernel"], whole, [(spec, bank)], lambda: half)
        out = tmp_path / name
        save_peft(out, CONFIG, "llama", [(spec, bank)], trained=trained)
        fields = json.loads((out / "adapter_config.json").read_text())
        modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(CONFIG.n_layers)]
        assert fields["use_dora"] == (name == "scaled")
        assert fields["modules_to_save"] == (None if name == "scaled" else modules)
        again = peft.read_peft(out, CONFIG, "llama", "again", lambda half=half: half)
        got = again.leaves["layers"]["attn"]["q"]["kernel"].astype(np.float64)
        want = np.asarray(kernel, np.float64)
        for i in range(2):
            want[i] += spec.s * own["lora_a"][i, :, 0] @ own["lora_b"][i, 0]
        for i in range(CONFIG.n_layers if name == "scaled" else 0):
            p, n = naive.f64(again.params)["attn.q"], i - again.spec.start
            got[i] += again.spec.s * p["lora_a"][n, :, 0] @ p["lora_b"][n, 0]
        assert naive.rel(got, want) <= (2**-8 if name == "scaled" else 1e-6)


def refused(folder, **changes):
    with pytest.raises(UserError) as error:
        read(folder, **changes)
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_file(tmp_path):
    tensors = adapter_tensors()

    def problems(changes=None, config=CONFIG, **options):
        stored = {k: x for k, x in {**tensors, **(changes or {})}.items() if x is not None}
        write(tmp_path, stored, {**OPTIONS, **options})
        return refused(tmp_path, config=config)

    name = f"{P}model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    assert "layers.1.self_attn.q_proj.lora_magnitude_vector: missing" in problems({name: None})
    text = problems(use_dora=False)
    assert f"{name}: 'model.layers.1.self_attn.q_proj' is left out by adapter_config.json" in text
    at = f"{P}model.norm.weight"
    assert "model.norm.weight: missing, but adapter_config.json says" in problems({at: None})
    assert f"{at}: shape (3,), expected (16,)" in problems({at: np.ones(3, np.float32)})
    assert "save yours after" not in problems({at: np.ones(3, np.float32)})
    head = {f"{P}lm_head.weight": np.ones((V + 2, D), np.float32)}
    text = problems({name: None for name in tensors if "lm_head" in name} | head,
                    target_modules=["q_proj", "model.embed_tokens"],
                    modules_to_save=["norm", "layers.0.mlp", "lm_head"])  # fmt: skip
    assert f"{P}lm_head.weight: shape ({V + 2}, {D}), expected ({V}, {D}) (for a base of" in text
    assert f"save yours after resize_token_embeddings({V + 2})" in text
    assert f"{at}: NaN or infinity" in problems({at: np.full(D, np.nan, np.float32)})
    assert "q_proj.bias: missing, but" in problems(bias="all")
    other = f"{P}model.norm.modules_to_save.second.weight"
    mixed = {at: None, other: tensors[at], name: None, f"{name}.default": tensors[name]}
    assert "holds 2 adapters (default, second)" in problems(mixed)
    twice = problems({at.removeprefix(P): 2 * tensors[at]})
    assert f"stands there as {at} too, with other values" in twice
    text = problems(config=CONFIG.replace(tied=True))
    assert "embed_tokens.weight and lm_head.weight become different" in text
    assert "DoRA scales each by itself" in text and "ensure_weight_tying" not in text
    plain = {name: None for name in tensors if "magnitude" in name}
    text = problems(plain, CONFIG.replace(tied=True), use_dora=False)
    assert "train the adapter with ensure_weight_tying" in text
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: missing, and there is no adapter_model.bin" in refused(
        tmp_path
    )


def test_a_lora_only_bias_that_peft_lost_is_told(tmp_path):
    options = {**OPTIONS, "bias": "lora_only"}
    tensors = adapter_tensors()
    write(tmp_path, tensors, options)
    check(read(tmp_path), tensors)
    assert read(tmp_path).notes == ()
    old = {k.replace("base_layer.bias", "bias"): x for k, x in tensors.items()}
    write(tmp_path, old, options)
    check(read(tmp_path), tensors)
    write(tmp_path, {k: x for k, x in tensors.items() if "bias" not in k}, options)
    assert "PEFT wrote no bias" in read(tmp_path).notes[0]


def test_rows_of_tokens_alone(tmp_path):
    """The base ties its ends too: PEFT trains the rows of both as one."""
    options = {**OPTIONS, "target_modules": ["q_proj"], "layers_to_transform": None}
    options |= {"modules_to_save": None, "use_dora": False, "trainable_token_indices": [7, 3]}
    rng = np.random.default_rng(1)
    delta = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {delta: rng.normal(size=(2, D)).astype(np.float32)}
    for i in range(CONFIG.n_layers):
        at = f"{P}model.layers.{i}.self_attn.q_proj.lora_"
        for leaf, shape in {"A": (R, D), "B": (Q, R)}.items():
            tensors[f"{at}{leaf}.weight"] = rng.normal(size=shape).astype(np.float32)
    write(tmp_path, tensors, {**options, "layers_pattern": None, "who": "a tool", "none": None})
    want = np.array(base()["embed"])
    want[[7, 3]] = tensors[delta]
    for tied in (False, True):
        adapter = read(tmp_path, CONFIG.replace(tied=tied))
        assert [path for path, _ in trees.flatten(adapter.leaves)] == ["embed"]
        np.testing.assert_array_equal(adapter.leaves["embed"], want)
        assert adapter.notes == ("adapter_config.json: who: not known, and nothing was made of it",)
    write(tmp_path, tensors, {**options, "trainable_token_indices": [7, V]})
    assert f"trainable_token_indices: [7, {V}] are no numbers of {V} tokens" in refused(tmp_path)


def test_a_stage_names_the_leaves_it_takes(tmp_path):
    write(tmp_path, adapter_tensors())
    adapter = read(tmp_path)
    roster = {"lora": (adapter.spec, "train")}
    paths = {path for path, _ in trees.flatten(adapter.leaves)}
    take = functools.partial(released.read_adapter, tmp_path, CONFIG, "llama", roster)
    taken = take(paths, base)
    assert {path for path, _ in trees.flatten(taken.base)} == paths
    assert "leaves of the base: " in taken.notes[-1]
    with pytest.raises(UserError, match=r"its own embed, .*does not train: name them"):
        take(paths - {"embed", "head"}, base)
    with pytest.raises(UserError, match=r"train_base: the adapter has no layers\.attn\.k\.bias"):
        take(paths | {"layers.attn.k.bias"}, base)


def test_servers_are_told_their_rank():
    fields = {"modules_to_save": None, "use_dora": False, "bias": "none"}
    said = {rank: next(serving({**fields, "r": rank})) for rank in (3, 8, 9, 300, 512, 513)}
    ranks = {rank: text.rpartition("=")[2] for rank, text in said.items()}
    assert ranks == {3: "8", 8: "8", 9: "16", 300: "320", 512: "512", 513: "hf"}
