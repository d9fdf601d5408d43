"""Configuration files and their command-line fields."""

import itertools
import re
from pathlib import Path

import pytest

from configs import apollo_moe, medcare, ming_moe
from medmoe_jax.api.configs import config as configuration
from medmoe_jax.api.configs import variants
from medmoe_jax.base.presets import HUB, PRESETS, preset
from medmoe_jax.cli.configs import load_config
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.errors import UserError
from medmoe_jax.routing.languages import read_languages
from medmoe_jax.training.recipe import parse

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
MEDCARE = f"--config={ROOT / 'configs' / 'medcare.py'}"
APOLLO_MOE = f"--config={ROOT / 'configs' / 'apollo_moe.py'}"
BASES = ("qwen1.5-1.8b", "qwen1.5-4b", "qwen1.5-7b", "qwen1.5-14b")
BASES += ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_file_loads_locked(file):
    config = load_config([f"--config={file}"])
    assert config.is_locked
    assert {"base", "data", "stages", "run"} <= set(config)
    for name in config.stages.order:
        assert name in config.stages
    with pytest.raises(AttributeError):
        config.run.log_evry = 3
    with pytest.raises(UserError, match="did you mean 'run"):
        load_config([f"--config={file}", "--config.run.log_evry=3"])


def test_every_recipe_takes_every_published_base():
    """The page has all their names, each with the template that a recipe gives it."""
    page = (ROOT / "docs" / "configs.md").read_text().partition("## Bases by name")[2]
    lines = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| `(\w+)` \|$", page.partition("## base")[0], re.M)
    told = {name: template for names, template in lines for name in names.strip("`").split("` `")}
    assert list(told) and set(told) == set(PRESETS) == set(HUB)
    recipes = itertools.cycle((medcare, ming_moe, apollo_moe))
    for (name, template), module in zip(told.items(), recipes, strict=False):
        config = module.get_config(name)
        assert config.base.path == HUB[name] and parse(config, preset(name))
        known = template if module is not apollo_moe else "user_assistant"
        assert config.data.template == known in (*TEMPLATES, "tokenizer")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", ["", ",paper"])
def test_medcare_fits_its_bases(base, form):
    """Against the presets, without weights: sites, ranks and the two forms of the loss."""
    config = load_config([f"{MEDCARE}:{base}{form}"])
    assert config.base.path.lower() == f"hf://qwen/{base}"
    decoder = preset(base)
    first, second = parse(config, decoder)
    banks = {spec.name: spec for spec in (*first.added, *second.added)}
    assert set(banks) == {"attention", "noise", "knowledge", "alignment"}
    assert all((s.start, s.stop, s.s) == (0, decoder.n_layers, 2.0) for s in banks.values())
    assert (banks["noise"].experts, banks["noise"].top_k, banks["noise"].rank) == (8, 2, 16)
    assert banks["knowledge"].rank == banks["alignment"].rank == 32
    assert (second.merge, second.drop) == (("attention",), ("noise",))
    (apart,) = second.regularisers
    if form:
        assert second.states["knowledge"] == "train"
        assert (apart.weight, apart.reduction, apart.stop_gradient) == (
            1.0,
            "sum",
            False,
        )
    else:
        assert second.states["knowledge"] == "frozen"
        assert (apart.weight, apart.reduction, apart.stop_gradient) == (
            1.0,
            "mean",
            True,
        )
    assert config.data.length <= decoder.max_positions
    assert config.data.global_batch % config.data.shards == 0


def test_ming_moe_routes_every_projection_by_itself():
    config = load_config([f"--config={ROOT / 'configs' / 'ming_moe.py'}:qwen1.5-1.8b"])
    (stage,) = parse(config, preset("qwen1.5-1.8b"))
    attention, experts = stage.added
    assert (attention.gate, attention.rank, attention.s) == ("always", 16, 2.0)
    assert (experts.form, experts.gate, experts.experts, experts.top_k) == ("lora", "token", 8, 2)
    assert experts.renormalise and experts.router_bias and experts.s == 2.0
    assert experts.sites == ("mlp.gate", "mlp.up", "mlp.down") and experts.dropout == 0.05


