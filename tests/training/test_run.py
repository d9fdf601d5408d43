"""The two stages of MedCare on a tiny base: what they leave on disk, and what they refuse."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle, model
from medmoe_jax.adapters.lifecycle import active_banks
from medmoe_jax.base import decoder
from medmoe_jax.base.loss import logits
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data import tokenizers
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import allocator, source
from medmoe_jax.training.kept import kept
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import Trained, open_trained
from tests import naive, tiny

STAGES = ("aggregate", "align")
# A batch of one text a row.
BATCH = naive.random_batch(tiny.DECODER.replace(vocab_used=300), rows=((12,), (9, 3)), length=12)


@pytest.fixture(scope="module")
def done():
    return tiny.trained()


def run_logits(setup, trained, roster=None, banks=None):
    """Logits of the library's forward pass."""
    config = setup.model(active_banks(roster if roster is not None else trained.roster))
    ids = [jnp.asarray(np.repeat(BATCH[k], 4, 0)) for k in ("tokens", "segment_ids", "positions")]

    @jax.jit
    def forward(base, banks):
        x, _, _ = model.hidden(config, base, banks, *ids)
        return logits(config.decoder, decoder.head(base), x)

    out = forward(trained.whole, trained.banks if banks is None else banks)
    return np.asarray(out)[::4]


def test_loss_falls_and_every_step_has_a_line(done):
    _, workdir = done
    for name in STAGES:
        rows = read_metrics(StageFolder.of(workdir, name).metrics)
        assert [r["step"] for r in rows] == list(range(1, tiny.STEPS + 1))
        assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
        assert all(r["target_tokens"] > 0 and np.isfinite(r["gradient_norm"]) for r in rows)
    noise = [r["router"] for r in read_metrics(StageFolder.of(workdir, STAGES[0]).metrics)
             if r.get("router")]  # fmt: skip
    assert len(noise) == tiny.STEPS // 2
    assert set(noise[0]) == {"noise/mlp.gate", "noise/mlp.up", "noise/mlp.down"}
    np.testing.assert_allclose(np.sum(noise[0]["noise/mlp.up"]["use"], axis=1), 1.0, rtol=1e-4)
    last = read_metrics(StageFolder.of(workdir, "align").metrics)
    assert (
        last[-1]["orthogonality/alignment-knowledge"] < last[0]["orthogonality/alignment-knowledge"]
    )
    assert last[-1]["orthogonality/alignment-knowledge/gradient_norm"] > 0
    assert 0 <= last[-1]["overlap/alignment-knowledge/cos"] <= 1


def test_manifests(done):
    setup, workdir = done
    first, second = (Manifest.read(StageFolder.of(workdir, s).manifest) for s in STAGES)
    assert (first.stage, first.after, first.steps) == ("aggregate", "", tiny.STEPS)
    assert {k: b.state for k, b in first.banks.items()} == dict.fromkeys(
        ("attention", "noise", "knowledge"), "train"
    )
    assert [op["op"] for op in first.operations] == ["add"] * 3
    assert first.banks["noise"].shapes["mlp.up/router/kernel"] == [2, 16, 4]
    assert (second.stage, second.after) == ("align", "aggregate")
    assert {k: b.state for k, b in second.banks.items()} == {
        "attention": "merged",
        "knowledge": "frozen",
        "alignment": "train",
    }
    assert second.operations == [
        {"op": "merge", "bank": "attention"},
        {"op": "drop", "bank": "noise"},
        {"op": "state", "bank": "knowledge", "state": "frozen"},
        {"op": "add", "bank": "alignment"},
    ]
    assert first.base_fingerprint == second.base_fingerprint == setup.base_fingerprint
    assert second.parent_fingerprint == first.content != second.content
    assert first.recipe_fingerprint != second.recipe_fingerprint
    assert second.metrics["train"]["step"] == tiny.STEPS
    assert second.metrics["rows"]["rows"] > 0 and second.metrics["rows"]["truncated_rows"] == 0
    assert second.versions["jax"] == jax.__version__


def test_the_replayed_model_is_the_one_in_memory(done, tmp_path):
    """What `evaluate` is given at a stage's end equals what is rebuilt from disk, bit for bit."""
    setup, workdir = done
    shutil.copytree(workdir, tmp_path / "w")
    StageFolder.of(tmp_path / "w", "align").manifest.unlink()
    shutil.rmtree(StageFolder.of(tmp_path / "w", "align").final)
    seen = []

    def look(trained):
        seen.append((trained, run_logits(setup, trained)))
        return {"task": {"score": 1.0}}

    train(Run(setup, tmp_path / "w"), look)
    ((in_memory, want),) = seen
    again = open_trained(Run(setup, tmp_path / "w"), "align")
    for name in ("banks", "base"):
        jax.tree.map(np.testing.assert_array_equal, getattr(again, name), getattr(in_memory, name))
    assert again.roster == in_memory.roster
    np.testing.assert_array_equal(run_logits(setup, again), want)
    manifest = Manifest.read(StageFolder.of(tmp_path / "w", "align").manifest)
    assert manifest.metrics["evaluation"] == {"task": {"score": 1.0}}
    assert Run(setup, tmp_path / "w").last_finished() == "align"


