"""PEFT directories out of banks and into banks, against the published formula in float64.

A module's weight gets `scaling · B A`; the names, patterns and files are read here once more, by
themselves. What PEFT itself makes of them is in test_export_parity.py.
"""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.config import site_shapes
from medmoe_jax.checkpoints import files, peft, peft_export
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import BANK_RULES, shardings
from tests import naive
from tests.naive import TINY

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
SPECS = (
    BankSpec("attention", ATTENTION, 0, 3, rank=3, alpha=6.0),
    BankSpec("knowledge", MLP, 0, 2, rank=4, alpha=5.0, rank_stabilised=True),
    BankSpec("skills", ("attn.q", "mlp.up"), 1, 2, experts=3, rank=2, alpha=3.0,
             learned_scale=True),
    BankSpec("mixed", ("attn.v", "mlp.up"), 1, 3, experts=2, rank=2, alpha=4.0, gate="skill",
             mix_per_layer=True, mix_softmax=True),
)  # fmt: skip
# The modules of a block with their sites, as the families' authors name them.
MODULES = {
    "llama": {
        "self_attn.q_proj": ["attn.q"],
        "self_attn.k_proj": ["attn.k"],
        "self_attn.v_proj": ["attn.v"],
        "self_attn.o_proj": ["attn.o"],
        "mlp.gate_proj": ["mlp.gate"],
        "mlp.up_proj": ["mlp.up"],
        "mlp.down_proj": ["mlp.down"],
    },
    "phi3": {
        "self_attn.qkv_proj": ["attn.q", "attn.k", "attn.v"],
        "self_attn.o_proj": ["attn.o"],
        "mlp.gate_up_proj": ["mlp.gate", "mlp.up"],
        "mlp.down_proj": ["mlp.down"],
    },
}


def random_bank(spec, seed=0):
    rng = np.random.default_rng([seed, len(spec.name)])
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        bank_lib.abstract(spec, TINY),
    )


MEMBERS = [(spec, random_bank(spec)) for spec in SPECS]


def delta(members, site, layer):
    """`Σ_banks s Σ_e w_e A_e Λ_e B_e` of one site of one layer, `[D, O]`."""
    total = np.zeros(site_shapes(TINY)[site])
    for spec, params in members:
        if site not in spec.sites or not spec.start <= layer < spec.stop:
            continue
        i, p = layer - spec.start, naive.f64(params[site])
        s = spec.alpha / (np.sqrt(spec.rank) if spec.rank_stabilised else spec.rank)
        weights = np.ones(spec.experts)
        if spec.gate == "skill":
            weights = np.exp(naive.f64(params["mix"]["weight"])[i])
            weights /= weights.sum()
        for e in range(spec.experts):
            middle = np.diag(p["scale"][i, e]) if "scale" in p else np.eye(spec.rank)
            total += s * weights[e] * p["lora_a"][i, :, e] @ middle @ p["lora_b"][i, e]
    return total


def added(folder, module):
    """What PEFT adds to a module's weight, `[O, D]`; None where it has no adapter."""
    options = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if not any(module == t or module.endswith(f".{t}") for t in options["target_modules"]):
        return None
    key = next((k for k in options["rank_pattern"] if re.match(rf"(.*\.)?({k})$", module)), None)
    rank = options["rank_pattern"].get(key, options["r"])
    alpha = options["alpha_pattern"].get(key, options["lora_alpha"])
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].astype(float) for x in "AB")
    assert a.shape[0] == b.shape[1] == rank
    return alpha / rank * b @ a


def check_folder(folder, members, family, tolerance=1e-6):
    """Every module of every layer, against the deltas of its sites one below the other."""
    worst = 0.0
    for layer, (module, sites) in itertools.product(range(3), MODULES[family].items()):
        want = np.concatenate([delta(members, site, layer).T for site in sites])
        got = added(folder, f"model.layers.{layer}.{module}")
        assert (got is None) == (not want.any()), module
        if got is not None:
            worst = max(worst, naive.rel(got, want))
    assert worst <= tolerance, worst


def read(folder, config=TINY, family="llama", name="lora"):
    """`(spec, params)` of an adapter that leaves the base alone."""
    adapter = peft.read_peft(folder, config, family, name, base=None)
    assert adapter.leaves == {}
    return adapter.spec, adapter.params


