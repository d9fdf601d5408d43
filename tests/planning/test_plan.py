"""`medmoe plan` from the command line to its figures, on slices that are not there."""

import json
import shutil

import jax
import pytest

from medmoe_jax.base import trees
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.main import main
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel.topology import CHIPS, Topology
from medmoe_jax.planning import plan as plan_module
from medmoe_jax.planning.figures import Figures, needed_gib
from medmoe_jax.planning.hlo import Traffic
from medmoe_jax.planning.plan import Plan, as_json, make_plan, shardings_table, table
from medmoe_jax.planning.programs import open_abstract, start, training
from medmoe_jax.planning.roofline import bound
from medmoe_jax.screen import plain
from tests import tiny

RECIPE = """
from configs import medcare
from medmoe_jax.training.config import recipe, source

def get_config():
    config = recipe()
    config.base.decoder = dict(
        vocab_size=512, d_model=256, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=128, d_ff=512,
        max_positions=32768,
    )
    config.base.dtype = "bfloat16"
    config.data.length = 256
    config.data.global_batch = 16
    config.data.sources.knowledge = source("absent.jsonl")
    config.data.sources.alignment = source("absent.jsonl")
    config.stages.order = ("aggregate", "align")
    config.stages.aggregate = medcare.aggregate(mixture={"knowledge": 1.0}, steps=3600)
    config.stages.align = medcare.align(mixture={"alignment": 1.0})
    config.run.accumulation = 2
    config.run.kernels = "xla"  # compiled in a fraction of the time
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def run(recipe, tmp_path, *arguments):
    """The command's JSON."""
    out = tmp_path / "plan.json"
    assert main(["plan", f"--config={recipe}", f"--json={out}", *arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.aot
def test_a_training_step_and_all_the_rest(recipe, tmp_path, capsys):
    figures = run(recipe, tmp_path, "--topology=v5e:2x2", "--all", "--config.run.kernels=auto")
    assert figures["fits"] and 0 < figures["arguments_gib"] < figures["hbm_gib"] < 1
    assert figures["hbm_limit_gib"] == 15.75 and figures["chips"] == figures["devices"] == 4
    assert figures["mesh"] == {**dict.fromkeys(AXES, 1), "fsdp": 4}
    assert {"all-gather"} <= set(figures["collectives"])
    assert all(c["dcn_bytes"] == 0 < c["ici_bytes"] for c in figures["collectives"].values())
    assert figures["step_seconds_bound"] == max(figures["seconds"].values()) > 0
    assert figures["chip_hours"] == pytest.approx(4 * figures["step_seconds_bound"])
    others = figures["others"]
    assert set(others) == {"frozen", "score", "generate"} and all(
        o["fits"] for o in others.values()
    )
    assert set(figures["unknown_kernels"]) == {"route", "route_gradients"}  # a router is small
    # The frozen step computes the floor, the layers again and attention by blocks; adapters more.
    assert 1 < others["frozen"]["flops_per_chip"] / figures["floor_flops_per_chip"] < 1.6
    assert 1 < figures["flops_per_chip"] / others["frozen"]["flops_per_chip"] < 2.5
    assert others["generate"]["flops_per_chip"] > 0


@pytest.mark.aot
def test_windows_lower_the_floor(recipe, tmp_path, capsys):
    """The step does more than its floor, however little its kernels visit of a long row."""
    recipe.write_text(RECIPE.replace("n_layers=4", "n_layers=4, windows=(256, 0, 256, 256)"))
    fields = ("--config.data.length=16384", "--config.data.global_batch=1")
    figures = run(recipe, tmp_path, "--topology=v5e:1x1", *fields, "--config.run.accumulation=1")
    assert figures["flops_over_floor"] > 1 and 0 < figures["mfu_bound"] < 1


@pytest.mark.aot
def test_slices_joined_by_a_network(recipe, tmp_path, capsys):
    arguments = ("--topology=2xv5e:2x2", "--stage=align", "--config.run.mesh.data=2")
    figures = run(recipe, tmp_path, *arguments)
    crossing = {k: c["dcn_bytes"] for k, c in figures["collectives"].items() if c["dcn_bytes"]}
    assert crossing
    # The gradients of the trained bank, float32: a quarter on each chip of a slice, or all of them.
    bank = 4 * 4 * 32 * (3 * 256 + 3 * 512)
    assert bank / 4 <= sum(crossing.values()) < 1.1 * bank
    assert figures["steps"] is None and figures["chip_hours"] is None


@pytest.mark.aot
def test_a_step_that_does_not_fit_is_said_to(recipe, tmp_path, capsys):
    fields = ("--config.data.length=32768", "--config.data.global_batch=1024")
    fields += ("--config.run.remat=none",)
    figures = run(recipe, tmp_path, "--topology=v5e:1x1", *fields)
    assert not figures["fits"] and figures["hbm_gib"] > 16
    assert "step_seconds_bound" not in figures


@pytest.mark.aot
def test_the_search_compiles_the_most_promising(recipe, tmp_path, capsys):
    figures = run(
        recipe, tmp_path, "--topology=v5e:1x1", "--search=1", "--config.data.global_batch=4"
    )
    (best,) = figures["candidates"]
    assert best["fits"] and best["tokens_per_second_bound"] > 0
    # One chip: as many micro-batches as divide four rows, with three rematerialisations each.
    assert sum(figures["not_compiled"].values()) == 3 * 3 - 1
    shown = capsys.readouterr()
    refused = "training will refuse this batch: data.shards: 8 does not divide a global batch of 4"
    assert refused in shown.err and refused[:30] not in shown.out
    assert "compiling 1 of at most 1" in shown.err and " of 15.75 GiB\n" in shown.err
    assert f"the fastest: {' '.join(best['flags'])}\n" in shown.err


def test_the_plan_recomputes_as_little_as_fits(recipe, monkeypatch):
    """As a run would choose; the bare base's step beside it recomputes the same."""
    here = Topology("here", CHIPS["v5e"], tuple(jax.devices()))
    measured = []

    def measure(setup, topology, program):
        measured.append(program)
        trained = [one for one in measured if one.name == "train"]
        sizes = (20.0 - len(measured), 1.0, 0.0, 1.0, 1.0, 1.0)
        return Figures(program.name, len(trained) == 2, *sizes)

    monkeypatch.setattr(plan_module, "measure", measure)
    setup = open_abstract(load_config([f"--config={recipe}"]), here)
    plan = make_plan(setup, here, start(setup, "aggregate"), everything=True)
    assert plan.remat == "full" == as_json(plan)["remat"] and plan.train.hbm == 18.0
    assert [one.name for one in measured] == ["train", "train", "frozen", "score", "generate"]
    assert {label: cell for label, cell, *_ in table(plan).rows}["recomputes (run.remat)"] == "full"
    words = plain(table(plan), 80).split()
    assert {"recomputes", "(run.remat)", "full"} <= set(words)  # the name may take two lines

    measured.clear()
    twice = Figures("train", True, *(1.0,) * 3, recomputed=True)
    monkeypatch.setattr(plan_module, "measure", lambda *given: measured.append(given) or twice)
    assert make_plan(setup, here, start(setup, "aggregate")).remat == "full"
    assert len(measured) == 2  # where the compiler recomputes by itself, it does not fit
    plan = make_plan(setup, here, start(setup, "aggregate"))
    assert as_json(plan)["compiler_recomputes"]
    assert "so does the compiler yes" in " ".join(plain(table(plan), 80).split())

    measured.clear()
    setup = open_abstract(load_config([f"--config={recipe}", "--config.run.remat=full"]), here)
    assert make_plan(setup, here, start(setup, "aggregate")).remat == "full"
    assert len(measured) == 1


def test_an_unknown_topology_is_refused(recipe, capsys):
    assert main(["plan", f"--config={recipe}", "--topology=v5e:9x9"]) == 1
    assert "slice 'v5e:9x9' is not known; the closest is v5e:8x8" in capsys.readouterr().err


def test_a_search_compiles_training_steps_alone(recipe, capsys):
    given = [f"--config={recipe}", "--topology=v5e:1x1", "--search", "--all"]
    assert main(["plan", *given]) == 1
    assert "--all: a search compiles training steps alone" in capsys.readouterr().err


def test_a_folder_with_nothing_but_a_config_json_is_planned_for(recipe, tmp_path):
    """The shapes are those of the whole folder."""
    (tmp_path / "base").mkdir()
    shutil.copy(tiny.base_path() / "config.json", tmp_path / "base")
    here = Topology("here", CHIPS["v5e"], tuple(jax.devices()))

    def shapes(path):
        fields = [f"--config.base.path={path}", "--config.base.tokenizer=absent"]
        fields += ["--config.data.length=64"]
        config = load_config([f"--config={recipe}", *fields])
        config.base.decoder = {}
        setup = open_abstract(config, here)
        state, frozen, _ = training(setup, start(setup, "aggregate")).arguments
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state.trainable, frozen))

    assert shapes(tmp_path / "base") == shapes(tiny.base_path())


