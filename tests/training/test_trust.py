"""What is damaged, changed or mixed up in a work directory or a base is named, and not used.

Each damage is one of a kind: a record that is gone, cut or edited, or that is of another stage,
step or run.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as hf

from medmoe_jax.api.opening import open_stage
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.records import read_record, write_record
from medmoe_jax.checkpoints.stage_records import kept_files
from medmoe_jax.cli.main import main
from medmoe_jax.data.layouts import Layout
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import bank, recipe, source, stage
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import open_trained
from tests import gguf_files, tiny

pytestmark = pytest.mark.slow

FIRST, LAST = "aggregate", "align"


@pytest.fixture(scope="module")
def setup():
    return open_setup(tiny.medcare_config())


@pytest.fixture(scope="module")
def other():
    """A finished run like the tiny one, its rows in another order: all shapes are the same."""
    config = tiny.medcare_config()
    config.data.seed = 9
    run = Run(open_setup(config), tiny.folder() / "other-order")
    return tiny.once(run.workdir, lambda _: train(run))


@pytest.fixture
def workdir(tmp_path):
    """Both stages are finished."""
    return shutil.copytree(tiny.trained()[1], tmp_path / "w")


@pytest.fixture
def unfinished(workdir):
    """The last stage has the checkpoints of steps 8 and 12, and no end."""
    folder = StageFolder.of(workdir, LAST)
    folder.manifest.unlink()
    shutil.rmtree(folder.final)
    return workdir


def at(workdir, name) -> Path:
    """`align/final`: a path in the folder of the stages."""
    return Path(workdir, "stages", name)


def remove(name):
    def damage(workdir, other):
        path = at(workdir, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def edit(name, change):
    """A JSON file after a change in place, which its own fingerprint does not know of."""

    def damage(workdir, other):
        value = json.loads(at(workdir, name).read_text())
        change(value)
        at(workdir, name).write_text(json.dumps(value))

    return damage


def forge(name, change):
    """The same, with a fingerprint that fits: only what stands on the record can tell."""

    def damage(workdir, other):
        value, _ = read_record(at(workdir, name))
        change(value)
        write_record(at(workdir, name), value)

    return damage


def rewrite(name, change):
    """A file after a change of its bytes."""

    def damage(workdir, other):
        at(workdir, name).write_bytes(change(at(workdir, name).read_bytes()))

    return damage


def swap(one, two):
    def damage(workdir, other):
        a, b, aside = at(workdir, one), at(workdir, two), at(workdir, "aside")
        a.rename(aside)
        b.rename(a)
        aside.rename(b)

    return damage


def take(name, link=False):
    """What another run has at that place, copied or linked."""

    def damage(workdir, other):
        remove(name)(workdir, other)
        if link:
            at(workdir, name).symlink_to(at(other, name))
        elif at(other, name).is_dir():
            shutil.copytree(at(other, name), at(workdir, name))
        else:
            shutil.copy(at(other, name), at(workdir, name))

    return damage


def copy(one, two):
    """One thing of the run in the place of another."""

    def damage(workdir, other):
        remove(two)(workdir, other)
        kind = shutil.copytree if at(workdir, one).is_dir() else shutil.copy
        kind(at(workdir, one), at(workdir, two))

    return damage


def flip(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 16]) + content[half + 1 :]


def lines(change):
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


def put(**fields):
    return lambda value: value.update(fields)


def in_metrics(name, value):
    return lambda manifest: manifest["metrics"].update({name: value})


def edited_report(workdir, other):
    """Another score than the one that was found at the stage's end."""
    folder = StageFolder.of(workdir, LAST)
    folder.report.write_text('{"score": 0.5}')
    forge("align/manifest.json", put(files=kept_files(folder)))(workdir, other)
    folder.report.write_text('{"score": 0.9}')


