"""`medmoe export` against a float64 forward pass with the banks beside the base as it was."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import quantised, trees
from medmoe_jax.checkpoints import files, gguf_models, huggingface, peft
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.checkpoints.gguf_file import open_gguf
from medmoe_jax.checkpoints.released import read_adapter
from medmoe_jax.checkpoints.released_export import save_released
from medmoe_jax.cli import export
from medmoe_jax.cli.main import main
from medmoe_jax.data import tokenizers
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.templates import load_template
from medmoe_jax.errors import UserError
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny, upload_hub
from tests.randomised import randomise

CONFIG = """from tests import tiny

def get_config():
    config = tiny.medcare_config()
    {}
    return config
"""
# What the tiny stage `align` adds to the base, merged or not.
BANKS = ("attention", "knowledge", "alignment")
FFN = ("mlp.gate", "mlp.up", "mlp.down")


def write_config(folder, *lines):
    """`--config=` of the tiny recipe, changed by some lines."""
    file = folder / "recipe.py"
    file.write_text(CONFIG.format("\n    ".join(lines) or "pass"))
    return f"--config={file}"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return randomise(tiny.trained()[1], tmp_path_factory.mktemp("run") / "w", size=0.5)


@pytest.fixture(scope="module")
def reference(workdir):
    """`logits(banks, scales)` in float64 with some of the banks, on the original base."""
    setup, _ = tiny.trained()
    trained = open_trained(Run(setup, workdir), "align")
    base, batch = naive.f64(setup.load_base()), naive.random_batch(setup.base.config)
    specs = {name: spec for name, (spec, _) in trained.roster.items()}

    @functools.cache
    def logits(names, doubled=""):
        chosen = tuple(specs[name] for name in names)
        scales = {doubled: 2 * specs[doubled].s} if doubled else None
        linear = naive.adapted(chosen, trained.banks, scales)
        return used(naive.logits(setup.base.config, base, batch, linear))

    return logits


def used(logits):
    """Without the padding of the vocabulary, which an exported model has no mark for."""
    return logits[..., : tiny.tokenizer().vocab_size]


def run(config, workdir, kind, output, *options):
    arguments = (f"--workdir={workdir}", f"--format={kind}", f"--output={output}", *options)
    return main(["export", config, *arguments])


def fails(capsys, *arguments, status=1):
    capsys.readouterr()
    assert run(*arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("medmoe export: error: ") and error.count("\n") == 1, error
    return error


def logits_of(folder):
    """Float64 logits of an exported model, on the batch of `reference`."""
    config, params = huggingface.load(folder, jnp.float32)
    batch = naive.random_batch(tiny.trained()[0].base.config)
    return used(naive.logits(config, naive.f64(params), batch))


def gguf_logits(folder):
    """Float64 logits of the model in a GGUF file."""
    config, params = gguf_models.load(folder / "model.gguf", jnp.float32)
    batch = naive.random_batch(tiny.trained()[0].base.config)
    return used(naive.logits(config, naive.f64(params), batch))


def adapted_logits(folder):
    """Float64 logits of the original base under an exported adapter."""
    setup, _ = tiny.trained()
    config, base = setup.base.config, setup.load_base
    spec, params, *_ = peft.read_peft(folder, config, "llama", "adapter", base)
    linear = naive.adapted((spec,), {"adapter": params})
    base, batch = naive.f64(setup.load_base()), naive.random_batch(setup.base.config)
    return used(naive.logits(setup.base.config, base, batch, linear))


LOGITS = {"hf": logits_of, "peft": adapted_logits, "gguf": gguf_logits}


@pytest.mark.parametrize("kind", LOGITS)
def test_an_export_computes_what_the_banks_did(config, workdir, reference, kind, tmp_path, capsys):
    assert run(config, workdir, kind, tmp_path / "deep" / "out") == 0
    assert f"written to {tmp_path}" in capsys.readouterr().out
    got = LOGITS[kind](tmp_path / "deep" / "out")
    assert naive.rel(got, reference(BANKS)) <= 1e-5
    assert naive.rel(got, reference(())) >= 0.1
    for name in BANKS:
        without = tuple(other for other in BANKS if other != name)
        assert naive.rel(got, reference(without)) >= 0.02, f"{name} is not seen"
        assert naive.rel(got, reference(BANKS, name)) >= 0.02, f"the scale of {name} is not seen"


PROMPTING = {
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def test_what_stands_beside_the_weights(config, workdir, tmp_path, capsys):
    assert run(config, workdir, "hf", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", *PROMPTING}
    source = json.loads((tiny.base_path() / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source
    tokenizer = tiny.tokenizer()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == tuple(generation[f"{key}_token_id"] for key in ("bos", "eos", "pad"))
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    turns = [{"role": "user", "content": "q"}]
    assert Jinja(template, tokenizer.names).render(turns, (), True) == "<s>User:q\nAssistant:"
    assert run(config, workdir, "peft", tmp_path / "adapter") == 0
    said = capsys.readouterr().err
    assert "other ids" not in said
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank <= 8 and f"rank {rank}; vLLM needs --enable-lora --max-lora-rank=8" in said
    for name in PROMPTING:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    modes = {(tmp_path / "out" / name).stat().st_mode for name in names}
    assert len(modes) == 1  # whoever may read one file may read all


def test_a_base_that_was_fine_tuned_is_not_its_parent(workdir, tmp_path):
    """`_name_or_path` of config.json is what a model was loaded from before it was trained."""
    base = shutil.copytree(tiny.base_path(), tmp_path / "tuned")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "_name_or_path": "org/parent"}))
    config = write_config(tmp_path, f"config.base.path = {str(base)!r}")
    for kind in ("hf", "peft"):
        assert run(config, workdir, kind, tmp_path / kind) == 0
        assert "org/parent" not in (tmp_path / kind / "README.md").read_text()
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == fields
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)


def test_what_stands_in_a_gguf_file(config, workdir, tmp_path, capsys):
    """A base like any other, which asks as the model was trained to be asked."""
    assert run(config, workdir, "gguf", tmp_path / "out", "--dtype=q8_0") == 0
    printed = capsys.readouterr()
    assert "other ids" not in printed.err and "Ollama" not in printed.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "model.gguf", "Modelfile")
    }
    base = open_base(str(tmp_path / "out" / "model.gguf"), "", {}, 0)
    tokenizer = tokenizers.load(base.tokenizer)
    encoder, trained = (
        Encoder(tokenizer, load_template("tokenizer", tokenizer)),
        tiny.trained()[0].encoder,
    )
    turns = [{"role": "user", "content": "What is a fever?"}]
    assert encoder.prompt(turns) == trained.prompt(turns)
    assert set(encoder.stops.ids) == set(trained.stops.ids)
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert (
        modelfile.startswith('FROM ./model.gguf\nTEMPLATE """') and 'stop """</s>"""' in modelfile
    )


