"""`medmoe import` of a whole model with mixtures of feed-forward experts, written by hand.

The names and the layout of the tensors are spelt out here once more, by themselves.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import apollo_moe
from medmoe_jax.checkpoints.fingerprint import file_fingerprint
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.upcycled import holds_experts
from medmoe_jax.errors import UserError
from medmoe_jax.training.imports import import_stage
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import load_final, open_trained
from tests import tiny

D, F, V, E = 16, 24, 304, 4  # of tiny.DECODER: the first layer dense, the second a mixture
KERNELS = {"q": (16, D), "k": (8, D), "v": (8, D), "o": (D, 16)}
NETWORK = {"gate": (F, D), "up": (F, D), "down": (D, F)}
FIELDS = {
    "model_type": "upcycling-qwen2-moe",
    "num_experts": E,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "mlp_only_layers": [0],
}
MESH = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}


def shapes():
    out = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in (0, 1):
        at = f"model.layers.{i}"
        out |= {f"{at}.self_attn.{x}_proj.weight": shape for x, shape in KERNELS.items()}
        out |= {f"{at}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    out |= {f"model.layers.0.mlp.{x}_proj.weight": shape for x, shape in NETWORK.items()}
    out["model.layers.1.mlp.gate.weight"] = (E, D)
    for e in range(E):
        at = f"model.layers.1.mlp.experts.{e}"
        out |= {f"{at}.{x}_proj.weight": shape for x, shape in NETWORK.items()}
    return out


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes().items()}


def write(folder, tensors, shards=3, **fields):
    folder.mkdir()
    config = json.loads((tiny.base_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **FIELDS, **fields}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: x for k, x in tensors.items() if files[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def config(**bank):
    """The recipe of configs/apollo_moe.py on the tiny base, with experts in the last layer."""
    out = tiny.medcare_config()
    for name in out.stages.order:
        del out.stages[name]
    out.stages.order = ("mixture",)
    out.stages.mixture = apollo_moe.language_experts(
        E, (-1, None), "ffn", mixture={"knowledge": 1.0}
    )
    out.stages.mixture.banks.experts.update({"forcing": "off", **bank})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_in_its_place(tmp_path, tensors, shards):
    """And the dense network that the experts replace stays what it was."""
    recipe = config()
    recipe.run.mesh.update(MESH)
    setup, folder = open_setup(recipe), write(tmp_path / "a", tensors, shards)
    assert import_stage(Run(setup, tmp_path / "w"), folder) == "mixture"
    final = load_final(Run(setup, tmp_path / "w").stage("mixture"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(final))
    bank, base = jax.device_get((final["banks"]["experts"], final["base"]))
    before = jax.device_get(setup.load_base())
    want = {"embed": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    got = {f"{name}.weight": base[leaf] for leaf, name in want.items()}
    for i in (0, 1):
        at, layers = f"model.layers.{i}", base["layers"]
        for x in KERNELS:
            got[f"{at}.self_attn.{x}_proj.weight"] = layers["attn"][x]["kernel"][i].T
        got[f"{at}.input_layernorm.weight"] = layers["attn_norm"][i]
        got[f"{at}.post_attention_layernorm.weight"] = layers["mlp_norm"][i]
    for x in NETWORK:
        kernels = layers["mlp"][x]["kernel"]
        got[f"model.layers.0.mlp.{x}_proj.weight"] = kernels[0].T
        np.testing.assert_array_equal(kernels[1], before["layers"]["mlp"][x]["kernel"][1])
        for e in range(E):
            name = f"model.layers.1.mlp.experts.{e}.{x}_proj.weight"
            got[name] = bank[f"mlp.{x}"]["experts"][0, e].T
    got["model.layers.1.mlp.gate.weight"] = bank["mlp"]["router"]["kernel"][0].T
    assert set(got) == set(tensors) and set(bank) == {"mlp", "mlp.gate", "mlp.up", "mlp.down"}
    for name, value in tensors.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    opened = open_trained(Run(setup, tmp_path / "w"), "mixture")
    jax.tree.map(np.testing.assert_array_equal, opened.whole, base)
    done = Manifest.read(StageFolder.of(tmp_path / "w", "mixture").manifest).operations[-1]
    assert done["groups"] == {"experts": {"banks": ["experts"]}}
    assert done["files"] == {file.name: file_fingerprint(file) for file in folder.iterdir()}


def test_recognised_by_its_tensors(tmp_path, tensors):
    dense = {k: x for k, x in tensors.items() if ".experts." not in k}
    lora = {"base_model.model.model.layers.1.mlp.up_proj.experts.0.lora_A_0.weight": np.ones(2)}
    for i, (content, answer) in enumerate(((tensors, True), (dense, False), (lora, False))):
        for shards in (1, 2):
            assert holds_experts(write(tmp_path / f"{i}-{shards}", content, shards)) is answer


def refused(tmp_path, recipe, folder):
    """The message, with nothing written."""
    with pytest.raises(UserError) as error:
        import_stage(Run(open_setup(recipe), tmp_path / "w"), folder)
    assert not (tmp_path / "w").exists()
    return str(error.value)


def test_all_fields_that_disagree_are_named(tmp_path, tensors):
    other = {"num_experts": 7, "num_experts_per_tok": 1, "mlp_only_layers": [], "rope_theta": 5e4}
    folder = write(tmp_path / "a", tensors, **other)
    recipe = config(renormalise=True, router_bias=True)
    recipe.stages.mixture.train_base = ("embed", "head", "*norm", "layers.attn.*")
    text = refused(tmp_path, recipe, folder)
    for words in (
        "config.json: num_experts is 7, bank 'experts'.experts is 4",
        "config.json: num_experts_per_tok is 1, bank 'experts'.top_k is 2",
        "config.json: norm_topk_prob is False, bank 'experts'.renormalise is True",
        "mlp_only_layers is [], but bank 'experts' sits on layers 1 to 1 and leaves [0]",
        "bank 'experts'.router_bias is True, but the checkpoint's routers have no bias",
        "config.json: rope_theta is 50000.0, the base's is 10000.0",
        "its own layers.mlp.down.kernel, layers.mlp.gate.kernel, layers.mlp.up.kernel, which the "
        "stage does not train: set its train_base=('*',)",
        "nothing was imported",
    ):
        assert words in text
    assert len(text.splitlines()) == 8


def test_all_tensors_that_do_not_fit_are_named(tmp_path, tensors):
    missing, misshapen = (
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
    )
    extra = ("model.layers.1.mlp.shared_expert_gate.weight", "model.layers.1.mlp.up_proj.weight")
    changed = {k: x for k, x in tensors.items() if k != missing}
    changed |= {misshapen: np.ones((3, D), np.float32), **dict.fromkeys(extra, np.ones(2))}
    text = refused(tmp_path, config(), write(tmp_path / "a", changed))
    assert "4 problems" in text
    assert f"{missing}: missing" in text
    assert f"{misshapen}: shape (3, 16), config.json asks for (4, 16)" in text
    assert all(f"{name}: unknown to this architecture" in text for name in extra)


def test_a_stage_for_other_banks(tmp_path, tensors):
    recipe, folder = tiny.medcare_config(), write(tmp_path / "a", tensors)
    text = refused(tmp_path, recipe, folder)
    assert "one bank with form='ffn' takes them, and the stage has 0" in text
    for name in recipe.stages.aggregate.banks:
        assert f"bank '{name}': the stage trains it, but nothing in the directory is it" in text
