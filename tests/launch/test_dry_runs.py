"""What --dry-run prints, word for word: the commands that would run, one a line."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SSH = (
    "--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15"
    " --ssh-flag=-oServerAliveCountMax=4"
)
OPTIONS = "-oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4"
NODE = (
    "gcloud compute tpus tpu-vm list '--filter=name~\"(^|/)med$\"'"
    " '--format=value(state,networkEndpoints.len())' --zone=z"
)
REQUEST = (
    "gcloud compute tpus queued-resources list '--filter=name~\"(^|/)med$\"'"
    " '--format=value(state.state)' --zone=z"
)
CREATE = (
    "gcloud compute tpus queued-resources create med --node-id=med --spot"
    " --accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base --zone=z"
)
DELETE = "gcloud compute tpus queued-resources delete med --force --quiet --zone=z"


def on(worker: int, command: str) -> str:
    return f"gcloud compute tpus tpu-vm ssh med --worker={worker} {SSH} {command} --zone=z"


def on_both(command: str) -> list[str]:
    return [on(worker, command.replace("@", str(worker))) for worker in (0, 1)]


CLAIM = (
    r"sh -c '\''{ test -e "
    r""""$1/.tpu_run" || { mkdir -p "$(dirname "$1")" && mkdir "$1" && touch "$1/.tpu_run"; }"""
    r""" || { echo "--dir=$1 cannot be made, or is there and was not made by this launcher: give """
    r"""another" >&2; exit 1; }; }"""
    r""" && chmod 700 "$1" && rm -f "$1/env"'\'' sh medmoe-run"""
)
PACK = "# pack the tracked files of ROOT into runs/launch/ship/code.tar.gz: code HASH"
INSTALL = r"bash medmoe-run/worker.sh install medmoe-run @ HASH 3.12 '\''-e .[tpu]'\'' '\'''\''"
START = (
    r"bash medmoe-run/worker.sh start medmoe-run @ MEDMOE_COORDINATOR=auto --"
    r" train --workdir=/mnt/a '\''it'\''\'\'''\''s b'\''"
)
RUN = [
    PACK,
    *on_both(f"'--command={CLAIM}'"),
    "gcloud compute tpus tpu-vm scp runs/launch/ship/code.tar.gz ROOT/launch/worker.sh"
    " med:medmoe-run/ --worker=all --zone=z",
    *on_both(f"'--command={INSTALL}'"),
    *on_both(f"'--command={START}'"),
    *on_both("'--command=bash medmoe-run/worker.sh attach medmoe-run @'"),
]
SAVED = on(0, "'--command=bash medmoe-run/worker.sh saved medmoe-run 0 /mnt/a'")


@pytest.fixture
def plan(launcher):
    """Prints of a dry run, with what changes from checkout to checkout replaced."""
    one = launcher("--dry-run")

    def printed(*words: str, **env: str) -> list[str]:
        ended = one(*words, **env)
        assert ended.returncode == 0, ended.stderr
        assert not (one.folder / "runs").exists()
        text = ended.stdout.replace(str(ROOT), "ROOT")
        return re.sub(r"\b[0-9a-f]{12}\b", "HASH", text).splitlines()

    return printed


TPU = ["--zone=z", "--name=med", "--accelerator-type=v4-16", "--spot"]
JOB = ["--", "train", "--workdir=/mnt/a", "it's b"]


def test_tpu_create(plan):
    assert plan("create", *TPU) == [CREATE, "# every 20 s, until the TPU is READY:", NODE, REQUEST]


def test_tpu_create_at_once_and_on_demand(plan):
    """Without the queue, in a project and with gcloud's own flags."""
    more = ["--queued=no", "--spot=no", "--project=p", "--create-flags=--network=n --internal-ips"]
    assert plan("create", *TPU, *more) == [
        "gcloud compute tpus tpu-vm create med --accelerator-type=v4-16"
        " --version=tpu-ubuntu2204-base --network=n --internal-ips --zone=z --project=p",
        "# every 20 s, until the TPU is READY:",
        f"{NODE} --project=p",
    ]


def test_tpu_run(plan):
    assert plan("run", *TPU, *JOB) == RUN


