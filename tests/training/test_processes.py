"""Two processes of four devices each, beside one process of eight."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.cli.main import main
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import several, tiny
from tests.several import Several

pytestmark = pytest.mark.processes
STAGES = ("aggregate", "align")
COUNTED = ("step", "rows_hash", "tokens", "target_tokens", "learning_rate")


@pytest.fixture
def config(tmp_path):
    """`--config=` of the tiny recipe."""
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    return f"--config={tmp_path / 'recipe.py'}"


def assert_near(workdir, reference):
    """The same rows and masks at every step, and losses that differ by rounding alone."""
    for name in STAGES:
        rows, wanted = (read_metrics(StageFolder.of(w, name).metrics) for w in (workdir, reference))
        assert [[r[k] for k in COUNTED] for r in rows] == [[r[k] for k in COUNTED] for r in wanted]
        losses, right = ([r["loss"] for r in rows] for rows in (rows, wanted))
        np.testing.assert_allclose(losses[0], right[0], rtol=1e-5)
        np.testing.assert_allclose(losses, right, rtol=1e-3)
        counts = [
            json.loads(StageFolder.of(w, name).manifest.read_text())["metrics"]["rows"]
            for w in (workdir, reference)
        ]
        assert counts[0] == counts[1]


def test_a_run_that_loses_a_process_and_is_asked_to_stop(tmp_path, config):
    """One of two is killed; both start again and get a notice; one process alone ends the run."""
    _, reference = tiny.trained()
    workdir = tmp_path / "w"
    command = ["train", config, f"--workdir={workdir}"]
    folder = StageFolder.of(workdir, "aggregate")
    with Several(tmp_path, [command] * 2) as both:
        both.wait_for((folder.steps / "4" / "SEAL.json").exists)
        both.running[1].kill()
        assert both.statuses() == [69, -signal.SIGKILL]
        assert "error: process 1 of 2 is gone; what was saved is intact" in both.printed(0)
        assert "Traceback" not in both.printed(0)
        assert "stage 'aggregate'" not in both.printed(1)
    with Several(tmp_path, [command] * 2) as both:
        both.wait_for(lambda: "continues after step" in both.printed(0))
        both.running[1].send_signal(signal.SIGTERM)
        assert both.statuses() == [75, 75]
        assert "was asked to stop and is saved at step" in both.printed(0)
    stopped = read_metrics(folder.metrics)[-1]["step"]
    assert (folder.steps / str(stopped) / "SEAL.json").exists()
    assert not StageFolder.of(workdir, "align").manifest.exists()
    train(Run(open_setup(tiny.medcare_config()), workdir))
    assert_near(workdir, reference)


TRAIN_AND_GO_ON = """
import json, os, sys
sys.argv[0] = "medmoe"
from medmoe_jax.cli.main import main
train, *after = json.loads(sys.argv[1])
status = main(train)
del os.environ["MEDMOE_COORDINATOR"], os.environ["MEDMOE_PROCESSES"], os.environ["MEDMOE_PROCESS"]
sys.exit(status + sum(map(main, after)))
"""


@pytest.fixture
def commands(tmp_path):
    """`(name, model, out)` to a command after training that writes into a folder."""
    pairs = zip(tiny.DRUGS[:3], tiny.USES[:3], strict=True)
    rows = tiny.write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"What is {a} for?", "completion": f"It is for {b}."} for a, b in pairs],
    )
    items = tiny.write_rows(
        tmp_path / "items.jsonl",
        [{"prompt": "aspirin: yes or no, pain?", "answer": "yes", "choices": ["yes", "no"]}],
    )

    def command(name, model, out):
        options = {
            "score": [f"--input={rows}", f"--output={out}/scored.jsonl"],
            "generate": [f"--input={rows}", f"--output={out}/answers.jsonl", "--max-tokens=8"],
            "eval": [f"--tasks={items}", f"--output={out}"],
            "export": ["--format=hf", f"--output={out}/hf"],
            "analyze": ["--stage=aggregate", "--data=knowledge", "--limit=6", f"--out={out}/use"],
        }
        name_of = ["analyze", "routing"] if name == "analyze" else [name]
        return [*name_of, *model, *options[name]]

    return command


def json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_scores(two, one):
    a, b = ([row["logprob"] for row in json_lines(w / "scored.jsonl")] for w in (two, one))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def same_answers(two, one):
    assert (two / "answers.jsonl").read_text() == (one / "answers.jsonl").read_text()


def same_report(two, one):
    """Scores are sums, which two processes and one add up in another order."""
    assert (two / "report.json").read_text() == (one / "report.json").read_text()
    asked = (json_lines(folder / "records.jsonl") for folder in (two, one))
    for a, b in zip(*asked, strict=True):
        scores = [record.pop("scores") for record in (a, b)]
        assert a == b
        np.testing.assert_allclose(*scores, rtol=1e-5)


def same_weights(two, one):
    a, b = (load_file(folder / "hf" / "model.safetensors") for folder in (two, one))
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_allclose(x, b[name], rtol=1e-5, atol=1e-6)


def same_use(two, one):
    a, b = (json.loads((folder / "use" / "routing.json").read_text()) for folder in (two, one))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x == (y if isinstance(y, str) else pytest.approx(y, rel=1e-3, abs=1e-4))


SAME = {
    "score": same_scores,
    "generate": same_answers,
    "eval": same_report,
    "export": same_weights,
    "analyze": same_use,
}


@pytest.mark.parametrize(
    ("sizes", "names"),
    [({}, [*SAME]), ({"fsdp": 1, "sequence": 4, "tensor": 2}, ["score", "analyze"])],
    ids=["rows-apart", "rows-shared"],
)
def test_training_and_commands_after_it(tmp_path, config, commands, sizes, names):
    """Each process with rows of its own, and both with half of the tokens of every row."""
    _, reference = tiny.trained()
    two, one = tmp_path / "two", tmp_path / "one"
    model = [config, f"--workdir={tmp_path / 'w'}"]
    mesh = [f"--config.run.mesh.{axis}={size}" for axis, size in sizes.items()]
    train = ["train", *model, *mesh, "--config.run.save_every=5"]
    told = json.dumps([train, *(commands(name, [*model, *mesh], two) for name in names)])
    with Several(tmp_path, [[told]] * 2, ("-c", TRAIN_AND_GO_ON)) as both:
        assert both.statuses() == [0, 0], both.printed(0) + both.printed(1)
        assert "3 rows scored" in both.printed(0) and "rows" not in both.printed(1)
    assert_near(tmp_path / "w", reference)
    for name in names:
        assert main(commands(name, model, one)) == 0
        SAME[name](two, one)


AGREE = """
import os, sys
from medmoe_jax.checkpoints import agreement
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.errors import StorageError, UserError
from medmoe_jax.parallel import processes
agreement._VISIBLE = 0.5
index, folder, coordinator, port = int(sys.argv[1]), *sys.argv[2:]
if coordinator == "auto":
    os.environ |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
                   "SLURM_PROCID": str(index), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": port}

