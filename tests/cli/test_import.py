"""`medmoe import`: a released directory in the place of a stage's training."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from medmoe_jax.base import trees
from medmoe_jax.checkpoints import huggingface
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.checkpoints.fingerprint import file_fingerprint
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.peft_export import TrainedLeaves, save_peft
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.main import main
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import stacked
from medmoe_jax.training.imports import import_stage
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny
from tests.released import module, write

LAYERS = range(tiny.DECODER.n_layers)
CONFIG = """from tests import tiny

def get_config():
    return tiny.medcare_config()
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`--config=` of the tiny recipe."""
    file = tmp_path_factory.mktemp("config") / "recipe.py"
    file.write_text(CONFIG)
    return f"--config={file}"


def tensors(bank, inside, end="", e=0):
    """One expert of a bank, its modules named `inside` the linear layer."""
    out = {}
    for (site, p), i in itertools.product(bank.items(), LAYERS):
        at = f"base_model.model.{module(i, site)}.{inside}"
        out[f"{at}lora_A{end}.weight"] = np.ascontiguousarray(p["lora_a"][i, :, e].T)
        out[f"{at}lora_B{end}.weight"] = np.ascontiguousarray(p["lora_b"][i, e].T)
    return out


def stage_1(folder):
    """The first stage of the tiny run, as its authors would release it."""
    setup, workdir = tiny.trained()
    banks = jax.device_get(open_trained(Run(setup, workdir), "aggregate").banks)
    pickled = tensors(banks["knowledge"], "share_experts.")
    for e in range(4):
        pickled |= tensors(banks["noise"], f"experts.{e}.", f"_{e}", e)
    for (site, p), i in itertools.product(banks["noise"].items(), LAYERS):
        at = f"base_model.model.{module(i, site)}.switch"
        pickled[f"{at}.weight"] = np.ascontiguousarray(p["router"]["kernel"][i].T)
        pickled[f"{at}.bias"] = p["router"]["bias"][i]
    return write(folder, tensors(banks["attention"], ""), pickled)


def stage_2(folder):
    """The second stage likewise, both blocks in one file."""
    setup, workdir = tiny.trained()
    banks = jax.device_get(open_trained(Run(setup, workdir), "align").banks)
    base, orth = (tensors(banks[k], f"{v}.") for k, v in BLOCKS.items())
    return write(folder, tensors=base | orth)


BLOCKS = {"knowledge": "base", "alignment": "orth"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return stage_1(folder / "one"), stage_2(folder / "two")


def same(workdir, stage):
    """The stage's banks and base are those of the tiny run, bit for bit."""
    setup, trained = tiny.trained()
    got, want = (open_trained(Run(setup, w), stage) for w in (workdir, trained))
    assert got.roster == want.roster
    for name in ("banks", "base"):
        jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(want, name))


def run(command, config, workdir, *more):
    assert main([command, config, f"--workdir={workdir}", *more]) == 0


