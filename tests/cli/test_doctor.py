"""`medmoe doctor`: what would stop a run is found, named, and nothing else is."""

import os

import jax
import pytest

from medmoe_jax.cli import machine, main
from medmoe_jax.parallel import releases
from tests import several, tiny


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
    rows.write_text('{"prompt": "a", "response": "' + "word " * 200 + '"}\n')
    status, text = _doctor(capsys, config, f"{source}={rows}")
    assert status == 0 and "1arecutat48" in text
    status, text = _doctor(capsys, config, "--config.data.length=4096")
    assert status == 1 and "data.length:4096exceedsthebase'scontext" in text


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
