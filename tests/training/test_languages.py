"""Languages from the table to the router, in training and in answers."""

import pytest

from configs import apollo_moe
from medmoe_jax.adapters.bank import abstract
from medmoe_jax.api.opening import open_model
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import source
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import tiny

TABLE = "code,expert\nen,west\nde,west\nzh,east\n"
STEPS = 2


def config_of(tmp_path, **bank):
    """Two experts inside the networks of the last layer; a fourth of the rows name no language."""
    (tmp_path / "table.csv").write_text(TABLE)
    codes = ["zh", "en", "de", ""]
    rows = [
        {"prompt": f"{word}?", "response": "yes" if n % 2 else "no", "language": codes[n % 4]}
        for n, word in enumerate((tiny.DRUGS + tiny.USES) * 2)
    ]
    config = tiny.medcare_config()
    config.data.languages = str(tmp_path / "table.csv")
    config.data.sources.rows = source(str(tiny.write_rows(tmp_path / "rows.jsonl", rows)))
    config.stages.order = ("mixture",)
    config.stages.mixture = apollo_moe.language_experts(
        2, (-1, None), "ffn_lora", mixture={"rows": 1.0}, steps=STEPS, epochs=0.0
    )
    config.stages.mixture.banks.experts.update({"rank": 2, "top_k": 1, **bank})
    return config


@pytest.mark.slow
def test_the_language_of_a_row_reaches_its_router(tmp_path):
    setup = open_setup(config_of(tmp_path, forcing="always"))
    run = Run(setup, tmp_path / "work")
    train(run)
    stage = tmp_path / "work/stages/mixture"
    forced = read_metrics(stage / "metrics.jsonl")[-1]["router"]
    assert forced["experts/mlp"]["forced"][0] > 0.1
    # "quinine? no" is too little to tell a language by.
    counts = {"named": 24, "detected": 0, "unknown": 8}
    assert Manifest.read(stage / "manifest.json").metrics["languages"] == {"rows": counts}
    # With one pick a token, an answer in a language uses that language's expert only.
    logs = {
        code: open_model(run, language=code).score(["Is it?"], [" yes"])
        for code in ("en", "de", "zh")
    }
    assert logs["en"] == logs["de"] != logs["zh"]
    # Where none is given, each text's own is detected.
    prompts = ["Wozu dient Aspirin? Gegen Schmerzen.", "阿司匹林有什么用？"]
    given = {
        code: open_model(run, language=code).score(prompts, [" yes"] * 2) for code in ("de", "zh")
    }
    detected = open_model(run).score(prompts, [" yes"] * 2)
    assert detected == [given["de"][0], given["zh"][1]] != given["de"]
    assert detected != given["zh"]
    # A language that joins a family later is answered by the banks as they are.
    (tmp_path / "table.csv").write_text(TABLE + "yo,west\n")
    grown = open_model(Run(open_setup(setup.config), tmp_path / "work"), language="yo")
    assert grown.score(["Is it?"], [" yes"]) == logs["en"]
    # One that was there may not change its family.
    (tmp_path / "table.csv").write_text(TABLE.replace("de,west", "de,east"))
    with pytest.raises(UserError, match=r"data\.languages\.de: 0 then, 1 now"):
        open_model(Run(open_setup(setup.config), tmp_path / "work"))


REFUSED = {
    "no_table": ({"languages": ""}, {}, r"gate 'language' needs a table.*data\.languages"),
    "experts": ({}, {"experts": 3}, r"mixture\.banks\.experts\.experts: 3, but.*has 2 \(west"),
    "unknown": ({"languages": "none"}, {}, r"data\.languages: 'none' is neither a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    data, bank, message = REFUSED[name]
    config = config_of(tmp_path, **bank)
    config.data.update(data)
    with pytest.raises(UserError, match=message):
        open_setup(config)


def test_a_language_joins_a_family_without_a_new_parameter(tmp_path):
    def shapes(config):
        setup = open_setup(config)
        (stage,) = setup.stages
        return setup, [abstract(spec, setup.base.config) for spec in stage.added]

    config = config_of(tmp_path)
    before, small = shapes(config)
    (tmp_path / "table.csv").write_text(TABLE + "yo,west\n")
    after, grown = shapes(config)
    assert small == grown and after.language_expert("yo") == after.language_expert("en") == 0
    with pytest.raises(UserError, match="'yo' is not in the table"):
        before.language_expert("yo")
    (tmp_path / "table.csv").write_text(TABLE + "yo,south\n")
    with pytest.raises(UserError, match=r"experts: 2, but data\.languages has 3"):
        open_setup(config)


def test_a_row_in_a_language_without_an_expert(tmp_path):
    config = config_of(tmp_path, forcing="always")
    rows = [{"prompt": "a", "response": "b", "language": code} for code in ("en", "xx")]
    config.data.sources.rows.path = str(tiny.write_rows(tmp_path / "bad.jsonl", rows))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: the row is in 'xx'"):
        train(Run(open_setup(config), tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_an_unknown_language_on_the_command_line(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="language: 'sw' is not in the table; known: en, de, zh"):
        open_setup(config).language_expert("sw")
    config.data.languages = ""
    config.stages.mixture.banks.experts.forcing = "off"
    with pytest.raises(UserError, match="the recipe has no table of languages"):
        open_setup(config).language_expert("en")
