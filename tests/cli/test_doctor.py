"""`medmoe doctor`: what would stop a run is found, named, and nothing else is."""

import importlib.util
import os
import shutil

import jax
import pytest

from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.cli import machine, main
from medmoe_jax.parallel import releases
from tests import several, tiny
from tests.data import upstream


def _states(findings):
    return [(found.state, found.what) for found in findings]


def test_versions_that_do_not_fit():
    """A plugin of another release than jax asks for, an old package and a missing one."""
    here = releases.installed()
    assert _states(machine.versions(here)) == [("ok", "versions")]
    wrong = here | {"jaxlib": "0.4.1", "optax": "0.1.0"}
    del wrong["sacrebleu"]
    found = list(machine.versions(wrong))
    assert _states(found) == [("bad", "versions")] * 3
    texts = "\n".join(f"{one.text} | {one.remedy}" for one in found)
    assert f"jaxlib 0.4.1 is installed; jax {jax.__version__} asks for" in texts
    assert "optax 0.1.0 is installed; medmoe_jax asks for" in texts
    assert "sacrebleu is missing | pip install 'sacrebleu" in texts
    stale = list(machine.versions(here | {"libtpu": "0.0.1"}))
    assert "libtpu 0.0.1 is installed" in stale[0].text and "pip install 'libtpu" in stale[0].remedy


def test_who_holds_a_device(tmp_path):
    """Another process that has its file open; none where nothing is open, or no device is there."""
    device = tmp_path / "accel0"
    device.touch()
    (files,) = ((str(tmp_path / "accel*"),),)
    processes = tmp_path / "proc"
    open_files = processes / "71" / "fd"
    open_files.mkdir(parents=True)
    assert not list(machine.holders(files, str(processes)))
    (processes / "71" / "cmdline").write_bytes(b"python\0old_job.py\0")
    (open_files / "3").symlink_to(device)
    (found,) = machine.holders(files, str(processes))
    assert found.state == "bad" and found.text == "held by process 71: python old_job.py"
    assert not list(machine.holders((str(tmp_path / "none*"),), str(processes)))


def test_memory_beside_what_the_base_takes():
    assert [one.state for one in machine.memory(1)] == ["ok"]
    assert [one.state for one in machine.memory(1 << 60)] == ["bad"]


@pytest.fixture
def quiet_machine(monkeypatch):
    """The machine is as it is: only recipe, rows and work directory are looked at."""
    monkeypatch.setattr(machine, "devices", lambda: iter(()))
    monkeypatch.setattr(machine, "versions", lambda: iter(()))


def _doctor(capsys, *words):
    status = main.main(["doctor", *words])
    printed = capsys.readouterr()
    return status, "".join((printed.out + printed.err).split())  # the table folds its lines


def test_a_recipe_its_rows_and_its_work_directory(tmp_path, capsys, quiet_machine):
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    config = f"--config={tmp_path / 'recipe.py'}"
    status, text = _doctor(capsys, config, f"--workdir={tiny.trained()[1]}")
    assert status == 0, text
    assert "stages:aggregate,align" in text and "finishedstages:aggregate,alignof2" in text
    assert "source'knowledge',first24rows" in text and "0holdnotarget" in text
    status, text = _doctor(capsys, f"--workdir={tiny.trained()[1]}")
    assert status == 0 and "finishedstages:aggregate,alignof2" in text  # as run.json there says
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    source = "--config.data.sources.knowledge.path"
    status, text = _doctor(capsys, config, f"{source}={rows}")
    assert status == 1 and "1ofthethingslookedatwouldstoparun" in text
    assert "rows.jsonl,line1:" in text
    status, text = _doctor(capsys, config, f"{source}={tmp_path / 'none.jsonl'}")
    assert status == 1 and text.count("none.jsonl'") == 1
    rows.write_text(('{"prompt": "a", "response": "' + "word " * 200 + '"}\n') * 4)
    status, text = _doctor(capsys, config, f"{source}={rows}")
    assert status == 0 and "4arecutat48" in text
    status, text = _doctor(capsys, config, "--config.data.length=4096")
    assert status == 1 and "data.length:4096exceedsthebase'scontext" in text


WINDOW = "data.sources.knowledge.window=4"
TABLE = "data.languages=families"
EVERY = "stages.align.evaluation.every=2"
SCORED = "stages.align.evaluation.tasks=('{here}/t.jsonl',)"
HELD = "stages.align.evaluation.sources=('knowledge',)"
ONE_PICK = "stages.aggregate.banks.noise.top_k=1"
UNREAD = "stages.aggregate.mixture.knowledge=0.0"


def _dies(capsys, *words):
    """What train says as it ends at once, without white space."""
    assert main.main(["train", *words]) == 1
    return "".join(capsys.readouterr().err.split()).rpartition("medmoetrain:error:")[2]


