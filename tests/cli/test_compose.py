"""A fifth method from the algebra alone: skills by AdaLoRA, then an orthogonal alignment on top.

The recipe stands here and in configs/; nothing in the library knows of it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import medcare
from medmoe_jax.checkpoints import huggingface, peft
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.cli.main import main
from medmoe_jax.training.config import bank, orthogonality
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import naive, skills, tiny
from tests.randomised import randomise

pytestmark = pytest.mark.slow

CONFIG = """from tests.cli import test_compose

def get_config():
    return test_compose.fifth_method()
"""


def fifth_method():
    """Three skills, their weights for a task, and MedCare's second stage against all of them."""
    config = skills.config(tasks=("one",))
    config.stages.align = medcare.align(
        after="one",
        merge=(),
        drop=(),
        states={"skills": "frozen"},
        banks={"alignment": bank(sites=("mlp.*",), rank=2, alpha=4.0)},
        losses={"orthogonality": orthogonality("alignment", "skills", weight=3.0)},
        mixture={"alignment": 1.0},
        steps=10,
        learning_rate=3e-2,
    )
    config.stages.order = (*config.stages.order, "align")
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "fifth.py"
    file.write_text(CONFIG)
    return f"--config={file}"


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    assert main(["train", config, f"--workdir={path}"]) == 0
    return path


def test_it_trains(workdir):
    """The alignment learns, away from the directions of the skills, which stay as they were."""
    log = read_metrics(StageFolder.of(workdir, "align").metrics)
    term = [row["orthogonality/alignment-skills"] for row in log]
    assert term[-1] < 0.8 * term[0] and log[0]["orthogonality/alignment-skills/gradient_norm"] > 0
    assert log[-1]["loss"] < log[0]["loss"]
    setup = open_setup(fifth_method())
    before, after = (open_trained(Run(setup, workdir), name) for name in ("one", "align"))
    jax.tree.map(np.testing.assert_array_equal, before.banks["skills"], after.banks["skills"])
    assert {name: state for name, (_, state) in after.roster.items()} == {
        "skills": "frozen",
        "alignment": "train",
    }
    assert after.roster["skills"][0].experts == 3
    manifest = json.loads(StageFolder.of(workdir, "align").manifest.read_text())
    assert manifest["after"] == "one" and set(manifest["banks"]) == {"skills", "alignment"}


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_it_folds(kind, config, workdir, tmp_path):
    """Exported = beside the base, and every skill, weight and bank counts."""
    work = randomise(workdir, tmp_path / "w", size=0.5)
    assert main(["export", config, f"--workdir={work}", f"--format={kind}",
                 f"--output={tmp_path / 'out'}"]) == 0  # fmt: skip
    setup = open_setup(fifth_method())
    batch = naive.random_batch(setup.base.config)
    used = tiny.tokenizer().vocab_size
    if kind == "hf":
        decoder, params = huggingface.load(tmp_path / "out", jnp.float32)
        got = naive.logits(decoder, params, batch)[..., :used]
    else:
        found = peft.read_peft(
            tmp_path / "out", setup.base.config, "llama", "adapter", setup.load_base
        )
        spec, params = found.spec, found.params
        linear = naive.adapted((spec,), {"adapter": params})
        got = naive.logits(setup.base.config, setup.load_base(), batch, linear)[..., :used]
    trained = open_trained(Run(setup, work), "align")
    skill_spec, alignment = (trained.roster[name][0] for name in ("skills", "alignment"))
    mix_E = np.asarray(trained.banks["skills"]["mix"]["weight"], np.float64)[0]

    def want(mix_E, scale=1.0):
        sites = {k: v for k, v in naive.f64(trained.banks["skills"]).items() if k != "mix"}
        weighted = {
            site: {**leaves, "scale": leaves["scale"] * mix_E[None, :, None]}
            for site, leaves in sites.items()
        }
        banks = {"skills": weighted, "alignment": trained.banks["alignment"]}
        specs = (skill_spec.replace(gate="always"), alignment)
        linear = naive.adapted(specs, banks, {"alignment": scale * 2.0})
        return naive.logits(setup.base.config, trained.base, batch, linear)[..., :used]

    assert naive.rel(got, want(mix_E)) <= 1e-5
    for e in range(3):
        assert naive.rel(got, want(mix_E * (np.arange(3) != e))) >= 0.02
    assert naive.rel(got, want(mix_E, scale=0.0)) >= 0.02
    assert naive.rel(got, want(0 * mix_E, scale=0.0)) >= 0.1