@pytest.mark.parametrize("family", MODULES)
def test_every_bank_is_in_what_is_written(tmp_path, family):
    folder = peft_export.save_peft(tmp_path / "out", TINY, family, MEMBERS, base="org/name")
    check_folder(folder, MEMBERS, family)
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["lora_alpha"] == options["r"] == {"llama": 14, "phi3": 19}[family]
    assert options["alpha_pattern"] == options["rank_pattern"] == {}
    assert options["base_model_name_or_path"] == "org/name"
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {
        f"base_model.model.{m}.lora_{x}.weight" for m in options["target_modules"] for x in "AB"
    }
    assert set(tensors) == names
    assert all(x.dtype == np.float32 for x in tensors.values())
    ranks = {x.shape["lora_B" in name] for name, x in tensors.items()}
    assert ranks == {options["r"]}
    for number, (spec, params) in enumerate(MEMBERS):
        others = [m for m in MEMBERS if m[0] is not spec]
        for wrong in (others, [*others, (spec.replace(alpha=2 * spec.alpha), params)]):
            with pytest.raises(AssertionError):
                check_folder(folder, wrong, family, tolerance=0.01), number


def test_only_the_modules_of_the_banks_are_named(tmp_path):
    member = MEMBERS[2]
    folder = peft_export.save_peft(
        tmp_path / "out", TINY, "phi3", [member], dtype=ml_dtypes.bfloat16
    )
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["target_modules"] == [
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
    ]
    assert options["rank_pattern"] == {} and options["r"] == 6
    check_folder(folder, [member], "phi3", tolerance=0.02)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_cleared_triplets_are_left_out(tmp_path):
    """Zeros stand in their place, and a module without any is not named."""
    spec = BankSpec("pruned", ("attn.o", "mlp.down"), 0, 3, rank=4, alpha=3.0, learned_scale=True)
    params = random_bank(spec)
    for (site, layer), cleared in {
        ("attn.o", 0): [0, 2],
        ("attn.o", 1): [0, 1, 2, 3],
        ("mlp.down", 2): [3],
    }.items():
        scale = np.array(params[site]["scale"])
        scale[layer, 0, cleared] = 0.0
        params[site] = {**params[site], "scale": scale}
    folder = peft_export.save_peft(tmp_path / "out", TINY, "llama", [(spec, params)])
    check_folder(folder, [(spec, params)], "llama")
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["r"] == 4 and options["rank_pattern"] == {}
    assert "model.layers.1.self_attn.o_proj" not in options["target_modules"]
    tensors = load_file(folder / "adapter_model.safetensors")
    a = tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"]
    assert a[:2].any(axis=1).all() and not a[2:].any()
    nothing = {site: {**p, "scale": np.zeros_like(p["scale"])} for site, p in params.items()}
    with pytest.raises(UserError, match="every Λ of the banks to write is 0"):
        peft_export.save_peft(tmp_path / "none", TINY, "llama", [(spec, nothing)])


def test_banks_may_be_sharded(tmp_path):
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    members = [(s, p) for s, p in MEMBERS if s.gate == "always"]
    placed = [(s, jax.device_put(p, shardings(p, mesh, BANK_RULES))) for s, p in members]
    a = placed[0][1]["attn.q"]["lora_a"]
    assert a.addressable_shards[0].data.shape[1] == TINY.d_model // 4
    folder = peft_export.save_peft(tmp_path / "out", TINY, "phi3", placed)
    check_folder(folder, members, "phi3")


def test_what_is_written_is_read_back(tmp_path):
    folder = peft_export.save_peft(tmp_path / "out", TINY, "phi3", MEMBERS)
    spec, params = read(folder, family="phi3", name="all")
    assert (spec.name, spec.experts, spec.start, spec.stop) == ("all", 1, 0, 3)
    for layer, site in itertools.product(range(3), site_shapes(TINY)):
        want = delta(MEMBERS, site, layer)
        np.testing.assert_allclose(delta([(spec, params)], site, layer), want, atol=1e-4)


def test_refused_writes_leave_nothing(tmp_path, monkeypatch):
    token = BankSpec("noise", MLP, 0, 3, experts=4, gate="token")
    with pytest.raises(UserError, match="bank 'noise' has gate 'token'"):
        peft_export.save_peft(
            tmp_path / "out", TINY, "llama", [*MEMBERS, (token, random_bank(token))]
        )
    with pytest.raises(UserError, match="no bank to write"):
        peft_export.save_peft(tmp_path / "out", TINY, "llama", [])
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left")):

        def full(*_, error=error, **__):
            raise error

        monkeypatch.setattr(files, "save_file", full)
        with pytest.raises(UserError, match=r"out: cannot be written.*No space left"):
            peft_export.save_peft(tmp_path / "out", TINY, "llama", MEMBERS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        peft_export.save_peft(tmp_path / "out", TINY, "llama", MEMBERS)
    assert (tmp_path / "out").read_text() == "mine"


# Reading -----------------------------------------------------------------------------------------

PLAIN = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
}