def fails(capsys, *arguments):
    """Exit status 1 and an error without traceback, which is returned."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"medmoe {arguments[0]}: error: ") and "Traceback" not in error
    return error


@pytest.mark.slow
def test_training_goes_on_from_an_imported_stage(config, released, tmp_path, capsys):
    """Without the data of the first stage; the second ends where the tiny run has ended."""
    workdir = tmp_path / "w"
    run("import", config, workdir, f"--adapter={released[0]}")
    printed = capsys.readouterr()
    assert f"stage 'aggregate' imported into {workdir}" in printed.out
    assert "group 'experts' is bank 'noise': mlp.gate mlp.up mlp.down, 4 x 2, s 2" in printed.err
    same(workdir, "aggregate")
    ghost = "--config.data.sources.knowledge.path=no_such_file.jsonl"
    run("train", config, workdir, ghost)
    assert "stage 'aggregate' was not trained here: skipped" in capsys.readouterr().err
    same(workdir, "align")
    manifests = [Manifest.read(StageFolder.of(workdir, s).manifest) for s in
                 ("aggregate", "align")]  # fmt: skip
    assert manifests[1].parent_fingerprint == manifests[0].content
    run("train", config, workdir, ghost)
    assert "stage 'align' is finished: skipped" in capsys.readouterr().err


def test_both_stages_imported_and_used(config, released, tmp_path, capsys):
    workdir = tmp_path / "w"
    run("import", config, workdir, f"--adapter={released[0]}")
    run("import", config, workdir, f"--adapter={released[1]}", "--stage=align")
    same(workdir, "align")
    scores = []
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "aspirin?", "completion": "pain"}])
    for w in (workdir, tiny.trained()[1]):
        run("score", config, w, f"--input={rows}", f"--output={tmp_path / 'out.jsonl'}")
        scores.append((tmp_path / "out.jsonl").read_text())
    assert scores[0] == scores[1]
    setup, _ = tiny.trained()
    first, second = (Manifest.read(StageFolder.of(workdir, s).manifest) for s in
                     ("aggregate", "align"))  # fmt: skip
    assert [op["op"] for op in first.operations] == ["add"] * 3 + ["import"]
    assert first.operations[-1] == {
        "op": "import",
        "files": {
            name: file_fingerprint(released[0] / name)
            for name in ("adapter_config.json", "config.json", "adapter_model.safetensors",
                         "non_lora_trainables.bin")
        },
        "groups": {
            "lora": {"banks": ["attention"], "s": 2.0},
            "experts": {"banks": ["noise"], "s": 2.0},
            "shared": {"banks": ["knowledge"], "s": 2.0},
        },
    }  # fmt: skip
    assert {k: b.state for k, b in second.banks.items()} == {
        "attention": "merged", "knowledge": "frozen", "alignment": "train"}  # fmt: skip
    assert (second.steps, second.base_fingerprint) == (0, setup.base_fingerprint)
    assert second.parent_fingerprint == first.content
    assert str(tmp_path) not in json.dumps([first.to_json(), second.to_json()])
    error = fails(capsys, "import", config, f"--workdir={workdir}", f"--adapter={released[0]}")
    assert f"every stage is finished in {workdir}" in error
    again = ("import", config, f"--workdir={workdir}", f"--adapter={released[0]}")
    assert "stage 'aggregate' is finished in" in fails(capsys, *again, "--stage=aggregate")
    error = fails(capsys, "train", config, f"--workdir={workdir}",
                  "--config.stages.aggregate.banks.noise.top_k=1")  # fmt: skip
    assert "stages.aggregate.banks.noise.top_k: 2 then, 1 now" in error


def test_an_import_is_not_taken_for_training(config, released, tmp_path, capsys):
    """Nor the other way round, when either was interrupted before the stage's end."""
    workdir = tmp_path / "w"
    run("import", config, workdir, f"--adapter={released[0]}")
    folder = StageFolder.of(workdir, "aggregate")
    folder.manifest.unlink()
    error = fails(capsys, "train", config, f"--workdir={workdir}")
    assert "was made by another recipe" in error and "imported: {" in error
    run("import", config, workdir, f"--adapter={released[0]}")
    same(workdir, "aggregate")
    shutil.rmtree(folder.path)
    shutil.copytree(StageFolder.of(tiny.trained()[1], "aggregate").path, folder.path)
    folder.manifest.unlink()
    before = read_json(folder.recipe)
    with only_writer(workdir):
        error = fails(capsys, "import", config, f"--workdir={workdir}", f"--adapter={released[0]}")
    assert f"process {os.getpid()} on" in error and "writes into" in error
    error = fails(capsys, "import", config, f"--workdir={workdir}", f"--adapter={released[0]}")
    assert "was made by another recipe" in error and "imported: None then" in error
    assert read_json(folder.recipe) == before
    assert not folder.manifest.exists()


def test_a_stacked_bank_is_trained_here(tmp_path):
    recipe = tiny.medcare_config()
    align = recipe.stages.align
    align.stack, align.losses, align.states = {"mixed": stacked(("knowledge",))}, {}, {}
    with pytest.raises(UserError, match=r"stage 'align' stacks \(mixed\): .* train it here"):
        import_stage(Run(open_setup(recipe), tmp_path / "w"), tmp_path / "released", "align")
    assert not (tmp_path / "w").exists()


