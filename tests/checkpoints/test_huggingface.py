"""Hugging Face checkpoints written by hand: every tensor's place, sharding, memory and errors."""

import functools
import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from medmoe_jax.base import decoder, quantised, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import bases, files, huggingface, placing
from medmoe_jax.checkpoints.safetensors_files import StoredTensor
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import BASE_RULES, shardings
from tests.stored import save_by_hand

D, F, L, H, K, h, V = 16, 24, 3, 4, 2, 8, 40
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": h,
    "max_position_embeddings": 64,
}
PHI3 = {**QWEN2, "model_type": "phi3"}


def qwen2_tensors(rng, width=D, inner=F, vocab=V, layers=L):
    """A Qwen2 checkpoint's tensors, named and shaped as its authors publish them."""
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj.weight": (H * h, width),
            "self_attn.q_proj.bias": (H * h,),
            "self_attn.k_proj.weight": (K * h, width),
            "self_attn.k_proj.bias": (K * h,),
            "self_attn.v_proj.weight": (K * h, width),
            "self_attn.v_proj.bias": (K * h,),
            "self_attn.o_proj.weight": (width, H * h),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, config, tensors, shards=3, store=save_file):
    """A checkpoint folder; with `shards` > 1 an index and that many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "m.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        store(part, folder / file)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.fixture
def tensors():
    return qwen2_tensors(np.random.default_rng(0))


def leaf_by_hand(tensors, path):
    """What our leaf must be, written out once more and independently of the table."""
    top = {"embed": "embed_tokens", "final_norm": "norm"}
    if path == "head":
        return tensors["lm_head.weight"]
    if path in top:
        return tensors[f"model.{top[path]}.weight"]
    name = path.removeprefix("layers.")
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if name in norms:
        return np.stack([tensors[f"model.layers.{i}.{norms[name]}.weight"] for i in range(L)])
    block, letter, kind = name.split(".")
    block = {"attn": "self_attn", "mlp": "mlp"}[block]
    kind = {"kernel": "weight", "bias": "bias"}[kind]
    rows = [tensors[f"model.layers.{i}.{block}.{letter}_proj.{kind}"] for i in range(L)]
    return np.stack([x.T for x in rows])


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_in_its_place(tmp_path, tensors, shards):
    write(tmp_path, QWEN2, tensors, shards)
    config, params = huggingface.load(tmp_path, jnp.float32)
    assert config == huggingface.read_config(tmp_path)
    shapes = jax.tree.map(lambda s: s.shape, decoder.abstract(config))
    assert jax.tree.map(jnp.shape, params) == shapes
    for path, leaf in trees.flatten(params):
        np.testing.assert_array_equal(leaf, leaf_by_hand(tensors, path), err_msg=path)


def test_fused_projections_are_split(tmp_path, tensors):
    fused = {k: v for k, v in tensors.items() if "bias" not in k}
    for i in range(L):
        layer = f"model.layers.{i}."
        for block, names, one in [
            ("self_attn", "qkv", "qkv_proj"),
            ("mlp", ("gate", "up"), "gate_up_proj"),
        ]:
            rows = [fused.pop(f"{layer}{block}.{name}_proj.weight") for name in names]
            fused[f"{layer}{block}.{one}.weight"] = np.concatenate(rows)
    write(tmp_path, PHI3, fused)
    _, params = huggingface.load(tmp_path, jnp.float32)
    for path, leaf in trees.flatten(params):
        np.testing.assert_array_equal(leaf, leaf_by_hand(tensors, path), err_msg=path)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_rounded_once(tmp_path, tensors, stored, wanted):
    tensors = {name: x.astype(stored) for name, x in tensors.items()}
    write(tmp_path, QWEN2, tensors)
    _, params = huggingface.load(tmp_path, wanted)
    for path, leaf in trees.flatten(params):
        assert leaf.dtype == wanted
        np.testing.assert_array_equal(leaf, leaf_by_hand(tensors, path).astype(wanted))


@pytest.mark.parametrize("stored", ["float64", "float8_e4m3fn", "float8_e5m2"])
def test_floats_of_every_width_are_read(tmp_path, tensors, stored):
    """Doubles and bytes, in whole and by the rows of shards."""
    tensors = {name: x.astype(stored) for name, x in tensors.items()}
    write(tmp_path, QWEN2, tensors, store=save_by_hand)
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    wanted = shardings(decoder.abstract(huggingface.read_config(tmp_path)), mesh, BASE_RULES)
    for where in (None, wanted):
        _, params = huggingface.load(tmp_path, jnp.float32, where)
        for path, leaf in trees.flatten(params):
            want = leaf_by_hand(tensors, path).astype(np.float32)
            np.testing.assert_array_equal(leaf, want, err_msg=path)


def test_names_without_the_models_prefix(tmp_path, tensors):
    """As the class without a head saves them; a tied head is then not there at all."""
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    write(tmp_path, QWEN2, bare)
    _, params = huggingface.load(tmp_path, jnp.float32)
    for path, leaf in trees.flatten(params):
        np.testing.assert_array_equal(leaf, leaf_by_hand(tensors, path), err_msg=path)
    del bare["lm_head.weight"]
    write(tmp_path, QWEN2, bare)
    assert "1 problems\n  lm_head.weight: missing" in broken(tmp_path, "problems")
    write(tmp_path, {**QWEN2, "tie_word_embeddings": True}, bare)
    assert "head" not in huggingface.load(tmp_path, jnp.float32)[1]


def test_a_whole_file_comes_before_an_index_that_does_not_name_it(tmp_path, tensors):
    write(tmp_path, QWEN2, {name: 2 * x for name, x in tensors.items()}, shards=2)
    save_file(tensors, tmp_path / "model.safetensors")
    _, params = huggingface.load(tmp_path, jnp.float32)
    np.testing.assert_array_equal(params["final_norm"], tensors["model.norm.weight"])


def test_leaves_are_born_in_their_shardings(tmp_path, tensors):
    write(tmp_path, QWEN2, tensors)
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    config = huggingface.read_config(tmp_path)
    wanted = shardings(decoder.abstract(config), mesh, BASE_RULES)
    _, params = huggingface.load(tmp_path, jnp.float32, wanted)
    gate = params["layers"]["mlp"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (L, D // 4, F // 2)
    for path, leaf in trees.flatten(params):
        assert leaf.sharding == trees.get(wanted, path), path
        np.testing.assert_array_equal(leaf, leaf_by_hand(tensors, path), err_msg=path)


def test_a_sharding_over_layers_works_too(tmp_path, tensors):
    write(tmp_path, {**QWEN2, "num_hidden_layers": 2}, qwen2_tensors_of(tensors, layers=2))
    mesh = make_mesh({"data": 2, "fsdp": 4, "expert": 1, "tensor": 1})
    config = huggingface.read_config(tmp_path)
    wanted = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec("data" if leaf.shape[0] == 2 else None)),
        decoder.abstract(config),
    )
    _, params = huggingface.load(tmp_path, jnp.float32, wanted)
    down = params["layers"]["mlp"]["down"]["kernel"]
    assert down.addressable_shards[0].data.shape == (1, F, D)
    np.testing.assert_array_equal(down, leaf_by_hand(tensors, "layers.mlp.down.kernel")[:2])


MESHES = {
    "one": None,
    "fsdp": {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1},
    "both": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    ("kind", "mesh"), [("int8", "one"), ("nf4", "one"), ("int8", "fsdp"), ("nf4", "both")]
)
def test_kernels_are_quantised_as_they_stream(tmp_path, monkeypatch, kind, mesh):
    """The same bits as quantising the float base, in the shardings asked for."""
    inner = 150  # no multiple of the 64 rows of a block
    tensors = qwen2_tensors(np.random.default_rng(0), inner=inner)
    write(tmp_path, {**QWEN2, "intermediate_size": inner}, tensors)
    base = bases.open_base(str(tmp_path), "", {}, 0, kind)
    floats = huggingface.load(tmp_path, jnp.float32)[1]
    want = jax.jit(functools.partial(quantised.quantise, kind=kind))(floats)
    wanted = None
    if MESHES[mesh]:
        wanted = shardings(base.abstract(jnp.float32), make_mesh(MESHES[mesh]), BASE_RULES)
    seen = []
    to_devices = placing._to_devices
    monkeypatch.setattr(
        placing, "_to_devices", lambda *args: seen.append(args[0]) or to_devices(*args)
    )
    params = base.load(jnp.float32, wanted)
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    # One layer at a time: no stack of floats was ever there.
    assert seen.count((inner, D)) == 2 * L and not any(s[:1] == (L,) for s in seen if len(s) > 2)
    if wanted is not None:
        jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding}"), params, wanted)


@pytest.mark.parametrize("mesh", MESHES)
def test_large_tensors_come_in_pieces_of_rows(tmp_path, monkeypatch, mesh):
    tensors = qwen2_tensors(np.random.default_rng(0), vocab=44)
    write(tmp_path, {**QWEN2, "vocab_size": 44}, tensors)
    wanted = None
    if MESHES[mesh]:
        abstract = decoder.abstract(huggingface.read_config(tmp_path))
        wanted = shardings(abstract, make_mesh(MESHES[mesh]), BASE_RULES)
    monkeypatch.setattr(placing, "_PIECE_BYTES", 10 * D * 4)
    sizes = {"embed": [], "head": []}
    read = StoredTensor.rows

    def watched(stored, part, index):
        rows = read(stored, part, index)
        sizes.get(part.path, []).append(rows.nbytes)
        return rows

    monkeypatch.setattr(StoredTensor, "rows", watched)
    _, params = huggingface.load(tmp_path, jnp.float32, wanted)
    for name in sizes:
        np.testing.assert_array_equal(params[name], leaf_by_hand(tensors, name))
        # 44 rows in pieces of ten and a rest, or of five in each half.
        assert len(sizes[name]) >= 5 and max(sizes[name]) <= 10 * D * 4


def qwen2_tensors_of(tensors, layers):
    return {k: v for k, v in tensors.items() if not any(f".{i}." in k for i in range(layers, L))}


def test_the_host_never_holds_the_model(tmp_path):
    config = {**QWEN2, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    tensors = qwen2_tensors(np.random.default_rng(0), width=256, inner=512, vocab=64, layers=12)
    write(tmp_path, {**config, "vocab_size": 64}, tensors)
    model, largest = sum(x.nbytes for x in tensors.values()), 256 * 512 * 4
    del tensors
    huggingface.load(tmp_path, jnp.float32)  # compilation happens here
    tracemalloc.start()
    huggingface.load(tmp_path, jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model > 30 * largest
    assert largest < peak < 6 * largest


def broken(tmp_path, message):
    with pytest.raises(UserError, match=message) as error:
        huggingface.load(tmp_path, jnp.float32)
    return str(error.value)


def test_all_problems_are_listed_at_once(tmp_path, tensors):
    files = write(tmp_path, QWEN2, tensors, shards=4)
    absent, torn, *_ = sorted(set(files.values()))
    torn_name = next(name for name, file in files.items() if file == torn)
    intact = [name for name, file in sorted(files.items()) if file not in (absent, torn)]
    missing, misshapen, whole = intact[:3]
    whole_shape = tensors[whole].shape
    changes = {
        missing: {missing: None},
        misshapen: {misshapen: np.zeros((3, 5), np.float32)},
        whole: {whole: np.ones(whole_shape, np.int32), "extra.w": np.ones(3, np.float32)},
    }
    for name, change in changes.items():
        part = load_file(tmp_path / files[name]) | change
        part = {key: x for key, x in part.items() if x is not None}
        save_file(part, tmp_path / files[name])
    (tmp_path / absent).unlink()
    (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:-7])
    text = broken(tmp_path, "6 problems")
    assert f"{absent}: missing" in text
    assert f"{torn}: truncated or damaged" in text
    assert f"{missing}: missing" in text
    assert f"{misshapen}: shape (3, 5), config.json asks for {tensors[misshapen].shape}" in text
    assert f"{whole}: dtype I32" in text
    assert "extra.w: unknown to this architecture" in text
    assert torn_name not in text  # its file is named already


def test_nothing_is_loaded_from_a_broken_checkpoint(tmp_path, tensors, monkeypatch):
    write(tmp_path, QWEN2, {k: v for k, v in tensors.items() if k != "model.norm.weight"})
    monkeypatch.setattr(huggingface, "fill_all", lambda *_: pytest.fail("something was loaded"))
    broken(tmp_path, r"model\.norm\.weight: missing")


def test_a_head_beside_a_tied_embedding(tmp_path, tensors):
    tied = {**QWEN2, "tie_word_embeddings": True}
    write(tmp_path, tied, tensors)
    broken(tmp_path, r"lm_head\.weight: differs from model\.embed_tokens\.weight, but tie_word")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tied, tensors)
    assert "head" not in huggingface.load(tmp_path, jnp.float32)[1]


def test_a_tied_embedding_by_the_name_of_the_head(tmp_path, tensors):
    """As tools write it that keep one name of a tensor that has two."""
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors["lm_head.weight"] = embedding
    write(tmp_path, {**QWEN2, "tie_word_embeddings": True}, tensors)
    config, params = huggingface.load(tmp_path, jnp.float32)
    assert config.tied and "head" not in params
    np.testing.assert_array_equal(params["embed"], embedding)
    write(tmp_path, QWEN2, tensors)
    broken(tmp_path, r"1 problems\s+model\.embed_tokens\.weight: missing")


def test_old_rotary_tables_are_ignored(tmp_path, tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(h // 2, np.float32)
    write(tmp_path, QWEN2, tensors)
    huggingface.load(tmp_path)


def test_folders_without_weights(tmp_path, tensors):
    with pytest.raises(UserError, match="no such folder"):
        huggingface.load(tmp_path / "absent")
    broken(tmp_path, r"config\.json: no such file")
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    broken(tmp_path, "no safetensors file")
    write(tmp_path, QWEN2, tensors)
    os.remove(tmp_path / "model.safetensors.index.json")
    broken(tmp_path, r"3 safetensors files but no model\.safetensors\.index\.json")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    broken(tmp_path, "has no 'weight_map'")
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, "model_type": "mamba"}))
    broken(tmp_path, r"config\.json: model_type: 'mamba' is none of gemma2, gemma3")


def test_a_model_of_the_hub_comes_from_its_cache(tmp_path, tensors, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0" * 40
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    write(snapshot, QWEN2, tensors)
    assert huggingface.locate("hf://org/name") == snapshot
    assert huggingface.locate(f"hf://org/name@{revision}") == snapshot
    assert huggingface.read_config("hf://org/name").d_model == D
    for name in ("hf://org/other", "hf://org/name@v1"):
        with pytest.raises(UserError, match=f"{name}: is not in the hub's cache, and HF_HUB_OFF"):
            huggingface.locate(name)
    with pytest.raises(UserError, match="hf://not a name"):
        huggingface.locate("hf://not a name")


def test_of_a_model_of_the_hub_its_own_files_are_fetched_once(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    mine = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    mine += ["tokenizer.model", "additional_chat_templates/tool_use.jinja", "LICENSE.txt"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"]
    others += ["checkpoint-9/model.safetensors", "pytorch_model.bin", "original/params.pth"]
    fetched = []

    def download(name, allow_patterns, ignore_patterns=None, **_):
        chosen = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched.extend(filter_repo_objects([*mine, *others], **chosen))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert huggingface.locate("hf://org/name") == tmp_path
    assert fetched == mine


@pytest.fixture
def model():
    config = DecoderConfig(
        vocab_size=V,
        d_model=D,
        n_layers=L,
        n_heads=H,
        n_kv_heads=K,
        head_dim=h,
        d_ff=F,
        qkv_bias=True,
        max_positions=64,
    )
    rng = np.random.default_rng(1)
    leaves = decoder.shapes(config).items()
    return config, trees.unflatten(
        (path, rng.normal(size=shape).astype(ml_dtypes.bfloat16)) for path, shape in leaves
    )


def test_saving_and_loading_gives_the_same_bits(tmp_path, model):
    config, params = model
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    params = jax.device_put(params, shardings(params, mesh, BASE_RULES))
    folder = huggingface.save_hf(
        tmp_path / "out", config, params, "qwen2", extra={"eos_token_id": 7}, max_shard_bytes=5000
    )
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert all(file.stat().st_size < 5000 + 4000 for file in files)
    read, back = huggingface.load(folder, jnp.bfloat16)
    assert read == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    hf = json.loads((folder / "config.json").read_text())
    assert (hf["eos_token_id"], hf["torch_dtype"]) == (7, "bfloat16")


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match=r"out: cannot be written, .*No space left on device"):
        huggingface.save_hf(tmp_path / "out", *model, "qwen2")
    assert not list(tmp_path.iterdir())


def test_saving_refuses_a_full_folder_and_a_wrong_family(tmp_path, model):
    (tmp_path / "out").mkdir()
    huggingface.save_hf(tmp_path / "out", *model, "qwen2")
    with pytest.raises(UserError, match="is there already"):
        huggingface.save_hf(tmp_path / "out", *model, "qwen2")
    with pytest.raises(UserError, match=r"'llama' model cannot express .*: o_bias: False would"):
        huggingface.save_hf(tmp_path / "other", *model, "llama")
    with pytest.raises(UserError, match="model_type: 'bert' is none of"):
        huggingface.save_hf(tmp_path / "other", *model, "bert")
    assert not (tmp_path / "other").exists()


def test_where_a_model_is_published(tmp_path, monkeypatch):
    """From its own name or its place in the Hub's cache; config.json may name another model."""
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--org--a-name" / "snapshots" / "abc123"
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({"_name_or_path": "org/parent"}))
    for source, want in {
        "hf://org/name": ("org/name", ""),
        "hf://org/name@main": ("org/name", "main"),
        str(cached): ("org/a-name", "abc123"),
        "tuned": ("tuned", ""),
        "model.gguf": ("model.gguf", ""),
        "": ("", ""),
    }.items():
        assert huggingface.published(source) == want, source


def test_a_written_config_names_no_other_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, "_name_or_path": "org/parent"}))
    _, config = huggingface.describe(tmp_path)
    assert huggingface.settings(config, "qwen2", tmp_path) == QWEN2