def test_shardings_of_every_array_of_the_step(recipe):
    here = Topology("here", CHIPS["v5e"], tuple(jax.devices()))
    setup = open_abstract(load_config([f"--config={recipe}"]), here)
    at = start(setup, "aggregate")
    rows = {path: (shape, axes) for path, shape, axes in shardings_table(setup, at).rows}
    state, frozen, batch = training(setup, at).arguments
    leaves = (state.trainable, state.optimiser, frozen, batch)
    assert len(rows) == sum(len(jax.tree.leaves(tree)) for tree in leaves)
    kernel = "base.layers.mlp.up.kernel"
    assert rows[f"frozen.{kernel}"] == (
        "4 x 256 x 512",
        str(trees.get(frozen, kernel).sharding.spec),
    )
    assert "fsdp" in rows["trainable.banks.noise.mlp.up.lora_a"][1]
    assert any("mu" in path and "lora_a" in path and "fsdp" in rows[path][1] for path in rows)


def plan_of(**fields):
    """A plan of one second a step, bound by products."""
    chip = CHIPS["v5e"]
    work = dict(flops=197e12, bytes=819e9 / 2, collectives={"all-reduce": Traffic(3, 9, 4e9, 5e9)})
    train = Figures(
        "train", True, 9.0, 4.0, 30.0, 5.0, **work, bound=bound(chip, 197e12, 819e9 / 2)
    )
    given = dict(stage="one", mesh={"data": 2}, rows=4, length=100, accumulation=1, steps=7200)
    topology = Topology("v5e:2x1", chip, (0, 1))
    return Plan(
        **{
            "topology": topology,
            "remat": "full",
            "floor": 98.5e12,
            "train": train,
            **given,
            **fields,
        }
    )