def test_stage_two_is_what_the_recipe_says(done):
    """From the files alone: attention merged, noise gone, knowledge as stage 1 left it."""
    setup, workdir = done
    first = open_trained(Run(setup, workdir), "aggregate")
    second = open_trained(Run(setup, workdir), "align")
    original = jax.device_get(setup.load_base())
    assert set(second.banks) == {"attention", "knowledge", "alignment"}
    for name in ("attention", "knowledge"):
        jax.tree.map(np.testing.assert_array_equal, second.banks[name], first.banks[name])
    for site in ("q", "o"):
        p = jax.device_get(second.banks["attention"][f"attn.{site}"])
        for i in range(2):
            delta = 2.0 * p["lora_a"][i, :, 0] @ p["lora_b"][i, 0]
            assert np.abs(delta).max() > 1e-3
            got = second.base["layers"]["attn"][site]["kernel"][i]
            want = original["layers"]["attn"][site]["kernel"][i] + delta
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for name in ("mlp", "attn_norm", "mlp_norm"):
        jax.tree.map(
            np.testing.assert_array_equal, second.base["layers"][name], original["layers"][name]
        )
    specs = {k: spec for k, (spec, _) in {**first.roster, **second.roster}.items()}
    names = ("attention", "knowledge", "alignment")
    config = setup.base.config

    def twin(*names):
        linear = naive.adapted([specs[n] for n in names], second.banks)
        return naive.logits(config, original, BATCH, linear)[..., :300]

    want = twin(*names)
    assert naive.rel(run_logits(setup, second)[..., :300], want) < 1e-5
    for left_out in names:
        assert np.abs(twin(*(n for n in names if n != left_out)) - want).max() > 1e-2


def test_a_folded_model_is_the_staged_one(done):
    """With banks at large random values, and no bank to spare."""
    setup, workdir = done
    staged = open_trained(Run(setup, workdir), "align")
    roster = {k: (spec, "train") for k, (spec, _) in staged.roster.items()}
    specs = [spec for spec, _ in roster.values()]
    banks = naive.random_banks(specs, setup.base.config)
    base = setup.load_base()
    plain = Trained("", roster, banks, base)
    want = run_logits(setup, plain)[..., :300]
    half, merged = lifecycle.merge(roster, banks, base, "attention")
    folded = Trained("", {}, {}, lifecycle.fold(half, banks, merged))
    assert naive.rel(run_logits(setup, folded)[..., :300], want) < 1e-5
    for name in roster:
        rest = {k: v for k, v in roster.items() if k != name}
        assert np.abs(run_logits(setup, plain, rest)[..., :300] - want).max() > 0.1


def test_a_rerun_skips_finished_stages(done, capsys):
    setup, workdir = done
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    train(Run(setup, workdir), lambda trained: pytest.fail("nothing is left to evaluate"))
    text = capsys.readouterr().err
    assert all(f"stage '{s}' is finished: skipped" in text for s in STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_fields_of_run_may_change(done):
    _, workdir = done
    config = tiny.medcare_config()
    changes = {"log_every": 7, "remat": "full", "save_every": 3, "keep": 5, "accumulation": 1}
    config.run.update(changes)
    config.run.mesh.data = 2
    train(Run(open_setup(config), workdir))


def other_tokenizer(config, tmp_path):
    texts = ["patient doctor nurse hospital", "the ward is open", "a cold and a cough"] * 4
    config.base.tokenizer = str(tokenizers.train(texts, 300, tmp_path / "t.model").path)


def other_base(config, tmp_path):
    config.base.path = str(tiny.base_path(seed=5))


def other_data(config, tmp_path):
    rows = tiny.alignment_rows()
    rows[3]["response"] = "perhaps"
    config.data.sources.alignment = source(str(tiny.write_rows(tmp_path / "a.jsonl", rows)))


def same_data_elsewhere(config, tmp_path):
    path = shutil.copy(tiny.data("alignment"), tmp_path / "elsewhere.jsonl")
    config.data.sources.alignment = source(str(path))


def set_field(name, value):
    return lambda config, tmp_path: config.update_from_flattened_dict({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_field("stages.align.learning_rate", 1.0), "align.*stage.learning_rate: 0.03 then"),
        (set_field("stages.aggregate.banks.noise.rank", 3), "aggregate.*stage.banks.noise.rank"),
        (set_field("data.seed", 9), "aggregate.*data.seed: 0 then, 9 now"),
        (set_field("data.mask", "qwen_legacy"), "data.mask"),
        (other_base, "base.weights"),
        (set_field("base.dtype", "bfloat16"), "base.dtype"),
        (other_tokenizer, "data.tokenizer"),
        (other_data, "data.sources.alignment"),
    ],
    ids=["rate", "rank", "seed", "mask", "base", "dtype", "tokenizer", "data"],
)
def test_another_recipe_in_the_same_folder(done, tmp_path, change, words):
    _, workdir = done
    config = tiny.medcare_config()
    change(config, tmp_path)
    with pytest.raises(UserError, match=f"{words}.*Use another workdir"):
        train(Run(open_setup(config), workdir))


