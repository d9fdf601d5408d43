"""The back ends tpu and ssh as they run, with stubs for gcloud, ssh and scp; worker.sh by itself.

A stub machine is a folder that serves as its home: `home-0`, `home-1`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

WORKER = Path(__file__).parents[2] / "launch" / "worker.sh"

# Notes what it is asked. The TPU is what the files `node` and `request` say.
GCLOUD = r"""#!/usr/bin/env bash
words=("$@")
printf '%s\n' "${*@Q}" >>"$FAKE/asked"
value() {
  for word in "${words[@]}"; do
    if [[ $word == "$1="* ]]; then echo "${word#*=}"; fi
  done
}
gone() {
  for group in home-*/medmoe-run/worker-*/group; do
    kill -KILL -- "-$(cat "$group")" 2>/dev/null
  done
  rm -rf home-*
}
here=$PWD
cd "$FAKE" || exit
case $3/$4 in
  queued-resources/create) echo ACTIVE >request; echo READY >node; mkdir home-0 home-1 ;;
  queued-resources/delete) gone; rm -f request node ;;
  queued-resources/list) if [[ -e request ]]; then cat request; fi ;;
  tpu-vm/list) if [[ -e node ]]; then printf '%s\t2\n' "$(cat node)"; fi ;;
  tpu-vm/scp)
    for home in home-*; do
      for word in "${words[@]:4}"; do
        if [[ $word == *:medmoe-run/ ]]; then break; fi
        (cd "$here" && cp "$word" "$FAKE/$home/medmoe-run/")
      done
    done
    ;;
  tpu-vm/ssh)
    [[ $(cat node) == READY ]] || exit 1
    cd "home-$(value --worker)" && HOME=$PWD exec bash -c "$(value --command)"
    ;;