def test_what_stands_beside_a_gguf_adapter(config, workdir, tmp_path):
    assert run(config, workdir, "gguf-adapter", tmp_path / "out") == 0
    assert run(config, workdir, "peft", tmp_path / "peft") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter.gguf", "chat_template.jinja"}
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(open_gguf(tmp_path / "out" / "adapter.gguf").tensors) == len(stored)


def test_an_export_is_uploaded_whole(config, workdir, tmp_path, capsys, monkeypatch):
    options = ("--push=org/name", "--private")
    with upload_hub.serving(monkeypatch) as hub:
        assert run(config, workdir, "peft", tmp_path / "out", *options) == 0
    assert "uploaded to http://127.0.0.1" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.made["org/name"]["visibility"] == "private"


def test_an_export_that_cannot_be_uploaded_is_whole(
    config, workdir, reference, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert run(config, workdir, "peft", tmp_path / "out", "--push=org/name") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "org/name: not uploaded: " in error and f"hf upload org/name {tmp_path / 'out'}" in error
    assert naive.rel(adapted_logits(tmp_path / "out"), reference(BANKS)) <= 1e-5
    for options, words in ((["--push=name"], "write org/name"), (["--private"], "give that too")):
        assert words in fails(capsys, config, workdir, "peft", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_each_format_has_its_dtypes(config, workdir, tmp_path, capsys):
    for kind in ("hf", "peft"):
        error = fails(capsys, config, workdir, kind, tmp_path / "out", "--dtype=q8_0")
        assert f"--dtype=q8_0: --format={kind} writes float32, bfloat16" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_a_sharded_model_gives_the_same_files(config, workdir, kind, tmp_path):
    for name, sizes in {"one": (8, 1, 1), "many": (1, 4, 2)}.items():
        axes = zip(("data", "fsdp", "tensor"), sizes, strict=True)
        mesh = [f"--config.run.mesh.{axis}={size}" for axis, size in axes]
        assert run(config, workdir, kind, tmp_path / name, *mesh) == 0
    one, many = (next((tmp_path / n).glob("*.safetensors")) for n in ("one", "many"))
    one, many = load_file(one), load_file(many)
    assert one.keys() == many.keys()
    for name, x in one.items():
        np.testing.assert_allclose(many[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_bfloat16_is_one_rounding(config, workdir, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert run(config, workdir, "hf", tmp_path / dtype, f"--dtype={dtype}") == 0
    full = load_file(tmp_path / "float32" / "model.safetensors")
    half = load_file(tmp_path / "bfloat16" / "model.safetensors")
    for name, x in full.items():
        np.testing.assert_array_equal(half[name], x.astype(ml_dtypes.bfloat16), err_msg=name)
    written = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"


def test_a_bank_that_looks_at_tokens_must_be_left_out(config, workdir, reference, tmp_path, capsys):
    for kind in LOGITS:
        error = fails(capsys, config, workdir, kind, tmp_path / "out", "--stage=aggregate")
        assert "bank 'noise' has gate 'token'" in error and "--off=noise leaves it out" in error
        output = tmp_path / kind
        assert run(config, workdir, kind, output, "--stage=aggregate", "--off=noise") == 0
        got = LOGITS[kind](output)
        assert naive.rel(got, reference(("attention", "knowledge"))) <= 1e-5
    assert not (tmp_path / "out").exists()
    error = fails(capsys, config, workdir, "hf", tmp_path / "out", "--off=attention")
    assert "bank 'attention' is merged into the base" in error
    error = fails(capsys, config, workdir, "peft", tmp_path / "out", "--stage=base")
    assert "there is no bank to write" in error


def test_a_bank_that_looks_at_tokens_has_a_format(config, workdir, tmp_path, capsys):
    """Read back, the stage's banks are what they were."""
    options = ("--stage=aggregate", "--off=knowledge")
    assert run(config, workdir, "ming", tmp_path / "out", *options) == 0
    setup, _ = tiny.trained()
    trained = open_trained(Run(setup, workdir), "aggregate")
    banks = {name: trained.roster[name] for name in ("attention", "noise")}
    roster = {name: (spec, "train") for name, (spec, _) in banks.items()}
    back = read_adapter(
        tmp_path / "out", setup.base.config, "llama", roster, (), setup.load_base
    ).banks
    for name in banks:
        jax.tree.map(np.testing.assert_array_equal, back[name], trained.banks[name])
    error = fails(capsys, config, workdir, "ming", tmp_path / "new", "--stage=align")
    assert "no bank has a router, which this format is for; use --format=peft" in error


UNFIT = {
    "gate 'language', not 'token'": {"gate": "language"},
    "form 'ffn_lora', not 'lora'": {"form": "ffn_lora"},
    "renormalise=False, where the weights of a token's picks must sum to one": {
        "renormalise": False
    },
    "attn.o mlp.up, where only mlp.gate mlp.up mlp.down can be": {"sites": ("attn.o", "mlp.up")},
}


def test_what_the_routed_format_cannot_hold_is_named(tmp_path):
    spec = BankSpec("experts", FFN, 0, 2, experts=2, rank=2, gate="token")
    wrong = {words: ([spec.replace(**change)], "llama") for words, change in UNFIT.items()}
    wrong["a router for each projection, which are one in model.layers.0.mlp.gate_up_proj"] = (
        *([spec], "phi3"),
    )
    wrong["one bank with routers, not experts, more"] = ([spec, spec.replace(name="more")], "llama")
    for words, (specs, family) in wrong.items():
        banks = naive.random_banks(specs, tiny.DECODER)
        members = [(one, banks[one.name]) for one in specs]
        with pytest.raises(UserError, match=re.escape(words)):
            save_released(tmp_path / "out", tiny.DECODER, family, members)
    assert not list(tmp_path.iterdir())


def test_trained_leaves_of_the_base_are_in_an_adapter(workdir, tmp_path, capsys):
    """PEFT's, whole; llama.cpp's have no place for them."""
    setup, _ = tiny.trained()
    trained = open_trained(Run(setup, workdir), "align")
    first, *others = setup.stages
    changed = dataclasses.replace(first, train_base=("final_norm", "layers.*_norm"))
    setup = dataclasses.replace(setup, stages=(changed, *others))
    leaves = "final_norm, layers.attn_norm, layers.mlp_norm"
    with pytest.raises(UserError, match=rf"\({leaves}\).* use --format=gguf"):
        export.FORMATS["gguf-adapter"].write(setup, trained, str(tmp_path / "out"), None, {})
    norms = {"final_norm": 2 * trained.base["final_norm"]}
    norms["layers"] = {"mlp_norm": trained.base["layers"]["mlp_norm"].at[1].add(0.5)}
    trained = dataclasses.replace(trained, leaves=norms)
    export.FORMATS["peft"].write(setup, trained, str(tmp_path / "out"), None, {})
    assert "vLLM loads no adapter with modules_to_save" in capsys.readouterr().err
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    norm = "model.layers.1.post_attention_layernorm"
    assert fields["modules_to_save"] == [norm, "model.norm"]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, leaf in {
        norm: norms["layers"]["mlp_norm"][1],
        "model.norm": norms["final_norm"],
    }.items():
        np.testing.assert_array_equal(stored[f"base_model.model.{name}.weight"], leaf)


def test_nothing_is_left_when_the_disk_is_full(config, workdir, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    for kind in ("hf", "peft"):
        error = fails(capsys, config, workdir, kind, tmp_path / "out", status=74)
        assert "out: cannot be written" in error and "No space left on device" in error
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    error = fails(capsys, config, workdir, "hf", tmp_path / "out")
    assert "out: is there already; give the path of a new folder" in error


@pytest.mark.parametrize("switch, family", [("norm_eps", "llama"), ("qk_norm", "qwen3")])
def test_a_base_from_elsewhere_takes_a_family_that_can_express_it(switch, family, tmp_path):
    fields = {**dataclasses.asdict(tiny.DECODER), switch: 1e-3 if switch == "norm_eps" else True}
    del fields["windows"]
    lines = ["config.base.path = ''", f"config.base.decoder.update({fields})"]
    config = write_config(tmp_path, *lines)
    assert run(config, "", "hf", tmp_path / "out", "--stage=base") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["bos_token_id"]) == (family, tiny.tokenizer().bos_id)


def test_a_quantised_base_is_written_as_the_values_it_stands_for(tmp_path):
    params = naive.random_params(tiny.DECODER)
    spec = BankSpec("bank", ("mlp.up",), 0, 1, rank=2)
    banks = naive.random_banks((spec,), tiny.DECODER)
    folder = huggingface.save_hf(
        tmp_path / "out",
        tiny.DECODER,
        quantised.quantise(params, "int8"),
        "llama",
        members=[(spec, banks["bank"])],
        dtype=jnp.float32,
    )
    _, back = huggingface.load(folder, jnp.float32)
    want = quantised.dequantise(quantised.quantise(params, "int8"), jnp.float32)
    up = np.array(trees.get(want, "layers.mlp.up.kernel"))
    p = naive.f64(banks["bank"])["mlp.up"]
    up[0] += spec.s * p["lora_a"][0, :, 0] @ p["lora_b"][0, 0]
    want = trees.overlay(want, trees.unflatten([("layers.mlp.up.kernel", up)]))
    assert naive.tree_rel(back, want) <= 1e-6
    assert naive.tree_rel(back, params) >= 1e-3