def only_stage(config):
    """One stage, of a name that the recipe did not have."""
    config.stages.learn = config.stages.aggregate.copy_and_resolve_references()
    config.stages.order = ("learn",)
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_base, "base.weights: "),
        (other_tokenizer, "data.tokenizer"),
        (set_field("base.dtype", "bfloat16"), "base.dtype: 'float32' then, 'bfloat16' now"),
        (set_field("data.template", "llama2"), "data.template"),
    ],
    ids=["base", "tokenizer", "dtype", "template"],
)
def test_another_base_beside_stages_of_other_names(done, tmp_path, change, words):
    """What is there must go on opening with the one configuration that is kept."""
    workdir = shutil.copytree(done[1], tmp_path / "run")
    config = only_stage(tiny.medcare_config())
    change(config, tmp_path)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    stage = Run(open_setup(config), workdir).stage("learn")
    message = f"aggregate was trained on another base.*{words}.*use another workdir"
    with pytest.raises(UserError, match=message):
        stage.claim({"knowledge": "rows"})
    if words != "base.weights: ":  # it reads none
        with pytest.raises(UserError, match=message):
            stage.check_claim()
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_another_stage_on_the_same_base_may_join(done, tmp_path):
    workdir = shutil.copytree(done[1], tmp_path / "run")
    copy = shutil.copytree(workdir / "stages" / "align", workdir / "stages" / "align_put_aside")
    (workdir / "stages" / "notes").mkdir()
    stage = Run(open_setup(only_stage(tiny.medcare_config())), workdir).stage("learn")
    stage.check_claim()
    assert stage.claim({"knowledge": "rows"})
    assert stage.folder.recipe.is_file() and copy.is_dir()


