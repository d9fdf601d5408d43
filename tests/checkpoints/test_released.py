"""Adapter directories of other tools, written by hand: every tensor's place, and what is refused.

The names and the layout of the tensors are spelt out here once more, by themselves.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.config import site_shapes
from medmoe_jax.checkpoints import released
from medmoe_jax.errors import UserError
from tests.naive import TINY
from tests.released import R, module, write

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
L, E = TINY.n_layers, 4
ATTN_BANK = BankSpec("attention", ATTENTION, 0, L, rank=R, alpha=4.0)
NOISE = BankSpec("noise", MLP, 0, L, experts=E, rank=R, alpha=4.0, gate="token")
KNOWLEDGE = BankSpec("knowledge", MLP, 0, L, rank=2 * R, alpha=8.0)
ALIGNMENT = KNOWLEDGE.replace(name="alignment")
STAGE_1 = {b.name: (b, "train") for b in (ATTN_BANK, NOISE, KNOWLEDGE)}
STAGE_2 = {
    "attention": (ATTN_BANK, "merged"),
    "knowledge": (KNOWLEDGE, "frozen"),
    "alignment": (ALIGNMENT, "train"),
}


def random(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def attention_tensors(rng, prefix="base_model.model."):
    out = {}
    for i, site in itertools.product(range(L), ATTENTION):
        D, O = site_shapes(TINY)[site]
        out[f"{prefix}{module(i, site)}.lora_A.weight"] = random(rng, R, D)
        out[f"{prefix}{module(i, site)}.lora_B.weight"] = random(rng, O, R)
    return out


def expert_tensors(rng, prefix="base_model.model."):
    out = {}
    for i, site in itertools.product(range(L), MLP):
        D, O = site_shapes(TINY)[site]
        at = prefix + module(i, site)
        for e in range(E):
            out[f"{at}.experts.{e}.lora_A_{e}.weight"] = random(rng, R, D)
            out[f"{at}.experts.{e}.lora_B_{e}.weight"] = random(rng, O, R)
        out[f"{at}.switch.weight"], out[f"{at}.switch.bias"] = random(rng, E, D), random(rng, E)
    return out


def block_tensors(rng, block, prefix="base_model.model."):
    out = {}
    for i, site in itertools.product(range(L), MLP):
        D, O = site_shapes(TINY)[site]
        out[f"{prefix}{module(i, site)}.{block}.lora_A.weight"] = random(rng, 2 * R, D)
        out[f"{prefix}{module(i, site)}.{block}.lora_B.weight"] = random(rng, O, 2 * R)
    return out


def read(folder, roster, family="llama"):
    return released.read_adapter(folder, TINY, family, roster, (), None)


def check(banks, name, tensors, block="", prefix="base_model.model."):
    """A bank of one expert against the tensors of a block."""
    for site, leaves in banks[name].items():
        assert set(leaves) == {"lora_a", "lora_b"}
        for i in range(L):
            at = f"{prefix}{module(i, site)}{block}"
            np.testing.assert_array_equal(
                leaves["lora_a"][i, :, 0].T, tensors[f"{at}.lora_A.weight"]
            )
            np.testing.assert_array_equal(leaves["lora_b"][i, 0].T, tensors[f"{at}.lora_B.weight"])


def check_experts(bank, tensors, prefix="base_model.model."):
    assert set(bank) == set(MLP)
    for (site, p), i in itertools.product(bank.items(), range(L)):
        at = prefix + module(i, site)
        np.testing.assert_array_equal(p["router"]["kernel"][i].T, tensors[f"{at}.switch.weight"])
        np.testing.assert_array_equal(p["router"]["bias"][i], tensors[f"{at}.switch.bias"])
        for e in range(E):
            a, b = (tensors[f"{at}.experts.{e}.lora_{x}_{e}.weight"] for x in "AB")
            np.testing.assert_array_equal(p["lora_a"][i, :, e], a.T)
            np.testing.assert_array_equal(p["lora_b"][i, e], b.T)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.", ""])
def test_routed_experts_and_attention(tmp_path, rng, prefix):
    lora, experts = attention_tensors(rng), expert_tensors(rng, prefix)
    folder = write(tmp_path / "a", lora, experts)
    roster = {
        "attention": (ATTN_BANK, "train"),
        "experts": (NOISE.replace(name="experts"), "train"),
    }
    given = read(folder, roster)
    check(given.banks, "attention", lora)
    check_experts(given.banks["experts"], experts, prefix)
    assert given.groups == {
        "lora": {"banks": ["attention"], "s": 2.0},
        "experts": {"banks": ["experts"], "s": 2.0},
    }
    assert set(given.files) == {
        *("adapter_config.json", "config.json"),
        *("adapter_model.safetensors", "non_lora_trainables.bin"),
    }
    again = read(folder, roster)
    assert again.files == given.files
    write(folder, lora, {k: -x for k, x in experts.items()})
    changed = read(folder, roster).files
    assert [k for k in changed if changed[k] != given.files[k]] == ["non_lora_trainables.bin"]


def test_a_shared_block_beside_the_experts(tmp_path, rng):
    lora, experts, shared = (
        attention_tensors(rng),
        expert_tensors(rng),
        block_tensors(rng, "share_experts"),
    )
    given = read(write(tmp_path / "a", lora, experts | shared), STAGE_1)
    check(given.banks, "attention", lora)
    check_experts(given.banks["noise"], experts)
    check(given.banks, "knowledge", shared, ".share_experts")
    assert given.groups["shared"] == {"banks": ["knowledge"], "s": 2.0}


@pytest.mark.parametrize("pickled", [False, True])
def test_a_second_stage(tmp_path, rng, pickled):
    base, orth = block_tensors(rng, "base", ""), block_tensors(rng, "orth", "")
    form = {"pickled": base | orth} if pickled else {"pickled": {}, "tensors": base | orth}
    for state in ("frozen", "gate", "train"):
        roster = {**STAGE_2, "knowledge": (KNOWLEDGE, state)}
        given = read(write(tmp_path / "a", **form), roster)
        assert set(given.banks) == {"knowledge", "alignment"}
        check(given.banks, "knowledge", base, ".base", "")
        check(given.banks, "alignment", orth, ".orth", "")
    given = read(write(tmp_path / "b", tensors=orth), STAGE_2)
    assert set(given.banks) == {"alignment"}
    check(given.banks, "alignment", orth, ".orth", "")
    for state in ("gate", "train"):
        trained = {**STAGE_2, "knowledge": (KNOWLEDGE, state)}
        with pytest.raises(UserError, match="bank 'alignment': nothing in the directory for mlp"):
            read(tmp_path / "b", trained)


def test_half_precision_tensors(tmp_path, rng):
    lora, experts = attention_tensors(rng), expert_tensors(rng)
    lora = {k: x.astype(ml_dtypes.bfloat16) for k, x in lora.items()}
    experts = {k: x.astype(np.float16) for k, x in experts.items()}
    roster = {k: v for k, v in STAGE_1.items() if k != "knowledge"}
    given = read(write(tmp_path / "a", lora, experts), roster)
    check(given.banks, "attention", {k: x.astype(np.float32) for k, x in lora.items()})
    check_experts(given.banks["noise"], {k: x.astype(np.float32) for k, x in experts.items()})


@pytest.mark.parametrize("root", [False, True])
def test_another_scaling_goes_into_b(tmp_path, rng, root):
    lora, experts = attention_tensors(rng), expert_tensors(rng)
    roster = {k: v for k, v in STAGE_1.items() if k != "knowledge"}
    folder = write(tmp_path / "a", lora, experts, lora_alpha=3, use_rslora=root)
    given = read(folder, roster)
    s = 3 / math.sqrt(R) if root else 3 / R
    assert {g["s"] for g in given.groups.values()} == {s}
    for name, tensors in (("attention", lora), ("noise", experts)):
        for site, p in given.banks[name].items():
            inside = ".experts.0" if name == "noise" else ""
            end = "_0.weight" if name == "noise" else ".weight"
            at = f"base_model.model.{module(1, site)}{inside}"
            want = (s * tensors[f"{at}.lora_B{end}"].astype(float)).T
            np.testing.assert_allclose(2.0 * p["lora_b"][1, 0], want, rtol=3e-7)
            np.testing.assert_array_equal(p["lora_a"][1, :, 0].T, tensors[f"{at}.lora_A{end}"])


def test_one_peft_adapter_for_several_banks(tmp_path, rng):
    """Its sites decide; a pattern's padding goes beyond no bank's rank."""
    everywhere = {}
    for i, site in itertools.product(range(L), (*ATTENTION, *MLP)):
        (D, O), r = site_shapes(TINY)[site], R if site in ATTENTION else 2 * R
        at = f"base_model.model.{module(i, site)}"
        everywhere[f"{at}.lora_A.weight"] = random(rng, r, D)
        everywhere[f"{at}.lora_B.weight"] = random(rng, O, r)
    options = {
        **{"target_modules": "all-linear", "r": 2 * R, "lora_alpha": 4 * R},
        **{"rank_pattern": {"[qkvo]_proj": R}, "alpha_pattern": {"[qkvo]_proj": 2 * R}},
    }
    folder = write(tmp_path / "a", everywhere, **options)
    roster = {k: v for k, v in STAGE_1.items() if k != "noise"}
    given = read(folder, roster)
    assert given.groups["lora"]["banks"] == ["attention", "knowledge"]
    for name in roster:
        bank = roster[name][0]
        for site, i in itertools.product(bank.sites, range(L)):
            at = f"base_model.model.{module(i, site)}"
            p = given.banks[name][site]
            assert p["lora_a"].shape[-1] == bank.rank
            got = bank.s * p["lora_a"][i, :, 0] @ p["lora_b"][i, 0]
            want = 2.0 * everywhere[f"{at}.lora_A.weight"].T @ everywhere[f"{at}.lora_B.weight"].T
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    wide = {**roster, "attention": (ATTN_BANK.replace(rank=R - 1), "train")}
    with pytest.raises(UserError, match=r"shape \(4, 16\), bank 'attention' \(rank 1"):
        read(folder, wide)


def test_layers_that_an_adapter_leaves_out_are_zeros(tmp_path, rng):
    """Between others; where it begins and ends must be where the bank does."""
    tensors = attention_tensors(rng)
    left_out = f"{module(1, 'attn.k')}."
    given = {name: x for name, x in tensors.items() if left_out not in name}
    options = {"target_modules": r".*(q|v|o)_proj|.*layers\.[^1]\..*k_proj"}
    roster = {"attention": (ATTN_BANK, "train")}
    imported = read(write(tmp_path / "a", given, **options), roster)
    zeros = {name: np.zeros_like(x) for name, x in tensors.items() if left_out in name}
    assert len(zeros) == 2
    check(imported.banks, "attention", {**given, **zeros})
    assert "bank 'attention': the adapter leaves out attn.k of layers 1: zeros" in imported.notes
    for layer in (0, L - 1):
        first = f"{module(layer, 'attn.k')}."
        less = {name: x for name, x in tensors.items() if first not in name}
        options = {"target_modules": rf".*(q|v|o)_proj|.*layers\.[^{layer}]\..*k_proj"}
        folder = write(tmp_path / f"less {layer}", less, **options)
        refused(folder, roster, f"bank 'attention': lora_a of attn.k, layer {layer}, expert 0 is")


def test_fused_layers(tmp_path, rng):
    tensors, D, F = {}, TINY.d_model, TINY.d_ff
    for i in range(L):
        for name, width, out in (("gate_up_proj", D, 2 * F), ("down_proj", F, D)):
            at = f"base_model.model.model.layers.{i}.mlp.{name}"
            for e in range(E):
                tensors[f"{at}.experts.{e}.lora_A_{e}.weight"] = random(rng, R, width)
                tensors[f"{at}.experts.{e}.lora_B_{e}.weight"] = random(rng, out, R)
            tensors[f"{at}.switch.weight"] = random(rng, E, width)
            tensors[f"{at}.switch.bias"] = random(rng, E)
    bank = read(write(tmp_path / "a", pickled=tensors), {"noise": (NOISE, "train")}, "phi3").banks
    at = "base_model.model.model.layers.1.mlp.gate_up_proj"
    b = tensors[f"{at}.experts.3.lora_B_3.weight"]
    for site, rows in (("mlp.gate", slice(0, F)), ("mlp.up", slice(F, 2 * F))):
        p = bank["noise"][site]
        np.testing.assert_array_equal(p["lora_b"][1, 3].T, b[rows])
        np.testing.assert_array_equal(
            p["lora_a"][1, :, 3].T, tensors[f"{at}.experts.3.lora_A_3.weight"]
        )
        np.testing.assert_array_equal(p["router"]["bias"][1], tensors[f"{at}.switch.bias"])


def refused(folder, roster, *words, family="llama"):
    """The whole message, which names each of `words` on a line of its own."""
    with pytest.raises(UserError) as caught:
        read(folder, roster, family)
    message = str(caught.value)
    assert message.startswith(str(folder))
    lines = message.split("\n")[1:]
    for word in words:
        assert any(word in line for line in lines), (word, message)
    return lines


def test_everything_that_is_missing_or_strange_at_once(tmp_path, rng):
    lora, experts, shared = (
        attention_tensors(rng),
        expert_tensors(rng),
        block_tensors(rng, "share_experts"),
    )
    at = "base_model.model.model.layers"
    del experts[f"{at}.1.mlp.up_proj.experts.2.lora_B_2.weight"]
    del experts[f"{at}.2.mlp.down_proj.switch.bias"]
    experts[f"{at}.0.mlp.up_proj.experts.1.lora_A_1.weight"] = random(rng, R, 5)
    experts[f"{at}.0.mlp.up_proj.experts.4.lora_A_4.weight"] = random(rng, R, 16)
    experts[f"{at}.0.mlp.up_proj.experts.1.lora_A_2.weight"] = random(rng, R, 16)
    experts[f"{at}.3.mlp.up_proj.switch.weight"] = random(rng, E, 16)
    experts["model.norm.weight"] = random(rng, 16)
    experts[f"{at}.0.self_attn.q_proj.orth.lora_A.weight"] = random(rng, R, 16)
    shared[f"{at}.0.mlp.up_proj.share_experts.lora_A.weight"] = random(rng, R + 1, 16)
    lines = refused(
        write(tmp_path / "a", lora, experts | shared, top_k=1),
        STAGE_1,
        "bank 'noise': lora_b of mlp.up, layer 1, expert 2 is missing",
        "bank 'noise': router.bias of mlp.down, layer 2, expert 0 is missing",
        "up_proj.experts.1.lora_A_1.weight: shape (2, 5), bank 'noise' (rank 2, 4 experts) asks",
        "experts.4.lora_A_4.weight: bank 'noise' has no place for it",
        "experts.1.lora_A_2.weight: is no block beside a linear layer of this base",
        "layers.3.mlp.up_proj.switch.weight: is no block",
        "model.norm.weight: is no block",
        "self_attn.q_proj.orth.lora_A.weight: is no block",
        "share_experts.lora_A.weight: shape (3, 16) does not fit r = 2",
        "bank 'noise': top_k is 2, but the adapter's is 1",
    )
    # The shared block's shape is wrong for its bank, too.
    assert len(lines) == 11


def test_another_base(tmp_path, rng):
    wide = {k: np.concatenate([x, x], -1) for k, x in expert_tensors(rng).items()}
    lora = {k: np.concatenate([x, x], -1) for k, x in attention_tensors(rng).items()}
    lines = refused(
        write(tmp_path / "a", lora, wide),
        {k: v for k, v in STAGE_1.items() if k != "knowledge"},
        "not an adapter that fits this base",
        "q_proj.lora_A.weight: shape (2, 32), expected (2, 16)",
        "gate_proj.experts.3.lora_A_3.weight: shape (2, 32)",
    )
    assert len(lines) > 8 * L * E


def test_groups_and_banks_that_do_not_meet(tmp_path, rng):
    lora, experts = attention_tensors(rng), expert_tensors(rng)
    shared = block_tensors(rng, "share_experts")
    folder = write(tmp_path / "a", lora, experts)
    assert refused(folder, STAGE_1) == [
        "  bank 'knowledge': nothing in the directory for mlp.gate, mlp.up, mlp.down"
    ]
    refused(folder, {"noise": (NOISE, "train")}, "group 'lora': no bank of the stage takes it on")
    refused(
        write(tmp_path / "b", lora, experts | shared),
        {k: v for k, v in STAGE_1.items() if k != "knowledge"},
        "group 'shared': no bank of the stage takes it on mlp.down",
    )
    folder = write(tmp_path / "c", lora)
    refused(folder, STAGE_1, "bank 'noise': nothing in the directory for", "bank 'knowledge'")
    refused(folder, STAGE_2, "group 'lora': no bank of the stage takes it on attn.q")
    both = {"attention": (ATTN_BANK.replace(sites=("attn.q", "mlp.up")), "frozen")}
    refused(folder, both, "bank 'attention': nothing in the directory for mlp.up")
    short = {"attention": (ATTN_BANK.replace(stop=2), "train")}
    refused(folder, short, "lora_a of attn.q, layer 2, expert 0: bank 'attention' has no place")
    scaled = {"attention": (ATTN_BANK.replace(learned_scale=True), "train")}
    refused(folder, scaled, "bank 'attention': scale of attn.k, layer 0, expert 0 is missing")
    several = {"attention": (ATTN_BANK.replace(experts=2), "train")}
    refused(folder, several, "bank 'attention': lora_a of attn.k, layer 0, expert 1 is missing")
    wider = {"attention": (ATTN_BANK.replace(rank=3), "train")}
    refused(folder, wider, "shape (2, 16), bank 'attention' (rank 3, 1 experts) asks for (3, 16)")
    one = {"noise": (NOISE.replace(renormalise=False, router_bias=False), "train")}
    refused(
        write(tmp_path / "d", pickled=experts),
        one,
        "bank 'noise': renormalise is False",
        "switch.bias: bank 'noise' has no place for it",
    )


def test_damaged_files(tmp_path, rng):
    lora, experts = attention_tensors(rng), expert_tensors(rng)
    roster = {k: v for k, v in STAGE_1.items() if k != "knowledge"}
    folder = write(tmp_path / "a", lora, experts)
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    lines = refused(folder, roster, "adapter_model.safetensors: truncated or damaged",
                    "non_lora_trainables.bin: not a whole torch zip file")  # fmt: skip
    assert not any("nothing in the directory" in line for line in lines)
    folder = write(tmp_path / "b", tensors=block_tensors(rng, "orth", ""))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    refused(folder, STAGE_2, "model.safetensors: truncated or damaged")
    folder = write(tmp_path / "c", pickled=experts, r=0)
    with pytest.raises(UserError, match="r is 0 and lora_alpha 4; give two numbers"):
        read(folder, roster)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json: expected a JSON object"):
        read(folder, roster)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        read(folder, roster)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match="holds none of"):
        read(folder, roster)
