"""`medmoe route`, and what the other commands make of the weights it found."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.checkpoints import huggingface, peft
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.cli.main import main
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import naive, skills, tiny
from tests.randomised import randomise
from tests.several import Several

pytestmark = pytest.mark.slow  # what all of them look at takes so long
NAMES = tuple(skills.table())
CONFIG = """from tests import skills

def get_config():
    return skills.config("{}")
"""


def write_config(folder, gate="global"):
    """`--config=` of the tiny skills."""
    file = folder / f"{gate}.py"
    file.write_text(CONFIG.format(gate))
    return f"--config={file}"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`--data=` of two tasks."""
    folder = tmp_path_factory.mktemp("rows")
    rows = {"one": tiny.alignment_rows()[:6], "two": tiny.knowledge_rows()[:8]}
    return [f"--data={k}={tiny.write_rows(folder / f'{k}.jsonl', v)}" for k, v in rows.items()]


@pytest.fixture(scope="module")
def routed(config, files, tmp_path_factory):
    """A work directory with both tasks fitted; what was printed lies beside it."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    shutil.copytree(skills.randomised(), workdir)
    assert route(config, workdir, *files) == 0
    return workdir


def route(config, workdir, *options):
    return main(["route", config, f"--workdir={workdir}", "--method=cma", "--steps=4", *options])


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"medmoe {arguments[0]}: error: "), error
    return error


def test_weights_are_printed_written_and_drawn(config, files, routed, tmp_path, capsys):
    """The second time nothing is searched, and everything is shown again."""
    assert route(config, routed, *files, f"--output={tmp_path / 'out'}") == 0
    printed, notes = capsys.readouterr()
    assert notes.count("is finished: skipped") == 2 and "written to" in printed
    found = json.loads((routed / "mixing.json").read_text())
    assert found == json.loads((tmp_path / "out" / "mixing.json").read_text())
    assert list(found) == ["one", "two"]
    for task, rows in (("one", 6), ("two", 8)):
        fit = found[task]
        assert (fit["skills"], fit["rows"]) == (list(NAMES), rows)
        assert fit["loss"] < fit["loss_before"] - 0.01
        (weights,) = fit["weights"]
        assert np.abs(weights).min() > 1e-3
        for number in (*weights,):
            assert f"{number:.3f}" in notes
        assert f"{fit['loss']:.4f}" in notes and f"{fit['loss_before']:.4f}" in notes
    assert all(name in notes for name in (*NAMES, "one", "two"))
    image = (tmp_path / "out" / "mixing.png").read_bytes()
    assert image == (routed / "mixing.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 5000
    different = [np.ravel(found[task]["weights"]) for task in ("one", "two")]
    assert np.abs(different[0] - different[1]).max() > 0.01


@pytest.mark.processes
def test_two_processes_find_the_same_weights(config, files, routed, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(skills.randomised(), workdir)
    command = ["route", config, f"--workdir={workdir}", "--method=cma", "--steps=4", *files]
    with Several(tmp_path, [command] * 2) as both:
        assert both.statuses() == [0, 0], both.printed(0)[-3000:] + both.printed(1)[-3000:]
        assert "written to" in both.printed(0) and "written to" not in both.printed(1)
    assert (workdir / "mixing.png").read_bytes().startswith(b"\x89PNG")
    pairs = [json.loads((w / "mixing.json").read_text()) for w in (workdir, routed)]
    for task in skills.TASKS:
        two, one = (found[task] for found in pairs)
        np.testing.assert_allclose(two["weights"], one["weights"], rtol=1e-3)
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)


def test_the_other_commands_take_the_task_as_a_stage(config, routed, tmp_path, capsys):
    assert main(["train", config, f"--workdir={routed}"]) == 0
    assert "stage 'two' was not trained here: skipped" in capsys.readouterr().err
    rows = [{"prompt": "aspirin: yes or no, pain?", "completion": "yes"}]
    source = tiny.write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    scores = []
    for stage in ("base", "one", "two"):
        arguments = [f"--workdir={routed}", f"--stage={stage}", f"--input={source}"]
        assert main(["score", config, *arguments, f"--output={out}"]) == 0
        scores.append(json.loads(out.read_text())["logprob"])
    assert scores[1] > scores[0] and abs(scores[1] - scores[2]) > 1e-3


@pytest.fixture(scope="module")
def mixed(routed, tmp_path_factory):
    """The run with weights so large that each of them matters."""
    return randomise(routed, tmp_path_factory.mktemp("mixed") / "w", size=0.5)


def logits_of(kind, folder):
    setup = open_setup(skills.config())
    batch = naive.random_batch(setup.base.config)
    if kind == "hf":
        config, params = huggingface.load(folder, jnp.float32)
        return naive.logits(config, params, batch)[..., : tiny.tokenizer().vocab_size]
    base = setup.load_base
    spec, params, *_ = peft.read_peft(folder, setup.base.config, "llama", "adapter", base)
    linear = naive.adapted((spec,), {"adapter": params})
    return naive.logits(setup.base.config, setup.load_base(), batch, linear)[
        ..., : tiny.tokenizer().vocab_size
    ]


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_fixed_weights_fold(kind, config, mixed, tmp_path):
    """Against the skills' own banks beside the base, each with its s times its weight."""
    assert main(["export", config, f"--workdir={mixed}", "--stage=two", f"--format={kind}",
                 f"--output={tmp_path / 'out'}"]) == 0  # fmt: skip
    got = logits_of(kind, tmp_path / "out")
    setup = open_setup(skills.config())
    alone = open_trained(Run(setup, mixed), NAMES[-1])
    stacked = open_trained(Run(setup, mixed), "two").banks["skills"]
    (weights,) = np.asarray(stacked["mix"]["weight"], np.float64)
    specs = [alone.roster[name][0] for name in NAMES]
    batch = naive.random_batch(setup.base.config)

    def want(mixture, banks):
        scales = {name: 2.0 * w for name, w in zip(NAMES, mixture, strict=True)}
        linear = naive.adapted(specs, banks, scales)
        logits = naive.logits(setup.base.config, alone.base, batch, linear)
        return logits[..., : tiny.tokenizer().vocab_size]

    banks = unstacked(stacked)
    assert naive.rel(got, want(weights, banks)) <= 1e-5
    assert naive.rel(got, want(0 * weights, banks)) >= 0.1
    for e in range(3):
        without = weights * (np.arange(3) != e)
        assert naive.rel(got, want(without, banks)) >= 0.02, NAMES[e]