def told(check, *arguments):
    try:
        check(*arguments)
        print("agreed")
    except (UserError, OSError) as error:
        print(error)

def refuse():
    raise OSError(28, "No space left on device")

def storage():
    raise StorageError("no disk")

def write(folder):
    with only_writer(folder) as check:
        check()

with processes.Membership(coordinator, 2, index):
    told(agreement.check_alike, {"config": {"seed": 3, "x": [1]}})
    told(agreement.check_alike, {"config": {"seed": 3 + index, "x": [1 + index]}, "code": "a"})
    told(agreement.check_shared, f"{folder}/shared")
    told(agreement.check_shared, f"{folder}/own{index}")
    told(agreement.from_first_process, refuse)
    print(agreement.from_first_process(lambda: ["of", 0]), agreement.union({str(index): index}))
    told(write, f"{folder}/shared")
    told(write, f"{folder}/held")
    try:
        agreement.from_first_process(storage)
    except StorageError as error:
        print(error)
"""


@pytest.mark.parametrize("coordinator", ["127.0.0.1:{}", "auto"])
def test_processes_agree_or_say_what_differs(tmp_path, coordinator):
    """However they have met; `auto` as under Slurm."""
    port = str(several.free_port())
    rest = [str(tmp_path), coordinator.format(port), port]
    commands = [[str(index), *rest] for index in range(2)]
    with only_writer(tmp_path / "held"), Several(tmp_path, commands, ("-c", AGREE)) as both:
        assert both.statuses() == [0, 0], both.printed(0) + both.printed(1)
        for index in range(2):
            lines = both.printed(index).splitlines()
            assert lines[0] == lines[2] == "agreed"
            assert "process 1 differs from process 0 in config.seed (3 and 4), config.x" in lines[1]
            assert f"{tmp_path}/own{index} of process 1 is not that of process 0" in lines[3]
            assert "No space left on device" in lines[4]
            assert lines[5] == "['of', 0] {'0': 0, '1': 1}"
            assert lines[6] == "agreed"
            assert f"process {os.getpid()} on" in lines[7] and "held since" in lines[7]
            assert lines[8] == "no disk"
    assert not list((tmp_path / "shared").iterdir())


ERRORS = """
import sys, time
from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes
index, coordinator, late = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
try:
    with processes.Membership(coordinator, 2, index):
        processes.gather(index)
        time.sleep(late)
        raise UserError(f"found by {index}")
except UserError as error:
    print(error)
    sys.exit(processes.end(1))
"""


@pytest.mark.parametrize("late", [(0, 1), (1, 0)], ids=["first-early", "first-late"])
def test_each_process_ends_by_the_error_that_it_found(tmp_path, late):
    """Though the other found it a second before or after."""
    coordinator = f"127.0.0.1:{several.free_port()}"
    commands = [[str(index), coordinator, str(late[index])] for index in range(2)]
    with Several(tmp_path, commands, ("-c", ERRORS)) as both:
        assert both.statuses() == [1, 1], both.printed(0) + both.printed(1)
        assert [both.printed(index) for index in range(2)] == ["found by 0\n", "found by 1\n"]


def test_a_command_of_other_settings_is_refused(tmp_path, config):
    command = ["train", config, f"--workdir={tmp_path / 'w'}"]
    with Several(tmp_path, [command, [*command, "--config.data.seed=4"]]) as both:
        assert both.statuses() == [1, 1], both.printed(0) + both.printed(1)
        for index in range(2):
            assert "process 1 differs from process 0 in config.data.seed (0 and 4)" in both.printed(
                index
            )
    assert not (tmp_path / "w").exists()