CHANGED, GONE = "was changed after it was written", "no such file"
# What is done to a finished run, and what is said of which file.
FINISHED = {
    "recipe-gone": (remove("aggregate/recipe.json"), f"aggregate/recipe.json: {GONE}"),
    "last-recipe-gone": (remove("align/recipe.json"), f"align/recipe.json: {GONE}"),
    "recipe-edited": (
        edit("aggregate/recipe.json", lambda r: r["recipe"]["stage"].update(learning_rate=1)),
        f"aggregate/recipe.json: {CHANGED}",
    ),
    "recipe-forged": (
        forge("aggregate/recipe.json", lambda r: r["recipe"]["stage"]["banks"].popitem()),
        "aggregate(/manifest.json is of another recipe| was made by another recipe)",
    ),
    "recipe-cut": (rewrite("align/recipe.json", lambda b: b[:-9]), "align/recipe.json, line"),
    "recipe-empty": (rewrite("align/recipe.json", lambda b: b""), "align/recipe.json, line 1"),
    "recipe-is-a-list": (
        rewrite("align/recipe.json", lambda b: b"[]"),
        "align/recipe.json: .*a JSON object",
    ),
    "recipe-no-text": (rewrite("align/recipe.json", lambda b: b"\xff"), "align/recipe.json"),
    "recipe-of-an-older-version": (
        edit("align/recipe.json", lambda r: r.pop("format")),
        "align/recipe.json: its format is None and not 2: another version",
    ),
    "recipe-of-another-stage": (
        copy("aggregate/recipe.json", "align/recipe.json"),
        "align/recipe.json is of stage 'aggregate' and not of 'align'",
    ),
    "manifest-edited": (edit("align/manifest.json", put(steps=13)), f"manifest.json: {CHANGED}"),
    "manifest-of-older-shape": (
        edit("align/manifest.json", lambda m: (m.pop("format"), m.pop("fingerprint"))),
        "align/manifest.json: its format",
    ),
    "ranks-edited": (
        edit("align/manifest.json", in_metrics("ranks", {"alignment": {"attn.q": [[1]]}})),
        f"align/manifest.json: {CHANGED}",
    ),
    "languages-edited": (
        edit("aggregate/manifest.json", in_metrics("languages", {"knowledge": {"named": 1}})),
        f"aggregate/manifest.json: {CHANGED}",
    ),
    "bank-state-edited": (
        edit("align/manifest.json", lambda m: m["banks"]["knowledge"].update(state="train")),
        f"align/manifest.json: {CHANGED}",
    ),
    "manifest-cut": (rewrite("align/manifest.json", lambda b: b[:50]), "align/manifest.json, line"),
    "manifest-of-another-stage": (
        copy("aggregate/manifest.json", "align/manifest.json"),
        "align/manifest.json is of another stage",
    ),
    "manifest-of-another-run": (
        take("aggregate/manifest.json"),
        "aggregate/manifest.json is of another recipe",
    ),
    "parent-of-another-stage": (
        forge("align/manifest.json", put(parent_fingerprint="0123456789abcdef")),
        r"align/manifest.json is of another end of the stage before \(0123",
    ),
    "parent-forged": (
        forge("aggregate/manifest.json", put(content="0123456789abcdef")),
        "(end of the stage before|after: .* then, '0123)",
    ),
    "final-gone": (remove("align/final"), "align/final/SEAL.json is damaged"),
    "final-of-another-run": (take("align/final"), "align/final is not what .*manifest.json names"),
    "final-is-a-link": (take("aggregate/final", link=True), "aggregate/final is not what"),
    "final-of-another-stage": (swap("align/final", "aggregate/final"), "/final is not what"),
    "final-seal-gone": (remove("align/final/SEAL.json"), "align/final/SEAL.json is damaged"),
    "final-seal-edited": (
        edit("align/final/SEAL.json", lambda s: s["files"].popitem()),
        f"align/final/SEAL.json: {CHANGED}",
    ),
    "final-seal-forged": (
        forge("align/final/SEAL.json", lambda s: s["of"].update(stage="more")),
        "align/final is not what",
    ),
    "final-flipped": (rewrite("align/final/banks/_METADATA", flip), "_METADATA is damaged"),
    "final-with-more": (
        lambda w, o: at(w, "align/final/banks/more").write_text("x"),
        "align/final/banks/more is damage: no such file",
    ),
    "stages-swapped": (swap("aggregate", "align"), "recipe.json is of stage 'align' and not of"),
    "stage-of-another-run": (take("aggregate"), "(end of the stage before|data.seed: 9 then)"),
    "metrics-gone": (remove("align/metrics.jsonl"), "align/metrics.jsonl .* the file is gone"),
    "metrics-cut": (
        rewrite("align/metrics.jsonl", lines(lambda x: x[:-1])),
        "align/metrics.jsonl is damaged: .* bytes instead of",
    ),
    "metrics-edited": (
        rewrite("aggregate/metrics.jsonl", lambda b: b.replace(b'"loss": ', b'"loss":-', 1)),
        "aggregate/metrics.jsonl is damaged: its content",
    ),
    "metrics-of-another-run": (take("align/metrics.jsonl"), "align/metrics.jsonl is damaged"),
    "report-edited": (edited_report, "align/report.json is damaged: its content"),
}
# What is done to a run whose last stage has not ended.
UNFINISHED = {
    "steps-swapped": (swap("align/steps/8", "align/steps/12"), "align/steps/12 is not of this pl"),
    "step-renamed": (
        lambda w, o: at(w, "align/steps/12").rename(at(w, "align/steps/16")),
        "align/steps/16 is not of this place: .*step 12 and not 16",
    ),
    "step-of-another-run": (
        take("align/steps/12"),
        "align/steps/12 is not of this place: .*recipe",
    ),
    "steps-linked": (take("align/steps", link=True), "align/steps/12 is not of this place"),
    "step-of-another-stage": (
        copy("aggregate/steps/12", "align/steps/12"),
        "align/steps/12 is not of this place: .*stage 'aggregate' and not 'align'",
    ),
    "steps-all-flipped": (
        lambda w, o: [rewrite(f"align/steps/{n}/state/_METADATA", flip)(w, o) for n in ("8", "12")],
        "no checkpoint in .*align/steps is usable",
    ),
    "recipe-gone": (remove("align/recipe.json"), f"align/recipe.json: {GONE}"),
    "recipe-edited": (
        edit("align/recipe.json", lambda r: r["recipe"].update(after="")),
        f"align/recipe.json: {CHANGED}",
    ),
    "recipe-forged": (
        forge("align/recipe.json", lambda r: r["recipe"]["data"].update(seed=1)),
        "align was made by another recipe; data.seed: 1 then, 0 now",
    ),
    "metrics-gone": (remove("align/metrics.jsonl"), "align/metrics.jsonl is gone"),
    "metrics-cut": (
        rewrite("align/metrics.jsonl", lines(lambda x: x[:5])),
        "align/metrics.jsonl does not hold the lines up to step 12",
    ),
    "metrics-edited": (
        rewrite("align/metrics.jsonl", lambda b: b.replace(b'"loss": ', b'"loss":-', 1)),
        "align/metrics.jsonl does not hold the lines up to step 12",
    ),
    "metrics-doubled": (
        rewrite("align/metrics.jsonl", lines(lambda x: [*x, x[-1]])),
        "align/metrics.jsonl holds more lines up to step 12 than it did",
    ),
    "metrics-with-another-line": (
        rewrite("align/metrics.jsonl", lambda b: b + b"[]\n"),
        "align/metrics.jsonl, line 13: not a JSON object",
    ),
    "metrics-no-text": (
        rewrite("align/metrics.jsonl", lambda b: b"\xff" + b[1:]),
        "align/metrics.jsonl does not hold",
    ),
    "metrics-of-another-run": (
        take("align/metrics.jsonl"),
        "align/metrics.jsonl does not hold the lines",
    ),
    "parent-of-another-run": (
        take("aggregate"),
        "aggregate was made by another recipe; data.seed: 9 then, 0 now",
    ),
    "parent-final-of-another-run": (take("aggregate/final"), "aggregate/final is not what"),
}


