"""What a step recomputes under `run.remat=auto`, and what is said when memory runs out."""

import re
from types import SimpleNamespace

import jax
import pytest

from medmoe_jax.base.execution import REMAT
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.parallel import processes, room
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.training import recomputation
from medmoe_jax.training import train as training
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import AUTO, open_setup
from medmoe_jax.training.train import train
from tests import tiny

pytestmark = pytest.mark.slow

SAID = re.compile(r"needs ([\d.]+) GiB of ([\d.]+) GiB for itself.*remat '(\w+)'")


def run_of(workdir, remat=AUTO):
    config = tiny.medcare_config()
    config.stages.order = ("aggregate",)
    config.stages.aggregate.steps = 4
    config.run.mesh.update({"data": -1, "fsdp": 1})  # what compiles soonest
    config.data.length, config.data.global_batch = 128, 16
    config.run.remat = remat
    return Run(open_setup(config), workdir)


def end_of(workdir):
    """Losses of every step, and the fingerprint of what was trained."""
    folder = StageFolder.of(workdir, "aggregate")
    losses = [row["loss"] for row in read_metrics(folder.metrics)]
    return losses, Manifest.read(folder.manifest).content


def test_the_least_that_fits_is_kept_when_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """With no memory, and then with all that there is."""
    needs = []
    real = recomputation.taken
    monkeypatch.setattr(
        recomputation, "taken", lambda *given: needs.append(real(*given)) or needs[-1]
    )
    monkeypatch.setattr(recomputation, "room", lambda mesh: 0)
    asked = iter([False, True])
    with pytest.raises(Stopped):
        train(run_of(tmp_path / "w"), stop=lambda: next(asked))
    dots, full = needs
    assert dots > 1.1 * full
    said = capsys.readouterr().err
    assert "remat 'dots' does not fit" in said
    assert SAID.findall(said)[-1][2] == "full"  # runs, although there is said to be no room

    monkeypatch.setattr(recomputation, "room", lambda mesh: 10**15)
    train(run_of(tmp_path / "w"))
    assert SAID.findall(capsys.readouterr().err)[-1][2] == "full" and len(needs) == 3
    train(run_of(tmp_path / "whole", "full"))
    assert end_of(tmp_path / "w") == end_of(tmp_path / "whole")

    # The process with the least memory decides for all.
    prepared, state = training.prepare(run_of(tmp_path / "new").stage("aggregate"), 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, full] if value else [value])
    assert recomputation.compile_step(prepared, state, "").remat == "full"


def test_no_more_than_products_is_kept(tmp_path, monkeypatch, capsys):
    """However much memory there is; a run that began with `none` goes on with it."""
    prepared, state = training.prepare(run_of(tmp_path / "w").stage("aggregate"), 2)
    monkeypatch.setattr(recomputation, "room", lambda mesh: 10**15)
    assert recomputation.compile_step(prepared, state, "").remat == "dots"
    assert recomputation.compile_step(prepared, state, "none").remat == "none"
    capsys.readouterr()
    for large, size in ((True, "large"), (False, "small")):
        monkeypatch.setattr(recomputation.large_pages, "in_use", lambda large=large: large)
        recomputation.compile_step(prepared, state, "full")
        assert f"for itself, in {size} pages" in capsys.readouterr().err


def exhausted(*_):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.\nmore"
    )


def test_running_out_of_memory_names_a_setting_that_needs_less(tmp_path, monkeypatch):
    monkeypatch.setattr(training.loop_lib, "run", exhausted)
    for remat, advice in {
        "none": r"--config\.run\.remat=dots needs [\d.]+ GiB instead of [\d.]+",
        "full": r"--config\.run\.remat=full --config\.run\.accumulation=2 needs [\d.]+ GiB instead",
    }.items():
        with pytest.raises(UserError, match=advice) as caught:
            train(run_of(tmp_path / remat, remat))
        said = str(caught.value)
        assert f"run.remat '{remat}'" in said and "to allocate 34359738368 bytes" in said
        assert "more" not in said.split("(RESOURCE")[1]