def test_what_is_refused_leaves_nothing(config, released, tmp_path, capsys):
    workdir = tmp_path / "w"
    command = ("import", config, f"--workdir={workdir}")
    huge = shutil.copytree(released[0], tmp_path / "huge")
    options = json.loads((huge / "adapter_config.json").read_text())
    (huge / "adapter_config.json").write_text(json.dumps({**options, "lora_alpha": 3e38}))
    for more, words in (
        ([f"--adapter={tmp_path / 'none'}"], "holds none of adapter_model.safetensors"),
        ([f"--adapter={released[0]}", "--stage=algin"], "'algin' is none of aggregate, align"),
        ([f"--adapter={released[1]}"], "bank 'attention': nothing in the directory for attn.q"),
        ([f"--adapter={released[1]}", "--stage=align"], "stage 'aggregate' is not finished"),
        ([f"--adapter={released[0]}", "--config.stages.aggregate.banks.noise.rank=4"],
         "asks for (4, 16)"),
        ([f"--adapter={released[0]}", "--config.stages.aggregate.train_base=('final_norm',)"],
         "train_base: the adapter has no final_norm of its own"),
        ([f"--adapter={released[0]}", "--wat"], "unknown argument '--wat'"),
        ([f"--adapter={huge}", "--config.stages.aggregate.banks.attention.alpha=0.001"],
         "NaN or infinity in banks.attention."),
    ):  # fmt: skip
        assert words in fails(capsys, *command, *more)
        assert not workdir.exists()


def test_an_adapter_that_changes_leaves_of_the_base(tmp_path, capsys):
    """Imported, opened, answered with and exported, against the float64 twin of the whole."""
    file = tmp_path / "recipe.py"
    lines = (
        "config = tiny.medcare_config()",
        "config.stages.order = ('aggregate',)",
        "del config.stages.aggregate.banks['noise'], config.stages.aggregate.banks['knowledge']",
        "config.stages.aggregate.train_base = ('embed', 'layers.attn.q.kernel')",
        "return config",
    )
    file.write_text(CONFIG.replace("return tiny.medcare_config()", "\n    ".join(lines)))
    config = f"--config={file}"
    setup = open_setup(load_config([config]))
    spec = setup.stages[0].added[0]
    base = setup.load_base()
    bank = naive.random_banks((spec,), setup.base.config)[spec.name]
    leaves = {
        "embed": 1.5 * base["embed"] + 0.1,
        "layers": {"attn": {"q": {"kernel": base["layers"]["attn"]["q"]["kernel"] * 0.5}}},
    }
    whole, members = trees.overlay(base, leaves), [(spec, bank)]
    made = TrainedLeaves(("embed", "layers.attn.q.kernel"), whole, members, setup.load_base)
    adapter = save_peft(tmp_path / "adapter", setup.base.config, "llama", members, trained=made)
    workdir = tmp_path / "w"
    run("import", config, workdir, f"--adapter={adapter}")
    assert "leaves of the base: embed, layers.attn.q.kernel" in capsys.readouterr().err
    opened = open_trained(Run(setup, workdir), "aggregate")
    assert naive.tree_rel(opened.leaves, leaves) <= 1e-6
    assert "embed" not in opened.base
    linear = naive.adapted((spec,), {spec.name: bank})
    batch = naive.random_batch(setup.base.config)
    want = naive.logits(setup.base.config, naive.f64(whole), batch, linear)[..., :300]
    run("export", config, workdir, "--format=hf", f"--output={tmp_path / 'hf'}")
    loaded, params = huggingface.load(tmp_path / "hf", np.float32)
    assert naive.rel(naive.logits(loaded, naive.f64(params), batch)[..., :300], want) <= 1e-5
    run("generate", config, workdir, "a question", "--max-tokens=2")
    run("export", config, workdir, "--format=peft", f"--output={tmp_path / 'peft'}")
    assert read_json(tmp_path / "peft" / "adapter_config.json")["use_dora"]
    again, first = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "peft", adapter)
    )
    assert set(again) == set(first)
    for name, array in first.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