esac
"""
GCLOUD = GCLOUD.replace("case $3/$4 in", "case $3/$4 in").replace("${words[@]:4}", "${words[@]:4}")

SSH = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
mkdir -p "$FAKE/${1#me@}" && cd "$FAKE/${1#me@}" && HOME=$PWD exec bash -c "$2"
"""
SCP = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
to=${*: -1}
to=${to#me@}
cp "${@:1:$#-1}" "$FAKE/${to/://}"
"""

# `python3 -m pip install --target=DIR uv` makes a uv; that makes an environment with the fake.
PYTHON = rf"""#!/usr/bin/env bash
if [[ $1 == -m && $2 == medmoe_jax.* ]]; then exec {sys.executable} "$@"; fi
"""
PYTHON += r"""for word; do case $word in --target=*) target=${word#*=} ;; esac; done
echo "$*" >>"$FAKE/pip"
mkdir -p "$target/bin"
cat >"$target/bin/uv" <<'UV'
#!/usr/bin/env bash
echo "$*" >>"$FAKE/uv"
mkdir -p .venv/bin
cp "$FAKE/bin/medmoe" .venv/bin/
UV
chmod +x "$target/bin/uv"
"""


def stubs(launcher):
    for name, text in [("gcloud", GCLOUD), ("ssh", SSH), ("scp", SCP), ("python3", PYTHON)]:
        launcher.stub(name, text)
    return launcher


@pytest.fixture
def tpu(launcher):
    return stubs(launcher("--zone=z", "--accelerator-type=v4-16", "--poll=1"))


def verbs(launcher) -> list[str]:
    """What gcloud was asked to do, states and connections aside, in order."""
    lines = (launcher.folder / "asked").read_text().replace("'", "").splitlines()
    words = [" ".join(line.split()[2:4]) for line in lines]
    return [word for word in words if word.endswith(("create", "delete", "scp"))]


def test_a_preempted_tpu_is_made_again_and_the_job_ends(tpu):
    """From nothing: create, ship, run; the machines vanish under the job; all again; done."""
    work = tpu.folder / "shared"
    (tpu.folder / "tokens").write_text("HF_TOKEN='hunter 2'\n")
    tpu.behaves(
        'mkdir -p "$FAKE/shared/stages/a/steps/$(wc -l <"$FAKE/starts-0")"\n'
        'pwd >"$FAKE/folder-$worker"\n'
        'if (($(wc -l <"$FAKE/starts-$worker") == 1)); then\n'
        "  if ((worker == 0)); then sleep 60; fi\n"
        "  until [[ -e $FAKE/starts-0 && -s $FAKE/runs/launch/worker-1.log ]]; do sleep 0.1; done\n"
        '  sleep 1; echo PREEMPTED >"$FAKE/node"; exit 143\n'
        "fi\n"
    )
    job = ["train", f"--workdir={work}", "it's", "a  b"]
    ended = tpu("resume", "--grace=1", "--env-file=tokens", "--", *job)
    assert ended.returncode == 0, ended.stderr
    once = ["queued-resources create", "tpu-vm scp"]
    assert verbs(tpu) == [*once, "queued-resources delete", *once]
    assert "worker 1 (medmoe-w-1) was killed by signal 15" in ended.stderr
    assert "worker 0 (medmoe-w-0) cannot be reached" in ended.stderr
    assert "done after 2 starts" in ended.stderr
    for worker in (0, 1):
        assert tpu.starts(worker) == 2 and tpu.arguments(worker) == job
        seen = tpu.environment(worker)
        assert seen["MEDMOE_COORDINATOR"] == "auto" and "MEDMOE_PROCESSES" not in seen
        assert seen["HF_TOKEN"] == "hunter 2"
        home = tpu.folder / f"home-{worker}" / "medmoe-run"
        assert home.stat().st_mode & 0o077 == 0
        assert (home / "current" / "configs" / "medcare.py").exists()
        assert Path((tpu.folder / f"folder-{worker}").read_text().strip()) == (home / "current")
    assert "hunter" not in (tpu.folder / "asked").read_text() + ended.stdout + ended.stderr


def test_one_host_that_vanishes_is_no_bad_input(tpu):
    """gcloud itself ends with 1 when the machine it asks for is gone."""
    one = GCLOUD.replace(r"%s\t2\n", r"%s\t1\n").replace("home-0 home-1", "home-0")
    lost = "if [[ $* == *attach* && ! -e lost ]]; then touch lost; echo PREEMPTED >node; exit 1; fi"
    tpu.stub("gcloud", one.replace('    cd "home-', f'    {lost}\n    cd "home-'))
    tpu.behaves('if (($(wc -l <"$FAKE/starts-0") == 1)); then sleep 60; fi')
    ended = tpu("resume", "--accelerator-type=v5litepod-8", "--", "eval")
    assert ended.returncode == 0, ended.stderr
    assert "worker 0 (medmoe-w-0) was lost" in ended.stderr
    assert "done after 2 starts" in ended.stderr


def test_code_is_installed_once(tpu):
    tpu.behaves("true")
    assert tpu("create").returncode == 0
    for verb in ("ship", "run", "run"):
        assert tpu(verb, "--python=3.13", "--setup=echo >>mounted", "--", "eval").returncode == 0
    assert (tpu.folder / "pip").read_text().splitlines() == [
        "-m pip install --quiet --target=medmoe-run/uv uv"
    ] * 2
    assert sorted((tpu.folder / "uv").read_text().splitlines()) == [
        *["pip install --quiet --python .venv -e .[tpu]"] * 2,
        *["venv --quiet --python 3.13 .venv"] * 2,
    ]
    assert len((tpu.folder / "home-1" / "mounted").read_text().splitlines()) == 3
    assert tpu("delete").returncode == 0
    assert tpu("status").stdout == "medmoe: TPU not there, queued resource not there\n"


def test_an_installation_that_fails_is_made_anew(tpu):
    tpu.behaves("true")
    tpu("create")
    broken = PYTHON.replace("mkdir -p .venv/bin", "exit 9")
    tpu.stub("python3", broken)
    ended = tpu("run", "--", "eval")
    assert ended.returncode == 1 and "worker 1 (medmoe-w-1): failed with status 9" in ended.stderr
    for uv in tpu.folder.rglob("uv/bin/uv"):
        uv.unlink()
    tpu.stub("python3", PYTHON)
    assert tpu("run", "--", "eval").returncode == 0
    assert tpu.starts(0) == 1


def test_a_tpu_that_is_not_there_is_no_fault_of_the_folder(tpu):
    """gcloud ends with 1 for both."""
    ended = tpu("run", "--", "eval")
    assert ended.returncode == 1 and "worker 1 (medmoe-w-1): failed with status 1" in ended.stderr
    assert "--dir" not in ended.stderr
    tpu("create")
    (tpu.folder / "home-0" / "medmoe-run").mkdir()
    ended = tpu("run", "--", "eval")
    assert ended.returncode == 1
    assert ended.stderr.count("--dir=medmoe-run cannot be made, or is there and was not made") == 1


def test_a_silent_gcloud_does_not_pass_for_a_tpu_that_is_gone(tpu):
    tpu("create")
    tpu.stub("gcloud", GCLOUD.replace("tpu-vm/list)", "tpu-vm/list) exit 1"))
    ended = tpu("resume", "--max-restarts=2", "--", "eval")
    assert ended.returncode == 255 and "gcloud does not say how medmoe is" in ended.stderr
    assert verbs(tpu) == ["queued-resources create"]


@pytest.mark.parametrize("question", ["tpu-vm/list", "queued-resources/list"])
def test_a_gcloud_that_is_silent_for_a_while_does_not_end_a_resume(tpu, question):
    """Also where it is silent at the first look and not at the next: nothing is made anew."""
    once = f"{question}) if [[ ! -e silent ]]; then touch silent; exit 1; fi;"
    tpu.behaves("true")
    tpu("create")
    tpu.stub("gcloud", GCLOUD.replace(f"{question})", once))
    ended = tpu("resume", "--max-restarts=2", "--", "eval")
    assert ended.returncode == 0, ended.stderr
    assert "no start: the workers could not be made ready (status 255)" in ended.stderr
    assert "done after 1 starts" in ended.stderr
    assert verbs(tpu) == ["queued-resources create", "tpu-vm scp"]


def test_machines_that_are_refused_for_a_while_do_not_end_a_resume(tpu):
    """As where no quota is left; and the launcher says what it asks for."""
    refused = "queued-resources/create) if [[ ! -e refused ]]; then touch refused; exit 1; fi;"
    tpu.stub("gcloud", GCLOUD.replace("queued-resources/create)", refused))
    tpu.behaves("true")
    ended = tpu("resume", "--max-restarts=2", "--spot", "--", "eval")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("asking for medmoe anew: v4-16, spot") == 2
    assert verbs(tpu) == ["queued-resources create"] * 2 + ["tpu-vm scp"]
    (tpu.folder / "node").write_text("PREEMPTED")
    ended = tpu("resume", "--", "eval")
    assert "asking for medmoe anew: v4-16, on demand" in ended.stderr


@pytest.mark.parametrize(
    ("node", "request_", "message"),
    [
        ("STOPPED", "ACTIVE", "medmoe is STOPPED: start it with gcloud, or delete it"),
        (None, "FAILED", "medmoe was not made ready"),
    ],
)
def test_a_tpu_that_does_not_come(tpu, node, request_, message):
    lasting = f"echo {request_} >request; {f'echo {node} >node' if node else 'true'}"
    tpu.stub("gcloud", GCLOUD.replace("echo ACTIVE >request; echo READY >node", lasting))
    ended = tpu("create")
    assert ended.returncode == 1 and message in ended.stderr


def test_another_number_of_hosts_is_named(tpu):
    ended = tpu("create", "--hosts=3")
    assert ended.returncode == 1
    assert "medmoe has 2 hosts and 3 were expected: give --hosts=2" in ended.stderr


def test_waits_for_the_queue(tpu):
    """Each look at the queue finds it one state further."""
    slow = (
        GCLOUD.replace(
            "if [[ -e request ]]; then cat request; fi",
            "if [[ -e request ]]; then read -r first rest <states; "
            'echo "$first"; [[ $first == ACTIVE ]] || echo "$rest" >states; fi',
        )
        .replace("echo READY >node", "true")
        .replace(
            "if [[ -e node ]]",
            "if grep -q ^ACTIVE states; then echo READY >node; fi; if [[ -e node ]]",
        )
    )
    (tpu.folder / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE\n")
    tpu.stub("gcloud", slow)
    ended = tpu("create")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    states = [line.rpartition(" ")[2] for line in lines if "queued resource" in line]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (told,) = (line for line in lines if "queued resource" not in line)
    assert "after Ctrl-C it stays asked for" in told and told.endswith("until: delete")


def test_ssh_hosts(launcher):
    """Two hosts: run, logs, and everything removed again."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=me@home-0,home-1"))
    ssh.behaves('echo "hello from $worker"')
    job = ["train", "--workdir=/shared", "it's", "two\nlines"]
    ended = ssh("run", "--", *job)
    assert ended.returncode == 0, ended.stderr
    for worker in (0, 1):
        seen = ssh.environment(worker)
        assert ssh.arguments(worker) == job
        assert seen["MEDMOE_COORDINATOR"] == "home-0:8476"
        assert (seen["MEDMOE_PROCESSES"], seen["MEDMOE_PROCESS"]) == ("2", str(worker))
    assert ssh("logs", "--worker=1").stdout == "hello from 1\n"
    assert ssh("delete").returncode == 0
    assert not list(ssh.folder.glob("home-*/*"))