def test_a_run_with_relative_paths_opens_from_any_folder(done, tmp_path, monkeypatch):
    """And the same recipe is still known as the one that is kept."""
    config = only_stage(tiny.medcare_config())
    for name, path in (("base", tiny.base_path()), ("t.model", tiny.tokenizer().path)):
        (tmp_path / name).symlink_to(path)
    config.base.path, config.base.tokenizer = "base", "t.model"
    config.stages.learn.evaluation.tasks = ("mine.jsonl",)
    config.stages.learn.evaluation.every = config.stages.learn.steps
    config.stages.learn.evaluation.best = "mine"
    (tmp_path / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    stage = Run(open_setup(config), "run").stage("learn")
    fingerprint = stage.claim({"knowledge": "rows"})
    record = (tmp_path / "run" / "run.json").stat().st_mtime_ns
    assert stage.claim({"knowledge": "rows"}) == fingerprint
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns == record
    monkeypatch.chdir("/")
    again = open_setup(kept(tmp_path / "run"))
    assert Run(again, tmp_path / "run").stage("learn").claim({"knowledge": "rows"}) == fingerprint
    assert again.tokenizer.digest == stage.setup.tokenizer.digest


def test_data_count_by_content_not_by_path(done, tmp_path):
    config = tiny.medcare_config()
    same_data_elsewhere(config, tmp_path)
    train(Run(open_setup(config), done[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # alpha changes no shape: the banks would load and be scaled wrongly.
        (
            set_field("stages.align.banks.alignment.alpha", 64.0),
            r"stages\.align\.banks\.alignment\.alpha: 4\.0 then, 64\.0 now",
        ),
        (set_field("stages.align.drop", ()), r"stages\.align\.drop: \['noise'\] then"),
        (other_base, r"was trained on another base.*base\.weights"),
        (other_tokenizer, r"data\.tokenizer"),
    ],
    ids=["alpha", "drop", "base", "tokenizer"],
)
def test_a_model_is_not_opened_with_another_recipe(done, tmp_path, change, words):
    config = tiny.medcare_config()
    change(config, tmp_path)
    with pytest.raises(UserError, match=words):
        open_trained(Run(open_setup(config), done[1]), "align")


def test_a_model_may_be_opened_with_another_schedule(done):
    config = tiny.medcare_config()
    config.stages.align.learning_rate = 1.0
    assert open_trained(Run(open_setup(config), done[1]), "align").stage == "align"


def test_an_unfinished_stage_is_not_opened(done, tmp_path):
    setup, _ = done
    with pytest.raises(UserError, match=r"stage 'aggregate' is not finished in .*medmoe train"):
        open_trained(Run(setup, tmp_path), "align")
    assert Run(setup, tmp_path).last_finished() == ""
    assert open_trained(Run(setup, tmp_path), "").banks == {}


def test_too_few_rows_for_the_shards(tmp_path):
    config = tiny.medcare_config()
    few = tiny.write_rows(tmp_path / "few.jsonl", tiny.alignment_rows()[:3])
    config.data.sources.alignment = source(str(few))
    with pytest.raises(UserError, match="'alignment' has 3 rows, fewer than the 4 data shards"):
        train(Run(open_setup(config), tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_rows_that_have_changed_are_named(done, tmp_path):
    """By the source and its path, not by digests; what else has changed is told beside it."""
    shutil.copytree(done[1], tmp_path / "w")
    config = tiny.medcare_config()
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.knowledge_rows()[:-1])
    config.data.sources.knowledge = source(str(rows))
    folder = StageFolder.of(tmp_path / "w", "aggregate").path
    with pytest.raises(UserError) as caught:
        train(Run(open_setup(config), tmp_path / "w"))
    assert str(caught.value) == (
        f"{folder} was made by another recipe; data.sources.knowledge: the rows of {rows} have "
        "changed (the file, or what prompt, columns, window and data.ignore make of it). Use "
        "another workdir, or remove that folder to run the stage anew"
    )
    config = tiny.medcare_config()
    config.stages.aggregate.mixture = {"knowledge": 2.0}
    with pytest.raises(UserError, match=r"alignment: read then and not now; stage\.mixture\.align"):
        train(Run(open_setup(config), tmp_path / "w"))


def test_every_source_is_looked_for_before_the_first_stage(tmp_path):
    config = tiny.medcare_config()
    config.stages.aggregate.mixture = {"knowledge": 1.0}
    config.data.sources.alignment.path = "nowhere.jsonl"
    with pytest.raises(UserError, match=r"data\.sources\.alignment\.path: .*'nowhere\.jsonl'"):
        train(Run(open_setup(config), tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_batch_that_does_not_divide(tmp_path):
    config = tiny.medcare_config()
    config.run.accumulation = 3
    with pytest.raises(UserError, match=r"data\.global_batch: 8 rows do not divide over 8 devices"):
        train(Run(open_setup(config), tmp_path / "w"))


def test_a_damaged_end_is_not_loaded(done, tmp_path):
    setup, workdir = done
    shutil.copytree(workdir, tmp_path / "w")
    final = StageFolder.of(tmp_path / "w", "aggregate").final
    largest = max((p for p in final.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(store.CheckpointError, match="final"):
        open_trained(Run(setup, tmp_path / "w"), "align")


def test_recipe_files_say_what_was_run(done):
    setup, workdir = done
    recipe = json.loads(StageFolder.of(workdir, "align").recipe.read_text())["recipe"]
    assert recipe["stage"]["after"] == "aggregate"
    assert recipe["data"]["tokenizer"] == setup.tokenizer.digest
    assert str(tiny.folder()) not in json.dumps(recipe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": {"one": 1.0}}, "data set 'one' has 1 rows, fewer than the 4 data shards"),
        (
            {"steps": 0, "epochs": 1.0, "allocators": {"q": allocator("alignment", 1, t_init=500)}},
            r"stages\.align\.allocators\.q\.t_init: 500 \+ t_final",
        ),
    ],
)
def test_a_later_stage_that_cannot_begin_is_told_before_the_first_is_trained(
    fields, message, tmp_path
):
    config = tiny.medcare_config()
    rows = tiny.write_rows(tmp_path / "one.jsonl", tiny.knowledge_rows()[:1])
    config.data.sources.one = source(str(rows))
    config.stages.align.banks.alignment.learned_scale = True
    with config.unlocked():
        for name, value in fields.items():
            config.stages.align[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        train(Run(open_setup(config), tmp_path / "w"))
    assert not list((tmp_path / "w").rglob("manifest*"))
    assert not (tmp_path / "w" / "stages").exists()