ROW = '{"prompt": "a", "response": "b"}\n'
TASK = '{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({"rows.jsonl": ""}, [], "source'knowledge':{here}/rows.jsonl:norowinit"),
        ({"rows.jsonl": "\n\n"}, [], "source'knowledge':{here}/rows.jsonl:norowinit"),
        ({"rows.jsonl": ""}, [WINDOW], "source'knowledge':{here}/rows.jsonl:norowinit"),
        ({"rows.jsonl": ROW * 3}, [], "dataset'knowledge'has3rows,fewerthanthe4datashards"),
        ({"rows.jsonl": ROW[:-2] + ', "language": "xx"}\n'}, [TABLE], "therowisin'xx'"),
        ({"rows.jsonl": ROW.replace("a", "a" * 200) * 4}, [], "noneofits4rowshasatarget"),
        ({}, ["data.shards=3"], "data.shards:3doesnotdivideaglobalbatchof8rows"),
        ({}, ["run.attention=splash"], "run.attention:'splash'needsTPUs,thesedevicesarecpu"),
        ({}, ["run.attention=cudnn"], "run.attention:'cudnn'cannotrunthis:itneedsNVIDIAGPUs"),
        ({}, ["run.accumulation=3"], "data.global_batch:8rowsdonotdivideover8devicesxrun."),
        ({}, ["run.tasks=('medqq',)"], "medqq"),
        ({}, ["run.tasks=('{here}/none.jsonl',)"], "{here}/none.jsonl:nosuchfile"),
        ({"t.jsonl": TASK + "{}"}, ["run.tasks=('{here}/t.jsonl',)"], "{here}/t.jsonl:2:"),
        ({"t.jsonl": "{}"}, [EVERY, SCORED], "stages.align.evaluation.tasks:{here}/t.jsonl:1:"),
        ({"rows.jsonl": ""}, [EVERY, HELD, UNREAD], "'knowledge':{here}/rows.jsonl:norowinit"),
        ({}, [ONE_PICK], "stages.aggregate:bank'noise'.top_k:theweightoftheonlypickisalways1"),
    ],
    ids=[
        "no rows", "blank lines", "no rows to stream", "few rows", "language", "no target",
        "shards", "splash", "cudnn", "accumulation", "task", "task file", "bad item",
        "evaluation", "held out", "no gradient",
    ],
)  # fmt: skip
def test_what_training_refuses_at_once(tmp_path, capsys, quiet_machine, files, fields, message):
    """Doctor says what train would, as far as it can be told from the first rows."""
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    words = [f"--config={tmp_path / 'recipe.py'}"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if "rows.jsonl" in files:
        words.append(f"--config.data.sources.knowledge.path={tmp_path / 'rows.jsonl'}")
    words += [f"--config.{field}".replace("{here}", str(tmp_path)) for field in fields]
    message = message.replace("{here}", str(tmp_path))
    workdir = f"--workdir={tmp_path / 'w'}"
    said = _dies(capsys, *words, workdir)
    assert message in said
    status, text = _doctor(capsys, *words, workdir)
    assert status == 1 and "1ofthethingslookedatwouldstoparun" in text
    assert said in text
    assert not (tmp_path / "w").exists()


def test_a_tracker_that_is_not_installed(tmp_path, capsys, quiet_machine, monkeypatch):
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    words = [f"--config={tmp_path / 'recipe.py'}", "--config.run.trackers=('mlflow',)"]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else find(name, *a)
    )
    status, text = _doctor(capsys, *words)
    assert status == 1 and "run.trackers:mlflowisnotinstalled:pipinstall" in text
    assert _dies(capsys, *words, f"--workdir={tmp_path / 'w'}") in text


def test_a_task_that_cannot_fit_the_context_is_told_at_once(
    tmp_path, capsys, quiet_machine, monkeypatch
):
    """In `run.tasks` as in a stage's own; answers alone take 256 of the base's 128 tokens."""
    upstream.write("mts_dialog", tmp_path)
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path))
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    for fields, place in (
        (["run.tasks=('mts_dialog',)"], "run.tasks:"),
        ([EVERY, SCORED.replace("{here}/t.jsonl", "mts_dialog")], "align.evaluation.tasks:"),
    ):
        words = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'w'}"]
        words += [f"--config.{field}" for field in fields]
        said = _dies(capsys, *words)
        assert f"{place}mts_dialog:aprompt" in said and "doesnotfitacontextof128" in said
        status, text = _doctor(capsys, *words)
        assert status == 1 and said in text
        assert not (tmp_path / "w").exists()


def test_a_work_directory_of_another_recipe(tmp_path, capsys, quiet_machine):
    """Its stages are finished, or begun, with what the recipe does not say any more."""
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    shutil.copytree(tiny.trained()[1], tmp_path / "w")
    words = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'w'}"]
    status, text = _doctor(capsys, *words)
    assert status == 0, text
    changed = "--config.stages.align.learning_rate=0.5"
    align = StageFolder.of(tmp_path / "w", "align")
    for _ in ("finished", "begun"):
        said = _dies(capsys, *words, changed)
        assert said.startswith(f"{align.path}wasmadebyanotherrecipe;stage.learning_rate:0.03then")
        status, text = _doctor(capsys, *words, changed)
        assert status == 1 and "1ofthethings" in text and said in text
        align.manifest.unlink(missing_ok=True)
    record = StageFolder.of(tmp_path / "w", "aggregate").recipe
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 1', 1))
    said = _dies(capsys, *words)
    status, text = _doctor(capsys, *words)
    assert status == 1 and said in text and f"{record}:waschanged" in said


def test_a_file_in_the_place_of_the_work_directory(tmp_path, capsys, quiet_machine):
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "w"):
        words = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={workdir}"]
        said = _dies(capsys, *words)
        assert said.startswith(f"{tmp_path / 'file'}:isnotafolder;givethepath")
        for asked in (words, words[1:]):
            status, text = _doctor(capsys, *asked)
            assert status == 1 and said in text and "1ofthethings" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, capsys, quiet_machine):
    tmp_path.chmod(0o500)
    status, text = _doctor(capsys, f"--workdir={tmp_path / 'w'}")
    assert status == 1 and "cannotbewritten" in text


def test_devices_are_found_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = machine.devices()
    assert found.state == "ok" and "x cpu:cpu" in found.text
    monkeypatch.setattr(machine, "_LOOK", "raise SystemExit('libtpu says no')")
    (found,) = machine.devices()
    assert found.state == "bad" and "libtpu says no" in found.text


def test_the_command_alone_says_what_to_do(capsys):
    assert main.main([]) == 0
    assert "medmoe doctor" in capsys.readouterr().out