# A host is away while there is a file `down-HOST`; each connection that fails takes a line of it.
AWAY = r"""#!/usr/bin/env bash
words=("$@")
while [[ $1 == -* ]]; do shift; done
down=$FAKE/down-${1#me@}
if [[ -s $down ]]; then sed -i 1d "$down"; exit 255; fi
"""


def test_a_host_that_is_away_for_a_while_does_not_end_a_resume(launcher):
    """It vanishes under the job, comes back after two more tries, and the job goes on."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0,home-1", "--poll=1"))
    ssh.stub(
        "ssh", AWAY + SSH.partition("\n")[2].replace("while", 'set -- "${words[@]}"; while', 1)
    )
    ssh.behaves(
        'mkdir -p "$FAKE/shared/stages/a"; touch "$FAKE/shared/stages/a/manifest.json"\n'
        'if (($(wc -l <"$FAKE/starts-$worker") == 1)); then\n'
        "  if ((worker == 0)); then sleep 60; fi\n"
        "  until [[ -e $FAKE/starts-0 && -s $FAKE/runs/launch/worker-1.log ]]; do sleep 0.1; done\n"
        '  sleep 1; printf "away\\naway\\n" >"$FAKE/down-home-1"; exit 143\n'
        "fi\n"
    )
    job = ["train", f"--workdir={ssh.folder}/shared"]
    ended = ssh("resume", "--grace=1", "--", *job)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no start: the workers could not be made ready (status 255)") == 2
    assert "worker 1 (home-1): failed with status 255" in ended.stderr
    assert "done after 2 starts" in ended.stderr
    (ssh.folder / "down-home-0").write_text("away\n" * 99)
    ended = ssh("resume", "--max-restarts=2", "--", *job)
    assert ended.returncode == 255 and "giving up: 2 tries in a row" in ended.stderr
    assert "start 1" not in ended.stderr.replace("restart", "")
    ended = ssh("run", "--", *job)
    assert ended.returncode == 255 and "--dir" not in ended.stderr


def test_a_setup_that_fails_has_one_status_and_is_no_start(launcher):
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0", "--setup=exit 3", "--poll=1"))
    for verb in ("run", "resume"):
        ended = ssh(verb, "--max-restarts=2", "--", "eval")
        assert ended.returncode == 1 and "--setup ended with status 3" in ended.stderr, verb
    assert ended.stderr.count("no start: the workers could not be made ready (status 1)") == 2
    assert "tpu_run.sh: start" not in ended.stderr


def test_a_tpu_that_another_process_holds(tmp_path):
    """The holder is named; once it is gone the job starts."""
    (tmp_path / "accel0").touch()
    (tmp_path / "medmoe").write_text("#!/bin/sh\n")
    (tmp_path / "medmoe").chmod(0o755)
    env = os.environ | {
        "TPU_RUN_DEVICE_FILES": f"{tmp_path}/accel*",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    start = ["bash", WORKER, "start", tmp_path / "run", "0", "A=b", "--", "train"]
    with (tmp_path / "accel0").open() as device:
        holder = subprocess.Popen(["sleep", "61"], stdin=device)
    try:
        ended = subprocess.run(start, env=env, capture_output=True, text=True)
        assert ended.returncode == 11
        assert f"the TPU is held by process {holder.pid} (sleep 61 )" in ended.stderr
        assert f"kill {holder.pid}" in ended.stderr
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert subprocess.run(start, env=env).returncode == 0


def test_only_what_the_launcher_made_is_removed(launcher):
    """A folder that was there before is named and left as it is, by every verb."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0", "--dir=proj"))
    ssh.behaves("true")
    theirs = ssh.folder / "home-0" / "proj" / "code"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("years of work")
    for verb in ("ship", "run", "delete"):
        ended = ssh(verb, "--", "eval") if verb == "run" else ssh(verb)
        assert ended.returncode, verb
        assert (theirs / "thesis.tex").read_text() == "years of work"
    assert "--dir=proj cannot be made, or is there and was not made" in ssh("ship").stderr
    # The same inside a folder that is the launcher's own.
    ours = ["--dir=ours/deep"]
    assert ssh("run", *ours, "--", "eval").returncode == 0
    mine = ssh.folder / "home-0" / "ours" / "deep" / "notes.txt"
    mine.write_text("keep")
    assert ssh("delete", *ours).returncode == 0
    assert [path.name for path in mine.parent.iterdir() if path.name != ".tpu_run"] == ["notes.txt"]