def unstacked(params):
    """Banks of one expert each; s = 2 of each skill has moved into Λ."""
    sites = {site: leaves for site, leaves in params.items() if site != "mix"}
    return {
        name: {
            site: {
                "lora_a": leaves["lora_a"][:, :, e : e + 1],
                "lora_b": leaves["lora_b"][:, e : e + 1],
                "scale": leaves["scale"][:, e : e + 1] / 2.0,
            }
            for site, leaves in sites.items()
        }
        for e, name in enumerate(NAMES)
    }


def test_bad_input(config, files, routed, tmp_path, capsys):
    here = ["route", config, f"--workdir={routed}"]
    line = fails(capsys, *here, "--data=one")
    assert "--data: 'one' is not TASK=FILE" in line
    line = fails(capsys, *here, files[0], files[0])
    assert "task 'one' is given twice" in line
    line = fails(capsys, *here, "--data=one=nowhere.jsonl")
    assert "--data: one: there is no file or folder 'nowhere.jsonl'" in line
    file = files[0].split("=")[-1]
    line = fails(capsys, *here, f"--data=three={file}")
    assert "stage: 'three' is none of facts, verdict, both, one, two" in line
    line = fails(capsys, *here, f"--data=facts={file}")
    assert "stage 'facts' does not train the mixing weights" in line
    assert "--steps: 0 is below 1" in fails(capsys, *here, files[0], "--steps=0")
    line = fails(capsys, "route", write_config(tmp_path, "token"), here[2], files[0])
    assert "stage 'one' does not train the mixing weights" in line and "medmoe train" in line
    line = fails(capsys, "route", config, f"--workdir={tmp_path / 'w'}", files[0])
    assert "stage 'facts' is not finished" in line
    assert not (tmp_path / "w").exists()
    line = fails(capsys, *here, files[0], "--steps=9")
    assert "was made by another recipe; imported.method: 'cma' then, 'gradient' now" in line


def test_bad_rows(config, tmp_path, capsys):
    here = ["route", config, f"--workdir={skills.randomised()}"]
    for name, text, words in (
        ("empty.jsonl", "", "empty.jsonl: no row in it"),
        ("bad.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"\n', "line 2: not valid JSON"),
        ("half.jsonl", '{"prompt": "a"}\n', "needs one conversation"),
        ("rows.txt", "a", "unknown file ending"),
    ):
        (tmp_path / name).write_text(text)
        line = fails(capsys, *here, f"--data=one={tmp_path / name}")
        assert name in line and words in line
    assert not StageFolder.of(skills.randomised(), "one").path.exists()