def test_figures_of_a_plan():
    figures = as_json(plan_of())
    assert figures["step_seconds_bound"] == pytest.approx(1.0)
    assert (figures["mfu_bound"], figures["chip_hours"]) == pytest.approx((0.5, 4.0))
    assert figures["flops_over_floor"] == pytest.approx(2.0)
    assert figures["tokens_per_second_bound"] == pytest.approx(400.0)
    assert figures["collectives"] == {
        "all-reduce": {"count": 3, "ici_bytes": 4e9, "dcn_bytes": 5e9}
    }


def test_a_plan_for_two_devices_a_chip():
    """One hour of a step and chip, in each of two devices."""
    plan = plan_of(topology=Topology("v7x:1x1x1", CHIPS["v7x"], (0, 1)), steps=3600)
    assert plan.chip_hours == pytest.approx(1.0)
    figures = as_json(plan)
    assert (figures["chips"], figures["devices"], figures["hbm_limit_gib"]) == (1, 2, 94.75)
    shown = table(plan)
    assert "v7x:1x1x1: 1 chip, 2 devices (data 2)" in shown.title
    assert shown.caption.startswith("a device's figures")


def test_a_plan_that_does_not_fit_knows_its_memory_only():
    figures = as_json(plan_of(train=Figures("train", False, 20.0, 4.0, 30.0)))
    assert (figures["fits"], figures["hbm_gib"], figures["hbm_limit_gib"]) == (False, 20.0, 15.75)
    assert figures["mfu_bound"] is figures["chip_hours"] is figures["flops_over_floor"] is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded", 20.5),
        ("Used 512.00M of 15.75G hbm.", 0.5),
        ("memory required for HLO temporaries (294.73G) exceeds available HBM (15.75G).", 294.73),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_refusal_says(message, gib):
    assert needed_gib(message) == gib