def write(folder, options, ranks, family="llama", seed=0, dtype=np.float32):
    """An adapter with random tensors: `ranks` is `{module: rank}`. Returns the tensors."""
    rng, tensors = np.random.default_rng(seed), {}
    shapes = site_shapes(TINY)
    adalora = options["peft_type"] == "ADALORA"
    end = "" if adalora else ".weight"
    for module, r in ranks.items():
        sites = MODULES[family][module.split(".", 3)[3]]
        O = sum(shapes[site][1] for site in sites)
        leaves = {"A": (r, shapes[sites[0]][0]), "B": (O, r)} | ({"E": (r, 1)} if adalora else {})
        for x, shape in leaves.items():
            name = f"base_model.model.{module}.lora_{x}{end}"
            tensors[name] = rng.normal(size=shape).astype(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return tensors


def every(*modules, layers=range(3), rank=4):
    return {f"model.layers.{i}.{module}": rank for i in layers for module in modules}


def check_bank(bank, tensors, scaling, family="llama"):
    """Every site of every layer against `scaling(module) · B E A`."""
    total = 0
    for layer, (module, sites) in itertools.product(range(3), MODULES[family].items()):
        name = f"model.layers.{layer}.{module}"
        prefix = f"base_model.model.{name}.lora_"
        leaves = {k[len(prefix)]: x.astype(float) for k, x in tensors.items() if prefix in k}
        got = np.concatenate([delta([bank], site, layer).T for site in sites])
        if not leaves:
            assert not got.any(), name
            continue
        want = scaling(name) * (leaves["B"] * leaves.get("E", np.ones((1, 1))).T) @ leaves["A"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
        total += 1
    assert 3 * total == len(tensors) + total * (not any("lora_E" in k for k in tensors))


@pytest.mark.parametrize("root", [False, True])
def test_a_plain_adapter(tmp_path, root):
    ranks = every("self_attn.q_proj", "mlp.down_proj")
    tensors = write(tmp_path, {**PLAIN, "use_rslora": root}, ranks, dtype=np.float16)
    bank = read(tmp_path)
    assert bank[0] == BankSpec(
        "lora", ("attn.q", "mlp.down"), 0, 3, rank=4, alpha=6.0, rank_stabilised=root, dropout=0.1
    )
    assert jax.tree.map(lambda x: x.shape, bank[1]) == bank_lib.shapes(bank[0], TINY)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(bank[1]))
    check_bank(bank, tensors, lambda _: 6 / (2 if root else 4))


@pytest.mark.parametrize("root", [False, True])
def test_unequal_ranks_and_alphas(tmp_path, root):
    options = {
        **PLAIN,
        "use_rslora": root,
        "target_modules": r".*\.(1|2)\..*(q|down)_proj",
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"model.layers.2.self_attn.q_proj": 10},
    }
    ranks = {
        **every("self_attn.q_proj", "mlp.down_proj", layers=(1, 2)),
        "model.layers.1.self_attn.q_proj": 7,
        "model.layers.1.mlp.down_proj": 2,
        "model.layers.2.mlp.down_proj": 2,
    }
    tensors = write(tmp_path, options, ranks)
    bank = read(tmp_path)
    assert (bank[0].rank, bank[0].s, bank[0].start, bank[0].stop) == (7, 1.0, 1, 3)
    alphas = {"model.layers.2.self_attn.q_proj": 10}
    check_bank(bank, tensors, lambda m: alphas.get(m, 6) / ranks[m] ** (0.5 if root else 1))


@pytest.mark.parametrize("layers", [[0, 2], 2])
def test_layers_to_transform_and_fused_modules(tmp_path, layers):
    options = {
        **PLAIN,
        "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"],
        "exclude_modules": ["model.layers.2.mlp.down_proj"],
        "layers_to_transform": layers,
    }
    chosen = [layers] if isinstance(layers, int) else layers
    ranks = every("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", layers=chosen)
    del ranks["model.layers.2.mlp.down_proj"]
    tensors = write(tmp_path, options, ranks, "phi3")
    bank = read(tmp_path, family="phi3")
    assert (bank[0].start, bank[0].stop) == (chosen[0], 3)
    check_bank(bank, tensors, lambda _: 1.5, "phi3")