def test_a_compiler_that_finds_no_room(tmp_path, monkeypatch, capsys):
    """Its refusal of `dots` is no error; that of the last one is, and others stay as they are."""
    real = recomputation.compile_ahead
    refused = []

    def compiles(function, *arguments):
        if len(refused) < 1:
            refused.append(function)
            exhausted()
        return real(function, *arguments)

    monkeypatch.setattr(recomputation, "compile_ahead", compiles)
    prepared, state = training.prepare(run_of(tmp_path / "w").stage("aggregate"), 2)
    monkeypatch.setattr(recomputation, "room", lambda mesh: 10**15)
    assert recomputation.compile_step(prepared, state, "").remat == "full"
    assert "remat 'dots' does not fit" in capsys.readouterr().err
    refused.clear()
    with pytest.raises(UserError, match=r"with run.remat 'full'; raise run.accumulation, lower"):
        recomputation.compile_step(prepared, state, "full")

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: x")

    monkeypatch.setattr(recomputation, "compile_ahead", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        recomputation.compile_step(prepared, state, "")


def test_a_program_in_which_the_compiler_recomputes_is_passed_over(tmp_path, monkeypatch, capsys):
    """However it fits; the last choice is taken all the same."""
    prepared, state = training.prepare(run_of(tmp_path / "w").stage("aggregate"), 2)
    monkeypatch.setattr(recomputation, "room", lambda mesh: 10**15)
    asked = []
    monkeypatch.setattr(
        recomputation, "compiler_recomputes", lambda text: asked.append(text) or True
    )
    assert recomputation.compile_step(prepared, state, "").remat == "full"
    assert len(asked) == 2 and all("ENTRY" in text for text in asked)
    assert "remat 'dots' fits only as the compiler recomputes" in capsys.readouterr().err
    assert recomputation.compile_step(prepared, state, "none").remat == "none"


def test_what_the_compiler_recomputes_is_told_by_its_names():
    assert room.compiler_recomputes("  %fusion.613.remat2 = bf16[8]{0} fusion(%p), calls=%c")
    jaxs_own = 'op_name="jit(f)/checkpoint/rematted_computation/dot.remat"'
    assert not room.compiler_recomputes(
        f"  %fusion.1 = bf16[8]{{0}} fusion(%remat_p), metadata={{{jaxs_own}}}"
    )


def test_room_of_a_device_of_a_machine_and_of_a_container(tmp_path, monkeypatch):
    memory = SimpleNamespace(
        temp_size_in_bytes=100, output_size_in_bytes=20, alias_size_in_bytes=15,
        generated_code_size_in_bytes=1,
    )  # fmt: skip
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    assert room.taken(memory, mesh) == 8 * 106  # eight devices live in one memory
    free = SimpleNamespace(available=4000)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.machine_free() == 4000 and room.room(mesh) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert room.machine_free() == 4000
    (tmp_path / "memory.max").write_text("1000\n")
    assert room.machine_free() == 400

    stats = {"bytes_limit": 1000, "bytes_in_use": 200}
    device = SimpleNamespace(memory_stats=lambda: stats)
    there = SimpleNamespace(local_devices=[device, device])
    assert room.room(there) == 760 and room.taken(memory, there) == 106


def test_what_the_field_may_be(tmp_path):
    assert run_of(tmp_path).setup.remats == REMAT[1:]
    assert run_of(tmp_path, "dots").setup.remats == ("dots",)
    config = tiny.medcare_config()
    config.run.mesh.update({"data": -1, "fsdp": 1, "expert": 2})
    config.run.remat = AUTO
    assert open_setup(config).remats == REMAT  # tokens would travel again
    with pytest.raises(UserError, match=r"run\.remat: 'some' is none of auto, none, dots, full"):
        run_of(tmp_path, "some")