def test_fields_are_set_by_type():
    arguments = ["--config.run.mesh.fsdp=4", "--config.stages.align.banks.alignment.alpha=3"]
    config = load_config(
        [
            MEDCARE,
            *arguments,
            "--config.data.sources.knowledge.path=k.jsonl",
            "--config.data.pack=0",
        ]
    )
    assert config.run.mesh.fsdp == 4
    assert config.stages.align.banks.alignment.alpha == 3.0
    assert config.data.sources.knowledge.path == "k.jsonl"
    assert config.data.pack is False
    one = load_config([MEDCARE, "--config.stages.order=('aggregate',)"])
    assert tuple(one.stages.order) == ("aggregate",)


def test_of_what_comes_twice_the_last_holds():
    """Tuples, which ml-collections would join, a field that is new, and the recipe."""
    field = "--config.stages.aggregate"
    config = load_config(
        [
            APOLLO_MOE,
            MEDCARE,
            f"{field}.evaluation.tasks=('cmedtc',)",
            "--config.data.template_options.level=2",
            f"{field}.steps=5",
            f"{field}.evaluation.tasks=('rqe', 'pubmedqa')",
            "--config.data.template_options.level=3",
            f"{field}.steps=7",
        ]
    )
    stage = config.stages.aggregate
    assert stage.evaluation.tasks == ("rqe", "pubmedqa") and stage.steps == 7
    assert config.data.template_options.level == 3


def test_a_field_that_is_yes_or_no_needs_no_value():
    assert not load_config([MEDCARE, "--config.data.pack=false"]).data.pack
    assert load_config([MEDCARE, "--config.data.pack"]).data.pack


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.stages.algin.steps=3", "no such field; did you mean 'stages.align.steps'?"),
        ("--config.base.pth=x", "--config.base.pth: the configuration has no such field"),
        ("--config.zzzzzz=1", "--config.zzzzzz: the configuration has no such field"),
        ("--config.run.log_every=often", "run.log_every=often"),
        ("--config.data.length=1.5", "data.length=1.5"),
        ("--config.run.mesh=3", "run.mesh=3"),
        ("--config.run.log_every", "has no value; write --config.run.log_every=VALUE"),
        ("--config.data.template", "has no value; write --config.data.template=VALUE"),
        ("--config", "--config: has no value; write --config=RECIPE"),
        ("--configs=x", "unknown argument '--configs=x'"),
        ("--confg.run.log_every=3", "unknown argument '--confg.run.log_every=3'; see --help"),
        ("stray", "unknown argument 'stray'"),
    ],
)
def test_bad_arguments(argument, words):
    with pytest.raises(UserError) as caught:
        load_config([MEDCARE, argument])
    assert words in str(caught.value)


EMPTY = """from medmoe_jax.training.config import recipe
def get_config():
    c = recipe()
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "invalid syntax"),
        ("import nothing_such_as_this\n", "nothing_such_as_this"),
        ("def get_config():\n    return undefined_name\n", "undefined_name"),
        ("def get_config():\n    return 7\n", "must return an ml_collections.ConfigDict"),
        ("def get_config():\n    return {'a': 1}\n", "must return an ml_collections.ConfigDict"),
        ("def get_config():\n    raise ValueError('choose one of a, b')\n", "choose one of a, b"),
        ("def get_config():\n    raise ValueError()\n", "ValueError"),
        ("def get_config():\n    open('no_such_rows.jsonl')\n", "No such file"),
        ("def get_config():\n    raise RuntimeError('a\\n b')\n", ", line 2: RuntimeError: a; b"),
        ("import sys\ndef get_config():\n    sys.exit(3)\n", ", line 3: SystemExit: 3"),
        ("import os\nos.kill('a')\n", ", line 2: TypeError: kill"),
        ("class Mine(Exception): ...\ndef get_config():\n    raise Mine(2)\n", ", line 3: Mine: 2"),
        ("def get_config(kind):\n    return kind\n", "TypeError: get_config() missing 1 required"),
        ("def gt_config():\n    return 1\n", "recipe.py: has no get_config()"),
        (f"{EMPTY}    c.dta.length = 3\n", ", line 4: AttributeError: 'dta'; Did you mean"),
        (f"{EMPTY}    return c['stagse']\n", ", line 4: KeyError: 'stagse'; Did you mean"),
        (f"{EMPTY}    c.data.length = '3'\n", ", line 4: TypeError: Could not override field"),
        (
            "from medmoe_jax.training.config import stage\n"
            "def get_config():\n    return stage(stps=3)\n",
            "no field stps; known: after",
        ),
    ],
)
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "recipe.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([f"--config={file}"])
    assert words in str(caught.value)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truth_value_is_no_number():
    """Python counts with it, and ml-collections makes 1.0 of it."""
    align = "stages.align"
    bank = {**medcare.get_config("qwen2-1.5b").stages.align.banks.alignment, "alpha": True}
    for field, value in (
        (f"{align}.learning_rate", True),
        (f"{align}.clip", False),
        (f"{align}.steps", True),
        (f"{align}.banks.alignment.alpha", True),
        (f"{align}.banks.alignment", bank),
        (f"{align}.losses.orthogonality.weight", True),
        (f"{align}.mixture", {"alignment": True}),
        ("run.profile", (True, 3)),
        ("run.mesh.fsdp", True),
    ):
        with pytest.raises(UserError, match=rf"{field}.*: (True|False) is not a (whole )?number"):
            configuration("medcare:qwen2-1.5b", {field: value})
    assert configuration("medcare:qwen2-1.5b", {f"{align}.clip": 2}).stages.align.clip == 2.0
    with pytest.raises(UserError, match="clip: True is not a number"):
        variants("medcare:qwen2-1.5b", "align", {"other": {"clip": True}})


OF_ONE_OBJECT = """
from ml_collections import FrozenConfigDict, config_dict
from medmoe_jax.training.config import bank, recipe, source, stage