def test_job_folders_of_others_on_this_machine_stay(launcher):
    local = launcher("--backend=local", "--hosts=1", "--logs=logs")
    local.behaves("true")
    theirs = local.folder / "logs" / "worker-0" / "results.csv"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("1,2")
    for words in (["run", "--", "eval"], ["delete"]):
        ended = local(*words)
        assert ended.returncode and "was not made by this launcher" in ended.stderr
        assert theirs.read_text() == "1,2"


def test_secrets_are_private_and_gone_when_the_job_ends(launcher):
    """The file is read by nobody else while it is there, though the folder was open before."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0,home-1", "--env-file=tokens"))
    tokens = ssh.folder / "tokens"
    tokens.write_text("HF_TOKEN=hunter2\n")
    tokens.chmod(0o644)
    find = 'find "$FAKE"/home-* -name "env*" -printf "%m %P\\n"'
    ssh.behaves(
        f'{find} >"$FAKE/seen-$worker"; cat "$FAKE/home-$worker/medmoe-run/worker-$worker/env"'
    )
    assert ssh("run", "--", "eval").returncode == 0
    folder = ssh.folder / "home-0" / "medmoe-run"
    folder.chmod(0o755)
    ended = ssh("run", "--", "eval")
    assert ended.returncode == 0, ended.stderr
    assert ssh.environment(1)["HF_TOKEN"] == "hunter2"
    assert folder.stat().st_mode & 0o077 == 0
    seen = (ssh.folder / "seen-0").read_text().splitlines()
    assert seen and all(line.startswith("600 ") for line in seen)
    assert not [path for path in ssh.folder.glob("home-*/**/env*") if path.is_file()]
    # What a job that was killed with its parent has left goes with the next stop.
    left = folder / "worker-0" / "env"
    left.write_text("HF_TOKEN=hunter2\n")
    assert ssh("stop").returncode == 0 and not left.exists()


def test_variables_of_the_next_start_outlive_the_job_before_it(launcher):
    """A launcher sends them while the job of one that was killed still runs, and ends meanwhile."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0", "--env-file=tokens"))
    (ssh.folder / "tokens").write_text("HF_TOKEN=hunter2\n")
    ssh.behaves(': >"$FAKE/ready"; until [[ -e $FAKE/go ]]; do sleep 0.1; done')
    folder = ssh.folder / "home-0" / "medmoe-run" / "worker-0"
    first = ssh.begin("run", "--", "eval")
    wait_for((ssh.folder / "ready").exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()  # not for its output, which those who follow the job may keep open
    assert ssh("ship").returncode == 0  # of the next launcher
    (ssh.folder / "go").touch()
    wait_for((folder / "status").exists)
    assert [path.name for path in folder.glob("env*")] == ["env.next"]
    (ssh.folder / "environment-0").unlink()
    start = "bash medmoe-run/worker.sh start medmoe-run 0 JAX_PLATFORMS=cpu -- eval"
    home = ssh.folder / "home-0"
    subprocess.run(start.split(), env=ssh.env | {"HOME": str(home)}, cwd=home, check=True)
    wait_for((folder / "status").exists)
    assert ssh.environment(0)["HF_TOKEN"] == "hunter2" and not list(folder.glob("env*"))
    # Neither a start that is refused nor a stop before the start leaves them there.
    assert ssh("ship").returncode == 0 and (folder / "env.next").exists()
    assert ssh("stop").returncode == 0 and not list(folder.glob("env*"))


def test_variables_reach_all_where_some_workers_still_ran(launcher):
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0,home-1", "--env-file=tokens"))
    (ssh.folder / "tokens").write_text("HF_TOKEN=hunter2\n")
    ssh.behaves(
        ': >"$FAKE/ready-$worker"\nif (($(wc -l <"$FAKE/starts-0") == 1)); then exec sleep 60; fi'
    )
    first = ssh.begin("run", "--", "eval")
    for worker in (0, 1):
        wait_for((ssh.folder / f"ready-{worker}").exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()  # not for its output, which the worker that still runs keeps open
    group = ssh.folder / "home-1" / "medmoe-run" / "worker-1" / "group"
    os.killpg(int(group.read_text()), signal.SIGKILL)
    for worker in (0, 1):
        (ssh.folder / f"environment-{worker}").unlink()
    ended = ssh("run", "--grace=1", "--", "eval")
    assert ended.returncode == 0, ended.stderr
    assert "some workers still run an earlier start" in ended.stderr
    assert [ssh.environment(worker)["HF_TOKEN"] for worker in (0, 1)] == ["hunter2"] * 2


def test_ctrl_c_while_workers_begin_waits_for_them(launcher):
    """What has not begun cannot be stopped, and would run on unseen."""
    ssh = stubs(launcher("--backend=ssh", "--hosts=home-0,home-1"))
    late = 'if [[ $1/$2 == home-1/*" start "* ]]; then touch "$FAKE/begins"; sleep 1; fi\n'
    ssh.stub("ssh", SSH.replace("mkdir", late + "mkdir", 1))
    ssh.behaves(
        "trap 'touch \"$FAKE/saved-$worker\"; exit 75' TERM\nwhile true; do sleep 0.1; done"
    )
    begun = ssh.begin("run", "--", "train")
    wait_for((ssh.folder / "begins").exists)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130, said
    for worker in (0, 1):
        assert (ssh.folder / f"saved-{worker}").exists() and ssh.starts(worker) == 1
    assert not list((ssh.folder / "runs/launch").glob("followers.*"))


def test_what_a_killed_launcher_left_is_cleaned_up(launcher):
    """Its followers would write every line twice, its copies of the code would stay for ever."""
    local = launcher("--backend=local", "--hosts=2")
    local.env["TMPDIR"] = str(local.folder / "tmp")
    dead = subprocess.Popen(["true"])
    dead.wait()
    scratch = local.folder / "tmp" / f"tpu_run.{dead.pid}.abcdef"
    alive = local.folder / "tmp" / f"tpu_run.{os.getpid()}.abcdef"
    for one in (scratch, alive):
        one.mkdir(parents=True)
    local.behaves('until [[ -e $FAKE/go ]]; do sleep 0.1; done; echo "said once by $worker"')
    first = local.begin("run", "--", "eval")
    logs = local.folder / "runs" / "launch"
    wait_for(lambda: len(lines_of(logs, "followers.*")) == 4)
    first.kill()  # only the launcher itself: its followers live on
    first.wait()
    second = local.begin("run", "--", "eval")
    wait_for(lambda: len(lines_of(logs, f"followers.{second.pid}")) == 4)
    (local.folder / "go").touch()
    assert second.wait(30) == 0
    first.communicate()
    for worker in (0, 1):
        text = (logs / f"worker-{worker}.log").read_text()
        assert text.count(f"said once by {worker}") == 1
    assert not list(logs.glob("followers.*"))
    assert not scratch.exists() and alive.exists()


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def lines_of(folder: Path, pattern: str) -> list[str]:
    return [line for file in folder.glob(pattern) for line in file.read_text().splitlines()]