def content(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def check_named(act, words, folder):
    """One error of the user's kind names the file and says what to do; nothing was written."""
    before = content(folder)
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        act()
    said = str(caught.value)
    assert re.search(r"or remove |remove the folder|another version|Use another workdir", said), (
        said
    )
    assert str(folder) in said and "\n" not in said
    assert content(folder) == before


@pytest.mark.parametrize("name", FINISHED)
def test_a_damaged_finished_run(name, setup, workdir, other):
    damage, words = FINISHED[name]
    damage(workdir, other)
    run = Run(setup, workdir)
    check_named(lambda: open_trained(run, LAST), words, workdir)
    check_named(lambda: train(run), words, workdir)


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_damaged_unfinished_run(name, setup, unfinished, other):
    damage, words = UNFINISHED[name]
    damage(unfinished, other)
    check_named(lambda: train(Run(setup, unfinished)), words, unfinished)


def test_a_run_that_is_only_copied_is_used(setup, workdir):
    """The control: no damage, other times and layout of the files, nothing is said."""
    for path in workdir.rglob("*.json"):
        os.utime(path, (1, 1))
    for name in ("aggregate/recipe.json", "align/manifest.json"):
        at(workdir, name).write_text(json.dumps(json.loads(at(workdir, name).read_text())))
    train(Run(setup, workdir))
    assert open_trained(Run(setup, workdir), LAST).stage == LAST


CONFIG = "from tests import tiny\n\nget_config = tiny.medcare_config\n"


def test_a_manifest_that_is_gone_is_made_anew_by_training_alone(setup, workdir):
    """Nothing else takes the stage before for the last one."""
    run, path = Run(setup, workdir), StageFolder.of(workdir, LAST).manifest
    before = Manifest.read(path)
    path.unlink()
    with pytest.raises(UserError, match=r"align/manifest\.json: no such file.* let medmoe train"):
        open_stage(run)
    StageFolder.of(workdir, FIRST).manifest.unlink()
    with pytest.raises(UserError, match="stage 'aggregate' is not finished"):
        open_trained(run, LAST)
    train(run)
    after = Manifest.read(path)
    assert open_stage(run).stage == LAST
    assert (after.content, after.files) == (before.content, before.files)


COMMANDS = {
    "train": [],
    "eval": ["--tasks={items}"],
    "generate": ["What is aspirin for?"],
    "score": ["--input={rows}", "--output={out}"],
    "export": ["--format=peft", "--output={out}"],
    "analyze": ["--data=knowledge", "--out={out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_in_one_line(command, workdir, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(CONFIG)
    items = tiny.write_rows(tmp_path / "items.jsonl", [{"prompt": "x", "answer": "yes"}])
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": "yes"}])
    at(workdir, "aggregate/metrics.jsonl").unlink()
    places = {"items": items, "rows": rows, "out": tmp_path / "out"}
    more = [argument.format(**places) for argument in COMMANDS[command]]
    action = ["routing"] if command == "analyze" else []
    line = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={workdir}"]
    assert main([command, *action, *line, *more]) == 1
    (said,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    assert "aggregate/metrics.jsonl is damaged: the file is gone; put back" in said
    assert not (tmp_path / "out").exists()


def changed_base(folder, **fields):
    shutil.copytree(tiny.base_path(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    config = tiny.medcare_config()
    config.base.path = str(folder)
    return open_setup(config)


def test_a_base_with_other_fields_is_another_base(tmp_path):
    """The weights are the same, and what they compute is not."""
    workdir = tiny.trained()[1]
    for number, (fields, words) in enumerate(
        (
            ({"rope_theta": 20000.0}, "base.architecture.rope_theta: 10000 then, 20000 now"),
            ({"rms_norm_eps": 1e-3}, r"base.architecture.norm_eps: 1e-06 then, 0.001 now"),
            (
                {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
                "base.architecture.rope_scaling",
            ),
            ({"max_position_embeddings": 64}, "base.architecture.max_positions: 128 then, 64 now"),
        )
    ):
        run = Run(changed_base(tmp_path / str(number), **fields), workdir)
        for act in (lambda run=run: open_trained(run, LAST), lambda run=run: train(run)):
            with pytest.raises(UserError, match=words):
                act()


def test_fields_that_change_no_number_are_no_matter(tmp_path):
    fields = {"transformers_version": "9.9", "torch_dtype": "float16", "use_cache": False}
    same = changed_base(tmp_path / "b", rope_theta=10000, **fields)
    assert open_trained(Run(same, tiny.trained()[1]), LAST).stage == LAST


def hugging_face(folder, template="{{ bos_token }}", change=lambda tokenizer: None, **beside):
    """A base with a tokenizer.json of single bytes and two merges, and a template of its own."""
    shutil.copytree(tiny.base_path(), folder, dirs_exist_ok=True)
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet, "th", "in"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, [("t", "h"), ("i", "n")]))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    parsed = json.loads(tokenizer.to_str())
    change(parsed)
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    names = {"bos_token": "<s>", "eos_token": "</s>", **beside}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    source_ = template + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(source_)
    return folder


def claimed(workdir, path, **fields):
    """A stage is begun with a base, or found to be begun with another."""
    config = recipe()
    config.base.path = str(path)
    config.data.template, config.data.length = "tokenizer", 32
    config.data.sources.rows = source("rows.jsonl")
    config.stages.order = ("one",)
    config.stages.one = stage(mixture={"rows": 1.0}, steps=1)
    config.stages.one.banks.lora = bank(sites=("mlp.*",), rank=2)
    config.update_from_flattened_dict(fields)
    return Run(open_setup(config), workdir).stage("one").claim({})


def pieces_swapped(parsed):
    vocabulary = parsed["model"]["vocab"]
    vocabulary["th"], vocabulary["in"] = vocabulary["in"], vocabulary["th"]


def merges_swapped(parsed):
    parsed["model"]["merges"].reverse()


def normalised(parsed):
    parsed["normalizer"] = {"type": "Lowercase"}


def token_added(parsed):
    parsed["added_tokens"].append(
        {**parsed["added_tokens"][0], "id": 260, "content": "<x>", "special": False}
    )


TEXT = {
    "pieces": (dict(change=pieces_swapped), "data.tokenizer"),
    "merges": (dict(change=merges_swapped), "data.tokenizer"),
    "normaliser": (dict(change=normalised), "data.tokenizer"),
    "added": (dict(change=token_added), "data.tokenizer"),
    "added-beside": (dict(additional_special_tokens=["<x>"]), "data.tokenizer"),
    "pad": (dict(pad_token="</s>", eos_token="<s>"), "base.special_tokens.ids"),
    "named": (dict(unk_token="th"), "base.special_tokens.named.unk_token"),
    "template": (dict(template="{{ bos_token }} "), "data.template"),
}


def test_another_tokenizer_or_template_is_another_base(tmp_path):
    first = hugging_face(tmp_path / "base")
    fingerprint = claimed(tmp_path / "w", first)
    elsewhere = hugging_face(tmp_path / "again", clean_up_tokenization_spaces=True)
    assert claimed(tmp_path / "w", elsewhere) == fingerprint
    for name, (fields, words) in TEXT.items():
        folder = hugging_face(tmp_path / name, **fields)
        with pytest.raises(UserError, match=f"another recipe; .*{re.escape(words)}.*then"):
            claimed(tmp_path / "w", folder)
    ends = {"eos_token_id": [1, 0]}
    (elsewhere / "generation_config.json").write_text(json.dumps(ends))
    with pytest.raises(UserError, match=r"base.special_tokens.ends: \[\[1\], \[\]\] then"):
        claimed(tmp_path / "w", elsewhere)


def test_a_template_file_that_was_changed(tmp_path):
    base, template = hugging_face(tmp_path / "base"), tmp_path / "own.jinja"
    template.write_text((base / "chat_template.jinja").read_text())
    given = {"data.template": str(template)}
    claimed(tmp_path / "w", base, **given)
    template.write_text("Hello." + template.read_text())
    with pytest.raises(UserError, match=r"data\.template: '\w{32}' then, '\w{32}' now"):
        claimed(tmp_path / "w", base, **given)


def test_a_stage_that_was_trained_with_a_bos_that_is_now_left_out(tmp_path, monkeypatch):
    """Where no bos is left out, the record is that of before."""
    base, given = hugging_face(tmp_path / "a"), {"data.template": "plain"}
    with monkeypatch.context() as before:
        before.setattr(Layout, "fitted", lambda layout, leaves_bos: layout)
        claimed(tmp_path / "w", base, **given)
        claimed(tmp_path / "v", base, **{"data.template": "llama3"})
    claimed(tmp_path / "v", base, **{"data.template": "llama3"})
    with pytest.raises(UserError, match=r"data\.template: 'plain' then, 'plain without bos' now"):
        claimed(tmp_path / "w", base, **given)


def test_a_quantised_base_and_a_gguf_file_are_known_by_their_fields_too(tmp_path):
    given = {"base.quantise": "int8"}
    claimed(tmp_path / "w", hugging_face(tmp_path / "a"), **given)
    other = hugging_face(tmp_path / "b")
    path = other / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 5.0}))
    with pytest.raises(UserError, match=r"architecture\.rope_theta: 10000 then, 5 now"):
        claimed(tmp_path / "w", other, **given)
    own = {"base.tokenizer": str(tmp_path / "a"), "data.template": "plain"}
    for rope_theta in (1e4, 2e4):
        gguf_files.write(tmp_path / f"{rope_theta}.gguf", rope_theta=rope_theta, vocab_size=304)
    claimed(tmp_path / "g", tmp_path / "10000.0.gguf", **own)
    with pytest.raises(UserError, match=r"architecture\.rope_theta: 10000 then, 20000 now"):
        claimed(tmp_path / "g", tmp_path / "20000.0.gguf", **own)


def test_an_unsealed_checkpoint_is_not_used(setup, unfinished):
    """Nothing tells whether it is whole: flipped bytes would be loaded. The stage begins anew."""
    steps = StageFolder.of(unfinished, LAST).steps
    shutil.rmtree(steps / "8")
    (steps / "12" / "SEAL.json").unlink()
    files = [path for path in (steps / "12" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(flip(largest.read_bytes()))
    train(Run(setup, unfinished))
    got, want = (open_trained(Run(setup, w), LAST).banks for w in (unfinished, tiny.trained()[1]))
    jax.tree.map(np.testing.assert_array_equal, got, want)
