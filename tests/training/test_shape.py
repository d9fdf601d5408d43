"""What a recipe's Python can get wrong: fields and types, found before anything is opened."""

from pathlib import Path

import pytest

import medmoe_jax
from medmoe_jax.api.configs import recipes
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.shape import check_shape


def whole():
    """A recipe with a part of every kind."""
    config = recipe()
    config.data.sources.mine = source("rows.jsonl")
    config.stages.learn = stage(
        banks={"lora": bank(sites=("*",))}, mixture={"mine": 1}, learning_rate=1, steps=6,
        losses={"apart": orthogonality("lora", "other", weight=2)},
    )  # fmt: skip
    config.stages.order = ["learn"]
    return config


def put(path, value):
    """A change of one field, as somebody may write it with the configuration unlocked."""

    def change(config):
        *sections, name = path.split(".")
        for section in sections:
            config = config[section]
        config._fields[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("foo", 3), "foo: there is no such field; there are base, data, run, stages"),
        (put("run.save_evry", 3), r"run\.save_evry: .*did you mean 'save_every'\?"),
        (put("stages.learn.learning_rat", 5e-6), "did you mean 'learning_rate'"),
        (put("stages.learn.banks.lora.rnak", 4), r"banks\.lora\.rnak: .*did you mean 'rank'"),
        (put("stages.learn.losses.apart.wieght", 4.0), r"apart\.wieght: .*mean 'weight'"),
        (put("stages.learn.evaluation.task", ()), r"evaluation\.task: .*mean 'tasks'"),
        (put("data.sources.mine", "rows.jsonl"), r"sources\.mine: 'rows\.jsonl' is not a section"),
        (put("data.sources.mine.pth", "x"), r"mine\.pth: .*did you mean 'path'"),
        (put("stages.learn", 3), r"stages\.learn: 3 is not a section"),
        (put("stages.learn.steps", "6"), r"stages\.learn\.steps: '6' is not a whole number"),
        (put("stages.learn.steps", 6.5), r"stages\.learn\.steps: 6\.5 is not a whole number"),
        (put("stages.learn.steps", True), r"stages\.learn\.steps: True is not a whole number"),
        (put("stages.learn.learning_rate", "1e-3"), "learning_rate: '1e-3' is not a number"),
        (put("stages.learn.banks.lora.rank", "4"), r"lora\.rank: '4' is not a whole number"),
        (put("stages.learn.banks.lora.sites", "attn.*"), r"'attn\.\*' is not a list; write \('a"),
        (put("stages.learn.mixture", ["mine"]), r"learn\.mixture: \['mine'\] is not a section"),
        (put("stages.learn.mixture.mine", "1"), r"mixture\.mine: '1' is not a number"),
        (put("stages.learn.banks", ("lora",)), r"learn\.banks: \('lora',\) is not a section"),
        (put("stages.order", "learn"), r"stages\.order: 'learn' is not a list; write \('learn',\)"),
        (put("stages.learn.banks.lora.sites", (1,)), r"lora\.sites\[0\]: 1 is not text"),
        (put("stages.learn.train_base", (1,)), r"train_base\[0\]: 1 is not text"),
        (put("stages.learn.evaluation.tasks", (1,)), r"evaluation\.tasks\[0\]: 1 is not text"),
        (put("run.profile", (1, "2")), r"run\.profile\[1\]: '2' is not a whole number"),
        (
            put("stages.learn.losses", {"o": {"kind": "orthogonality", "of": "lora"}}),
            r"losses\.o\.against: is missing",
        ),
        (put("base.path", 7), r"base\.path: 7 is not text"),
        (put("data.pack", 1), r"data\.pack: 1 is not true or false"),
        (put("run.mesh.fsdp", "all"), r"run\.mesh\.fsdp: 'all' is not a whole number"),
        (lambda config: config.run._fields.pop("keep"), r"run\.keep: is missing"),
    ],
)
def test_the_field_is_named(change, message):
    check_shape(whole())
    config = whole()
    change(config)
    for look in (check_shape, open_setup, medmoe_jax.config):
        with pytest.raises(UserError, match=message):
            look(config)


@pytest.mark.parametrize(
    "change",
    [
        put("data.sources.mine.path", "caf\udce9"),
        put("data.template_options", {"style": "caf\udce9"}),
        put("stages.order", ["learn", "caf\udce9"]),
        put("stages.learn.mixture", {"caf\udce9": 1}),
        put("data.sources.caf\udce9", source("rows.jsonl")),
    ],
)
def test_a_name_or_text_that_is_not_utf8(change):
    """No record can hold it, whichever field it stands in."""
    config = whole()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=r"'caf\\udce9' is not UTF-8 text"):
        check_shape(config)


def test_what_a_section_may_leave_out():
    """Losses and allocators have the defaults of their classes, a mesh has axes of one."""
    config = whole()
    for path, value in (
        ("stages.learn.losses", {"o": {"kind": "orthonormality", "bank": "lora"}}),
        ("stages.learn.allocators", {"r": {"bank": "lora", "target_rank": 1}}),
        ("run.mesh", {"data": 1}),
        ("stages.learn.banks.lora.layers", (-2, None)),
        ("run.profile", [3, 2]),
    ):
        put(path, value)(config)
    config.data.sources.other = source(Path("rows.jsonl"))
    check_shape(config)


def test_every_recipe_that_comes_with_the_package_has_the_fields():
    for name in recipes():
        check_shape(medmoe_jax.config(name))


def test_a_file_without_get_config_is_not_taken_for_the_last_one(tmp_path):
    (tmp_path / "none.py").write_text("def get_confg():\n    pass\n")
    (tmp_path / "uses.py").write_text("def get_config():\n    return SHIPPED\n")
    medmoe_jax.config("trial")
    with pytest.raises(UserError, match=r"none\.py: has no get_config\(\)"):
        medmoe_jax.config(tmp_path / "none.py")
    with pytest.raises(UserError, match=r"uses\.py, line 2: NameError: name 'SHIPPED' is"):
        medmoe_jax.config(tmp_path / "uses.py")