@pytest.mark.parametrize("alpha", [6, 0])
def test_adalora_keeps_the_scaling_of_its_first_rank(tmp_path, alpha):
    options = {"peft_type": "ADALORA", "init_r": 5, "r": 8, "lora_alpha": alpha}
    options |= {"target_modules": "all-linear", "rank_pattern": {"x": [True, False]}}
    ranks = every(*MODULES["llama"], rank=3) | every("mlp.up_proj", rank=5)
    tensors = write(tmp_path, options, ranks)
    bank = read(tmp_path)
    assert bank[0].learned_scale and bank[0].rank == 5
    check_bank(bank, tensors, lambda _: (alpha or 5) / 5)


def refused(folder, config=TINY, family="llama"):
    with pytest.raises(UserError) as error:
        read(folder, config, family)
    return str(error.value)


def test_options_that_a_bank_lacks_are_listed_at_once(tmp_path):
    bad = {
        "lora_bias": True,
        "bias": "some",
        "target_parameters": ["experts"],
        "init_lora_weights": "pissa_niter_4",
        "r": 0,
        "lora_alpha": None,
        "target_modules": "(",
        "rank_pattern": {"q_proj": "four"},
        "alpha_pattern": {"*": 2},
    }
    named = {**bad, "q_proj": 0}
    del named["rank_pattern"]
    write(tmp_path, {**PLAIN, **bad}, every("self_attn.q_proj"))
    text = refused(tmp_path)
    assert f"{len(named)} problems" in text
    assert all(f"adapter_config.json: {key}: " in text for key in named), text
    write(tmp_path, {**PLAIN, "peft_type": "IA3"}, every("self_attn.q_proj"))
    assert "peft_type: 'IA3' is none of LORA, ADALORA" in refused(tmp_path)
    write(tmp_path, {**PLAIN, "target_modules": None}, every("self_attn.q_proj"))
    assert "target_modules is empty" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json, line 1: not JSON" in refused(tmp_path)


def test_an_adapter_of_another_base_is_one_error(tmp_path):
    ranks = every("self_attn.q_proj", "mlp.down_proj")
    tensors = write(tmp_path, PLAIN, ranks)
    text = refused(tmp_path, TINY.replace(d_model=12, n_layers=5))
    assert "(llama, 5 layers, width 12); 14 problems" in text
    assert "layers.0.self_attn.q_proj.lora_A.weight: shape (4, 16), expected (4, 12)" in text
    assert "layers.1.mlp.down_proj.lora_B.weight: shape (16, 4), expected (12, 4)" in text
    assert "layers.4.mlp.down_proj.lora_A: missing" in text
    text = refused(tmp_path, TINY.replace(n_layers=2))
    assert "'model.layers.2.mlp.down_proj' is no layer of this base" in text
    text = refused(tmp_path, family="phi3")
    assert "'model.layers.0.self_attn.q_proj' is no layer of this base" in text
    for name, words in {
        "base_model.model.score.weight": "'score' is no weight of this base",
        "base_model.model.lm_head.weight": "shape (2, 2), expected (29, 16)",
        "base_model.model.prompt": "is no tensor of an adapter",
    }.items():
        save_file({**tensors, name: np.ones((2, 2))}, tmp_path / "adapter_model.safetensors")
        assert f"{name}: {words}" in refused(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(tmp_path, value):
    tensors = write(tmp_path, PLAIN, every("self_attn.q_proj"))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert f"{name}: NaN or infinity" in refused(tmp_path)
    write(tmp_path, {**PLAIN, "lora_alpha": value}, every("self_attn.q_proj"))
    assert "adapter_config.json: lora_alpha: " in refused(tmp_path)


def test_files_that_do_not_fit_their_config(tmp_path):
    ranks = every("self_attn.q_proj", "mlp.down_proj")
    write(tmp_path, {**PLAIN, "target_modules": ["q_proj"]}, ranks)
    text = refused(tmp_path)
    assert "6 problems" in text
    assert "'model.layers.2.mlp.down_proj' is left out by adapter_config.json" in text
    write(tmp_path, {**PLAIN, "rank_pattern": {"down_proj": 3}}, ranks)
    text = refused(tmp_path)
    assert "down_proj.lora_A.weight: shape (4, 20), expected (3, 20) (rank 3)" in text
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "adapter_model.safetensors: truncated or damaged" in refused(tmp_path)
    path.unlink()
    assert "adapter_model.safetensors: missing" in refused(tmp_path)
    write(tmp_path, {**PLAIN, "target_modules": ["c_attn"]}, {})
    assert "target_modules matches no linear layer" in refused(tmp_path)
