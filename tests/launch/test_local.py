"""The local back end: real processes, with a medmoe that does what a test says."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

# Saved as a run saves: one more sealed checkpoint.
SAVE = 'mkdir -p "work/stages/a/steps/$1" && touch "work/stages/a/steps/$1/SEAL.json"'


@pytest.fixture
def local(launcher):
    return launcher("--backend=local", "--coordinator=localhost:1")


def wait_for(path, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.05)


def alive(folder, worker):
    """Whether any process of a worker's job is left, zombies aside."""
    group = (folder / f"runs/launch/worker-{worker}/group").read_text().strip()
    for stat in os.listdir("/proc"):
        try:
            fields = Path(f"/proc/{stat}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == group and fields[0] != "Z":
            return True
    return False


def test_arguments_and_environment_reach_every_process(local):
    words = ["train", "--config=a b.py:x", 'it\'s "quoted"', "$HOME", "two\nlines", "*", "", "--"]
    local.behaves('echo "hello from $worker"')
    ended = local("run", "--hosts=3", "--devices=2", "--", *words)
    assert ended.returncode == 0, ended.stderr
    assert "hello from 0" in ended.stdout and "hello from 1" not in ended.stdout
    for worker in range(3):
        assert local.arguments(worker) == words
        seen = local.environment(worker)
        assert seen["MEDMOE_COORDINATOR"] == "localhost:1"
        assert (seen["MEDMOE_PROCESSES"], seen["MEDMOE_PROCESS"]) == ("3", str(worker))
        assert seen["JAX_PLATFORMS"] == "cpu"
        assert seen["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] == "gloo"
        assert seen["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"
        assert (
            f"hello from {worker}"
            in (local.folder / f"runs/launch/worker-{worker}.log").read_text()
        )


def test_defaults_come_from_the_environment_and_flags_win(local):
    local.behaves("true")
    assert local("run", "--", "eval", TPU_RUN_HOSTS="1", TPU_RUN_DEVICES="8").returncode == 0
    assert local.environment(0)["MEDMOE_PROCESSES"] == "1"
    assert local.environment(0)["XLA_FLAGS"].endswith("count=8")
    assert local("run", "--hosts=2", "--", "eval", TPU_RUN_HOSTS="1").returncode == 0
    assert local.environment(1)["MEDMOE_PROCESSES"] == "2"


def test_processes_meet_at_a_free_port(launcher):
    local = launcher("--backend=local")
    local.behaves("true")
    assert local("run", "--", "eval").returncode == 0
    places = {local.environment(worker)["MEDMOE_COORDINATOR"] for worker in (0, 1)}
    assert len(places) == 1 and places.pop().startswith("localhost:2")


def test_one_failure_stops_the_others_and_is_named(local):
    """The other one does not listen to SIGTERM, and has a child: both are ended."""
    local.behaves(
        "wait_for() { until [[ -e $1 ]]; do sleep 0.1; done; }\n"
        "if ((worker == 1)); then wait_for deaf; echo no disk; exit 3; fi\n"
        "trap '' TERM; touch deaf; while true; do sleep 0.1; done"
    )
    ended = local("run", "--grace=1", "--", "train")
    assert ended.returncode == 3
    assert "worker 1 (local-1) ended with status 3; its last lines" in ended.stderr
    assert "    no disk\n" in ended.stderr
    assert "did not end within 1 s: killed" in ended.stdout
    assert not alive(local.folder, 0) and not alive(local.folder, 1)


def test_a_killed_process_is_named_with_its_signal(local):
    local.behaves("if ((worker == 0)); then seq 1000; printf 'no end'; kill -KILL $$; fi; sleep 60")
    # What earlier starts left is no part of this one, and more than a pipe holds.
    (local.folder / "runs/launch").mkdir(parents=True)
    copy = local.folder / "runs/launch/worker-0.log"
    copy.write_text("== worker 0\n" + "earlier\n" * 50_000 + "== ended with status 0\n")
    ended = local("run", "--", "train")
    assert ended.returncode == 137
    assert "worker 0 (local-0) was killed by signal 9" in ended.stderr
    shown = [line.strip() for line in ended.stderr.splitlines() if line.startswith("    ")]
    assert len(shown) == 20 and "earlier" not in shown
    assert {"1000", "== ended with status 137"} < set(shown)
    assert not alive(local.folder, 1)


def test_resume_goes_on_until_the_job_is_done(local):
    """A preemption notice, then a death, each after a save; then the end."""
    local.behaves(
        f"save() {{ {SAVE}; }}\n"
        'case $(wc -l <"$FAKE/starts-$worker") in\n'
        "  1) save 10; exit 75 ;;\n"
        "  2) save 20; if ((worker == 1)); then kill -KILL $$; fi; sleep 60 ;;\n"
        "esac"
    )
    ended = local("resume", "--max-restarts=1", "--", "train", "--workdir=work")
    assert ended.returncode == 0, ended.stderr
    assert "saved and ended after a preemption notice (status 75)" in ended.stderr
    assert "worker 1 (local-1) was killed by signal 9" in ended.stderr
    assert "done after 3 starts" in ended.stderr
    assert local.starts(0) == local.starts(1) == 3


def test_resume_asks_for_what_is_saved_on_object_storage(local):
    """Twice it has saved something new, then twice nothing."""
    local.stub("python", '#!/usr/bin/env bash\necho "$@" >>"$FAKE/asked"\ncat "$FAKE/saved"\n')
    (local.folder / "saved").touch()
    local.behaves(
        'starts=$(wc -l <"$FAKE/starts-$worker")\n'
        'if ((worker == 0 && starts < 3)); then echo "$starts" >"$FAKE/saved"; fi\n'
        "exit 75"
    )
    ended = local("resume", "--max-restarts=2", "--", "train", "--workdir=gs://bucket/a")
    assert ended.returncode == 75 and "giving up: 2 tries in a row" in ended.stderr
    assert local.starts(0) == 4
    asked = (local.folder / "asked").read_text().splitlines()
    assert set(asked) == {"-m medmoe_jax.checkpoints.saves gs://bucket/a"}


@pytest.mark.parametrize(
    "workdir", [["--workdir=~/work"], ["--workdir=other", "--workdir", "work"], ["--workdir=work/"]]
)
def test_resume_finds_the_work_directory_as_medmoe_does(local, workdir):
    """Three preemptions, each after a save; HOME is the current folder."""
    local.behaves(
        f"save() {{ {SAVE}; }}\n"
        'starts=$(wc -l <"$FAKE/starts-$worker"); save "$starts"; ((starts > 3)) || exit 75'
    )
    ended = local("resume", "--max-restarts=1", "--", "train", *workdir)
    assert ended.returncode == 0, ended.stderr
    assert "done after 4 starts" in ended.stderr


def test_one_process_may_write_to_s3_and_python_lies_where_a_link_leads(local):
    """`medmoe` is a link, as pipx makes it; without one the machine's Python is asked."""
    (local.folder / "venv").mkdir()
    (local.bin / "medmoe").rename(local.folder / "venv" / "medmoe")
    (local.bin / "medmoe").symlink_to(local.folder / "venv" / "medmoe")
    local.behaves("true")
    asks = '#!/usr/bin/env bash\necho "$0 $*" >>"$FAKE/asked"\n'
    local.stub("python3", asks)
    job = ["--hosts=1", "--", "train", "--workdir=s3://bucket/a"]
    assert local("resume", *job).returncode == 0
    local.stub("python", asks)
    (local.bin / "python").rename(local.folder / "venv" / "python")
    assert local("resume", *job).returncode == 0
    words = "-m medmoe_jax.checkpoints.saves s3://bucket/a"
    python = [local.bin / "python3", local.folder / "venv" / "python"]
    asked = (local.folder / "asked").read_text().splitlines()
    assert asked == [f"{one} {words}" for one in python]


def test_variables_in_a_file_are_refused_where_they_would_not_be_read(local):
    (local.folder / "env").write_text("A=1\n")
    local.behaves("true")
    for verb in ("run", "resume"):
        ended = local(verb, "--env-file=env", "--", "eval")
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
        assert "--env-file=env: processes of --backend=local have the variables" in ended.stderr
    assert not (local.folder / "starts-0").exists()
    assert local("run", "--", "eval", A="1").returncode == 0
    assert local.environment(0)["A"] == "1"


@pytest.mark.parametrize("workdir", [["--workdir", "work"], []])
def test_resume_gives_up_when_nothing_is_saved(local, workdir):
    local.behaves("exit 75")
    ended = local("resume", "--max-restarts=2", "--", "train", *workdir)
    assert ended.returncode == 75
    assert "giving up: 2 tries in a row saved nothing new" in ended.stderr
    assert local.starts(0) == 2


@pytest.mark.parametrize("status", [1, 2])
def test_resume_does_not_repeat_bad_input(local, status):
    local.behaves(f'echo "error: no such bank"; exit {status}')
    ended = local("resume", "--", "train")
    assert ended.returncode == status
    assert "error: no such bank" in ended.stderr and "giving up" in ended.stderr
    assert local.starts(0) == 1


def test_ctrl_c_stops_all(local):
    """medmoe hears of it by SIGTERM alone, and may save before it ends."""
    local.behaves(
        "trap 'touch saved-$worker; exit 75' TERM; trap 'touch broken' INT\n"
        "touch ready-$worker; while true; do sleep 0.1; done"
    )
    begun = local.begin("run", "--", "train")
    for worker in (0, 1):
        wait_for(local.folder / f"ready-{worker}")
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130, said
    assert "stopping the job on all workers" in said
    for worker in (0, 1):
        assert (local.folder / f"saved-{worker}").exists() and not alive(local.folder, worker)
    assert not (local.folder / "broken").exists()


def test_ctrl_c_is_heard_while_what_follows_the_job_is_stopped(local):
    """As where gcloud asks the terminal for something behind the launcher's back."""
    local.behaves("trap 'exit 75' TERM; touch ready-$worker; while true; do sleep 0.1; done")
    begun = local.begin("run", "--", "train")
    logs = local.folder / "runs/launch"
    followers = logs / f"followers.{begun.pid}"
    for worker in (0, 1):
        wait_for(local.folder / f"ready-{worker}")
    wait_for(followers)
    beside = int(followers.read_text().splitlines()[1].split()[0])
    os.kill(beside, signal.SIGSTOP)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130, said
    assert not alive(local.folder, 0) and not alive(local.folder, 1) and not followers.exists()


def test_an_empty_file_of_followers_and_no_ps(local):
    local.behaves("true")
    left = local.folder / "runs/launch/followers.1"
    left.parent.mkdir(parents=True)
    left.touch()
    assert local("run", "--", "eval").returncode == 0 and not left.exists()
    local.stub("ps", "#!/bin/sh\nexit 1\n")
    ended = local("run", "--", "eval")
    assert ended.returncode == 1 and "ps (procps) is needed" in ended.stderr
    assert local.starts(0) == 1


def test_a_job_outlives_its_launcher_and_is_found_again(local):
    local.behaves(
        "echo here; touch ready-$worker; until [[ -e go ]]; do sleep 0.1; done; echo gone"
    )
    begun = local.begin("run", "--", "train", "a b")
    for worker in (0, 1):
        wait_for(local.folder / f"ready-{worker}")
    os.killpg(begun.pid, signal.SIGHUP)
    begun.communicate(timeout=120)
    assert begun.returncode != 0
    status = local("status").stdout.splitlines()
    assert [line.split(" ")[1] for line in status] == ["0"] * 3 + ["1"] * 3
    assert all("running since" in line for line in status[::3])
    assert all("): " + "  medmoe 'train' 'a b'" in line for line in status[1::3])
    assert all(line.endswith("  here") and len(line) <= 80 for line in status[2::3])
    assert all(len(line) <= 80 for line in status)
    assert local("logs", "--worker=1").stdout == "here\n"
    assert sorted(local("logs").stdout.splitlines()) == ["[0] here", "[1] here"]
    other = local("run", "--", "train", "c")
    assert other.returncode == 1 and "another job is running here" in other.stderr
    again = local.begin("run", "--", "train", "a b")
    assert "this job runs already: following it" in again.stderr.readline()
    follow = local.begin("logs", "--worker=1", "--follow")
    assert follow.stdout.readline() == "here\n"
    (local.folder / "go").touch()
    out, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "here\ngone\n" in out and follow.communicate(timeout=120)[0] == "gone\n"
    assert local.starts(0) == 1
    assert "ended with status 0" in local("status").stdout


def test_stop_ends_a_resume_for_good(local):
    local.behaves("trap 'exit 75' TERM; touch ready-$worker; while true; do sleep 0.1; done")
    begun = local.begin("resume", "--", "train")
    for worker in (0, 1):
        wait_for(local.folder / f"ready-{worker}")
    assert local("stop").returncode == 0
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130 and "was told to stop" in said
    assert local.starts(0) == 1
    assert local("delete").returncode == 0
    assert not list((local.folder / "runs/launch").glob("worker-?"))


def test_dry_run_prints_and_does_nothing(local):
    ended = local("run", "--dry-run", "--", "train", "it's")
    assert ended.returncode == 0
    lines = ended.stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["start", "start", "attach", "attach"]
    assert not (local.folder / "runs").exists()