def test_tpu_resume(plan):
    *lines, last = plan("resume", *TPU, *JOB)
    again = [
        NODE,
        REQUEST,
        "# where they are gone, as after a preemption:",
        DELETE,
        CREATE,
        "# every 20 s, until the TPU is READY:",
        NODE,
        REQUEST,
    ]
    assert lines == [*again, *RUN[:6], SAVED, *RUN[6:]]
    assert last.startswith("# and all of it again until the status is 0, 1 or 2 (bad input)")


def test_tpu_logs_stop_status_delete(plan):
    log = "'--command=bash medmoe-run/worker.sh log medmoe-run @ {}'"
    assert plan("logs", *TPU) == on_both(log.format("50 no"))
    assert (
        plan("logs", *TPU, "--worker=1", "--follow", "--lines=5")
        == on_both(log.format("5 yes"))[1:]
    )
    assert plan("stop", *TPU, "--grace=9") == on_both(
        "'--command=bash medmoe-run/worker.sh stop medmoe-run @ 9'"
    )
    assert plan("status", *TPU) == [
        NODE,
        REQUEST,
        *on_both("'--command=bash medmoe-run/worker.sh status medmoe-run @'"),
    ]
    assert plan("delete", *TPU) == [DELETE]
    assert plan("delete", *TPU, "--queued=no") == [
        "gcloud compute tpus tpu-vm delete med --quiet --zone=z"
    ]


@pytest.mark.parametrize(
    ("slice_", "runtime", "hosts"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite", 1),
        ("v5litepod-16", "v2-alpha-tpuv5-lite", 4),
        ("v5litepod-16 v5e:4x4", "v2-alpha-tpuv5-lite", 4),
        ("v5p-128 v5p:4x4x4", "v2-alpha-tpuv5", 16),
        ("v6e-256", "v2-alpha-tpuv6e", 64),
    ],
)
def test_slices(plan, slice_, runtime, hosts):
    cloud, _, same = slice_.partition(" ")
    flags = ["--zone=z", f"--accelerator-type={same or cloud}"]
    create = plan("create", *flags)[0]
    assert f"--accelerator-type={cloud} --runtime-version={runtime} " in create
    assert len(plan("stop", *flags)) == hosts


def test_a_slice_that_the_launcher_does_not_know(plan):
    """It is gcloud's to judge, once the machines are described."""
    flags = ["--zone=z", "--accelerator-type=v9-8", "--runtime-version=r", "--hosts=3"]
    assert "--accelerator-type=v9-8 --runtime-version=r " in plan("create", *flags)[0]
    assert len(plan("stop", *flags)) == 3


def test_every_line_is_a_command_that_a_shell_reads_back(plan):
    """Down to the arguments of medmoe: unquoted twice they are what was given."""
    words = ["train", "a  b", "it's", '"$x" `y`', "two\nlines", "", "*"]
    lines = [line for line in plan("run", *TPU, "--", *words) if "worker.sh start" in line]
    assert len(lines) == 2
    for line in lines:
        (command,) = [w for w in shlex.split(line) if w.startswith("--command=")]
        # shlex does not know $'...', which only the line break needs.
        command = command.removeprefix("--command=").replace("$'two\\nlines'", "'two\nlines'")
        inner = shlex.split(command)
        assert inner[inner.index("--") + 1 :] == words