def get_config(kind=""):
    c = recipe()
    rows, lora = source("rows.jsonl"), bank(sites=("attn.*",), rank=8)
    c.data.sources.train = c.data.sources.held_out = rows
    first = stage(banks={"one": lora}, mixture={"train": 1.0})
    second = stage(after="first", banks={"two": lora}, mixture={"train": 1.0})
    c.stages.order = ("first", "second", "third")
    c.stages.first, c.stages.second, c.stages.third = first, second, second
    c.data.shards = c.data.get_ref("global_batch")
    if kind == "required":
        del c.stages.first["steps"]
        c.stages.first.steps = config_dict.required_placeholder(int)
    return FrozenConfigDict(c) if kind == "frozen" else c
"""


@pytest.mark.parametrize("frozen", ["", ":frozen"])
@pytest.mark.parametrize("how", ["command line", "file", "configuration"])
def test_places_with_one_object_are_set_one_by_one(tmp_path, how, frozen):
    (tmp_path / "recipe.py").write_text(OF_ONE_OBJECT)
    file = f"{tmp_path / 'recipe.py'}{frozen}"
    changes = {
        "stages.second.banks.two.rank": 2,
        "data.sources.held_out.path": "held_out.jsonl",
        "stages.third.epochs": 3.0,
        "data.global_batch": 32,
    }
    if how == "command line":
        typed = [f"--config.{name}={value}" for name, value in changes.items()]
        found = load_config([f"--config={file}", *typed])
    else:
        found = configuration(file if how == "file" else configuration(file), changes)
    stages, sources = found.stages, found.data.sources
    assert [stages.first.banks.one.rank, stages.second.banks.two.rank] == [8, 2]
    assert stages.third.banks.two.rank == 8
    assert [stages.second.epochs, stages.third.epochs] == [1.0, 3.0]
    assert [sources.train.path, sources.held_out.path] == ["rows.jsonl", "held_out.jsonl"]
    follows = how != "configuration" and not frozen
    assert found.data.shards == (32 if follows else 8) and found.is_locked


def test_a_required_field_may_come_from_the_command_line(tmp_path):
    (tmp_path / "recipe.py").write_text(OF_ONE_OBJECT)
    file = f"--config={tmp_path / 'recipe.py'}:required"
    assert load_config([file, "--config.stages.first.steps=3"]).stages.first.steps == 3
    with pytest.raises(UserError, match=r"stages\.first\.steps: None is not a whole number"):
        load_config([file])


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("run.mesh={'data':2}", "run.mesh.fsdp=3"),
        (
            "data.sources.knowledge.columns={'prompt':'B'}",
            "data.sources.knowledge.columns.prompt=A",
        ),
        ("stages.align.banks={}", "stages.align.banks.alignment.rank=3"),
    ],
)
def test_a_section_and_a_field_of_it_do_not_mix(section, field):
    for order in ((section, field), (field, section)):
        with pytest.raises(UserError, match="sets all fields of its section; give one of the two"):
            load_config([MEDCARE, *(f"--config.{one}" for one in order)])


def test_a_recipe_by_its_name():
    """The same as by its file, with its argument and with fields."""
    words = "qwen2-1.5b,paper", "--config.run.log_every=3"
    named = load_config([f"--config=medcare:{words[0]}", words[1]])
    assert named.to_dict() == load_config([f"{MEDCARE}:{words[0]}", words[1]]).to_dict()
    assert named.run.log_every == 3


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    """Whoever has a file of that name here means it."""
    text = (
        "from medmoe_jax.training.config import recipe\n\ndef get_config():\n    return recipe()\n"
    )
    (tmp_path / "medcare").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert not load_config(["--config=medcare"]).stages.order


def test_no_file():
    with pytest.raises(UserError, match="--config is missing: a file, or one of apollo_moe"):
        load_config([])
    with pytest.raises(UserError, match="no recipe is called 'medcara'; did you mean 'medcare'"):
        load_config(["--config=medcara:qwen2-1.5b"])
    with pytest.raises(UserError, match=r"there is no file 'nowhere\.py'"):
        load_config(["--config=nowhere.py:arg"])
    with pytest.raises(UserError, match="give BASE or BASE,paper with BASE one of qwen1"):
        load_config([f"{MEDCARE}:gpt-5"])


# Variant: experts, first of the 24 layers, picks, its forms in full and low-rank.
APOLLO = {
    "": (7, 22, 2, "ffn", "ffn_lora"),
    ",language_family": (7, 22, 2, "ffn", "ffn_lora"),
    ",post_moe": (12, 22, 2, "ffn", "ffn_lora"),
    ",hybrid": (12, 0, 2, "ffn", "ffn_lora"),
    ",language_specific": (12, 22, 1, "ffn_beside", "lora"),
}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("variant", APOLLO)
def test_apollo_moe_puts_language_experts_into_the_last_layers(variant, low_rank):
    config = load_config([f"{APOLLO_MOE}:qwen2-0.5b{variant}{',lora' * low_rank}"])
    (stage,) = parse(config, preset("qwen2-0.5b"))
    (bank,) = stage.added
    experts, start, top_k, *forms = APOLLO[variant]
    assert bank.experts == len(read_languages(config.data.languages).experts) == experts
    assert (bank.start, bank.stop, bank.top_k, bank.form) == (start, 24, top_k, forms[low_rank])
    assert (bank.gate, bank.forcing, bank.router_bias) == ("language", "train", False)
    assert bank.renormalise == (bank.form == "ffn_lora")
    assert stage.train_base == (() if low_rank else ("*",))


def test_apollo_moe_keeps_the_function_or_not():
    for words, kept in (("", False), (",hybrid,function_preserving", True)):
        config = load_config([f"{APOLLO_MOE}:qwen2-0.5b{words}"])
        assert config.stages.mixture.banks.experts.renormalise is kept
    for words, message in (
        (",hybrid,post_moe", r"give BASE\[,VARIANT\]\[,lora\]"),
        (",hibrid", "VARIANT one of language_family, post_moe"),
        (",language_specific,function_preserving", "leave out function_preserving"),
    ):
        with pytest.raises(UserError, match=message):
            load_config([f"{APOLLO_MOE}:qwen2-0.5b{words}"])


def test_open_mappings_take_any_key():
    options = "--config.data.template_options"
    config = load_config(
        [
            MEDCARE,
            f"{options}.enable_thinking=false",
            f"{options}.date=2026-01-31",
            f"{options}.level=3",
            "--config.data.sources.knowledge.columns.prompt=Question",
        ]
    )
    wanted = {"enable_thinking": False, "date": "2026-01-31", "level": 3}
    assert config.data.template_options.to_dict() == wanted
    assert config.data.sources.knowledge.columns.to_dict() == {"prompt": "Question"}
    assert config.is_locked
    for field in ("data.template_option.x=1", "data.sources.nowhere.columns.x=1", "data.x=1"):
        with pytest.raises(UserError, match="the configuration has no such field"):
            load_config([MEDCARE, f"--config.{field}"])