@pytest.fixture
def gcloud(tmp_path):
    """Runs a command of the real gcloud, as an account that it has no credentials for."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud")}
    env |= {"CLOUDSDK_CORE_ACCOUNT": "nobody@example.invalid", "CLOUDSDK_CORE_PROJECT": "p"}

    def run(line: str, text: str = ""):
        words = shlex.split(line)
        return subprocess.run(words, env=env, input=text, capture_output=True, text=True)

    return run


def test_the_real_gcloud_reads_every_command(plan, gcloud):
    """It checks its flags first (status 2), and who asks then (status 1)."""
    on_demand = ["--queued=no", "--spot=no"]
    lines = [*plan("run", *TPU, *JOB), *plan("status", *TPU), *plan("delete", *TPU)]
    lines += [*plan("create", *TPU), *plan("create", *TPU, *on_demand)]
    lines += plan("delete", *TPU, *on_demand)
    verbs = {tuple(shlex.split(one)[3:5]): one for one in lines if one.startswith("gcloud")}
    assert len(verbs) == 8
    for line in verbs.values():
        ended = gcloud(line)
        assert ended.returncode == 1 and "nobody@example.invalid" in ended.stderr, ended.stderr
    assert gcloud(CREATE.replace("--node-id", "--node-name")).returncode == 2


@pytest.mark.parametrize(
    ("line", "found", "printed"),
    [
        (NODE, {"state": "READY", "networkEndpoints": [{"port": 1}, {"port": 2}]}, "READY\t2\n"),
        (NODE, {"state": "CREATING"}, "CREATING\t0\n"),
        (REQUEST, {"state": {"state": "SUSPENDED"}}, "SUSPENDED\n"),
    ],
)
def test_the_real_gcloud_filters_and_prints_as_the_launcher_reads(gcloud, line, found, printed):
    """The machine of that name and no other, out of what Cloud TPU answers."""
    asked = " ".join(shlex.quote(w) for w in shlex.split(line) if re.match("--(filter|format)=", w))
    names = ("projects/p/locations/z/nodes/med", "projects/p/locations/z/nodes/med2", "amed")
    answer = json.dumps([{"name": name, **found} for name in names])
    assert gcloud(f"gcloud meta list-from-json {asked}", answer).stdout == printed


def test_secrets_stay_in_their_file(plan, tmp_path):
    (tmp_path / "tokens").write_text("HF_TOKEN=hunter2\n")
    lines = plan("ship", *TPU, "--env-file=tokens")
    assert f"ln -sfn {tmp_path}/tokens runs/launch/ship/env" in lines
    (copy,) = [line for line in lines if " scp " in line]
    assert " runs/launch/ship/env med:medmoe-run/ " in copy
    # Private before anything is in it, and gone as soon as every worker has its own.
    private = on_both("'--command=install -m 600 /dev/null medmoe-run/env'")
    gone = on_both("'--command=rm -f medmoe-run/env'")
    at = [lines.index(one) for one in (private[1], copy, on_both(f"'--command={INSTALL}'")[0])]
    assert at == sorted(at) and lines[-2:] == gone
    assert not any("hunter2" in line for line in lines)


def test_ssh(plan):
    hosts = ["--backend=ssh", "--hosts=me@one,two"]
    job = "bash medmoe-run/worker.sh {} medmoe-run {}"
    variables = "MEDMOE_COORDINATOR=one:8476 MEDMOE_PROCESSES=2 MEDMOE_PROCESS={}"

    def ssh(text: str) -> list[str]:
        return [
            f"ssh {OPTIONS} {host} {text.replace('@N', str(worker))}"
            for worker, host in enumerate(["me@one", "two"])
        ]

    def verb(name: str, rest: str = "") -> list[str]:
        return ssh(f"'{job.format(name, '@N')}{rest}'")

    create = ssh("true")
    ship = [
        PACK,
        *ssh(f"'{CLAIM}'"),
        *[
            f"scp -q {OPTIONS} runs/launch/ship/code.tar.gz ROOT/launch/worker.sh"
            f" {host}:medmoe-run/"
            for host in ("me@one", "two")
        ],
        *verb("install", r" HASH 3.12 '\''-e .[tpu]'\'' '\'''\''"),
    ]
    start = verb("start", " " + variables.format("@N") + " -- train --workdir=/a")
    words = ["--", "train", "--workdir=/a"]
    assert plan("create", *hosts) == create
    assert plan("run", *hosts, *words) == [*ship, *start, *verb("attach")]
    *lines, _ = plan("resume", *hosts, *words)
    assert lines == [*create, *ship, verb("saved", " /a")[0], *start, *verb("attach")]
    assert plan("logs", *hosts) == verb("log", " 50 no")
    assert plan("stop", *hosts) == verb("stop", " 60")
    assert plan("delete", *hosts) == [*verb("stop", " 60"), *verb("remove")]
    assert plan("run", *hosts, "--coordinator=auto", *words)[7].endswith(
        "0 MEDMOE_COORDINATOR=auto -- train --workdir=/a'"
    )


def test_local(plan):
    lines = plan("run", "--backend=local", "--hosts=1", "--coordinator=h:1", "--", "train", "a b")
    assert lines == [
        "bash ROOT/launch/worker.sh start runs/launch 0 MEDMOE_COORDINATOR=h:1 MEDMOE_PROCESSES=1"
        " MEDMOE_PROCESS=0 JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo"
        " XLA_FLAGS=--xla_force_host_platform_device_count=4 -- train 'a b'",
        "bash ROOT/launch/worker.sh attach runs/launch 0",
    ]
