"""The back end gke: its manifest against JobSet's schema, its verbs with a stand-in for kubectl."""

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

pytestmark = pytest.mark.processes

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
OURS = "app.kubernetes.io/managed-by=medmoe-tpu-run,app.kubernetes.io/instance=medmoe"

# Notes what it is asked. A JobSet is there where the file `jobset` is; each look at it takes the
# next of the files `look-1`, `look-2`: its state and restarts in the first line, then its pods.
KUBECTL = r"""#!/usr/bin/env bash
printf '%s\n' "${*@Q}" >>"$FAKE/asked"
while [[ $1 == --* ]]; do shift; done
cd "$FAKE" || exit
case $1/$2 in
  config/current-context) cat context ;;
  api-resources/*) cat resources ;;
  get/nodes) printf 'node/a\nnode/b\n' ;;
  get/jobset)
    [[ -e jobset ]] || exit 0
    echo >>looks
    now=look-$(wc -l <looks)
    if [[ -e $now ]]; then cp "$now" now; fi
    if grep -q '^gone' now; then exit 0; fi
    echo "$(cat owner)|$(head -n 1 now)|$(cat command)"
    ;;
  get/pods) ps -o pgid= -p $$ >>groups; tail -n +2 now ;;
  create/secret)
    for word; do
      case $word in --from-file=env=*) echo "Secret of $(cat "${word#*=env=}")" ;; esac
    done
    ;;
  label/*) echo "labels ${*:5}"; cat ;;
  create/*)
    made=made-$(ls made-* 2>/dev/null | wc -l)
    cat >"$made"
    if grep -q 'kind: JobSet' "$made"; then
      if [[ -e refuse ]]; then echo 'Error: denied the request' >&2; exit 1; fi
      touch jobset
    fi
    ;;
  logs/*)
    for word; do pod=$word; done
    cat "log-$pod" 2>/dev/null
    if [[ -e "wait-$pod" ]]; then sleep 60; fi
    ;;
  delete/jobset,secret) rm -f jobset ;;
esac
"""


@pytest.fixture
def gke(launcher):
    one = launcher("--backend=gke", "--accelerator-type=v5e-16", "--image=r/m:1", "--poll=1")
    one.stub("kubectl", KUBECTL)
    one.stub("sleep", "#!/usr/bin/env bash\nif (($1 > 1)); then exec tail -f /dev/null; fi\n")
    one.folder.joinpath("context").write_text("gke_p_z_c\n")
    one.folder.joinpath("resources").write_text("jobsets.jobset.x-k8s.io\n")
    one.folder.joinpath("owner").write_text("medmoe-tpu-run\n")
    one.folder.joinpath("command").write_text("'train' '--workdir=gs://b/a'\n")
    return one


JOB = ["--", "train", "--workdir=gs://b/a"]


def asked(gke) -> list[list[str]]:
    """What kubectl was asked, its context and namespace aside."""
    path = gke.folder / "asked"
    lines = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [[w for w in line if not w.startswith(("--context=", "--namespace="))] for line in lines]


def looks(gke, *states: list[str]) -> None:
    for number, lines in enumerate(states, 1):
        (gke.folder / f"look-{number}").write_text("\n".join(lines) + "\n")


def pod(index: int, phase: str, start: int = 0, status: str = "", waits: str = "") -> str:
    ended = f"2026-01-01T00:00:0{9 - index}Z" if status else ""
    name = f"medmoe-slice-0-{index}-s{start}"
    return f"{ended}|{start}|0|{index}|{phase}|{status}|{name}|{waits}"


def closed(node):
    """The schema as Kubernetes validates strictly: no field that it does not name."""
    if isinstance(node, dict):
        node = {name: closed(value) for name, value in node.items()}
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            node.setdefault("additionalProperties", False)
    return [closed(one) for one in node] if isinstance(node, list) else node


def manifest(gke, *words: str) -> dict:
    """What a dry run prints, whole, as kubectl would read it."""
    ended = gke(*words[:1], "--dry-run", *words[1:])
    # What fails within a heredoc ends nothing, but is heard of.
    assert ended.returncode == 0 and "gke" not in ended.stderr, ended.stderr
    assert not (gke.folder / "asked").exists() and not (gke.folder / "runs").exists()
    (one,) = yaml.safe_load_all(ended.stdout)
    jsonschema.validate(one, closed(SCHEMA))
    return one


def test_the_manifest_of_one_slice(gke):
    one = manifest(gke, "run", *JOB)
    assert one["metadata"]["name"] == "medmoe" and one["metadata"]["namespace"] == "default"
    (slices,) = one["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    assert job["backoffLimit"] == 0 and one["spec"]["failurePolicy"] == {"maxRestarts": 0}
    pods = job["template"]["spec"]
    assert pods["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pods["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "MEDMOE_COORDINATOR", "value": "auto"}]
    assert container["image"] == "r/m:1" and container["args"] == JOB[1:]
    assert not {"hostNetwork", "volumes", "tolerations", "serviceAccountName"} & set(pods)
    ours = dict(pair.split("=") for pair in OURS.split(","))
    for labels in (one, slices["template"], job["template"]):
        assert ours.items() <= labels["metadata"]["labels"].items()


def test_the_manifest_of_several_slices_with_all_there_is(gke):
    """Preemptions restart without end, other failures three times, bad input never."""
    (gke.folder / "tokens").write_text("HF_TOKEN='hunter 2'\n")
    words = ["--accelerator-type=2xv5p-32", "--spot", "--env-file=tokens", "--grace=30"]
    words += ["--volumes=runs:/mnt/runs data:/data", "--service-account=sa", "--namespace=ml"]
    job = [
        "train",
        "--workdir=/mnt/runs/a",
        'it\'s "q" \\',
        "$(HOME) $$x `y`",
        "two\nlines",
        "",
        "*",
    ]
    one = manifest(gke, "resume", *words, "--", *job)
    (slices,) = one["spec"]["replicatedJobs"]
    assert (slices["replicas"], slices["template"]["spec"]["completions"]) == (2, 4)
    exclusive = one["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    policy = one["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert [rule["action"] for rule in policy["rules"]] == [
        "FailJobSet", "RestartJobSetAndIgnoreMaxRestarts",
    ]  # fmt: skip
    on = slices["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in on] == ["FailJob"] * 2
    assert on[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert on[1]["onExitCodes"]["values"] == [1, 2, 75]
    pods = slices["template"]["spec"]["template"]["spec"]
    assert pods["hostNetwork"] is True and pods["terminationGracePeriodSeconds"] == 30
    assert pods["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pods["serviceAccountName"] == "sa" and one["metadata"]["namespace"] == "ml"
    secret, runs, data = pods["volumes"]
    assert secret["secret"] == {"secretName": "medmoe-env", "defaultMode": 0o400}
    assert runs["persistentVolumeClaim"] == {"claimName": "runs"} and data["name"] == "volume-1"
    (container,) = pods["containers"]
    mounts = {it["name"]: it["mountPath"] for it in container["volumeMounts"]}
    assert mounts == {"env": "/run/medmoe", "volume-0": "/mnt/runs", "volume-1": "/data"}
    assert "hunter" not in json.dumps(one)

    # The command as a pod runs it: Kubernetes turns $$ into $, and leaves $x as it is.
    gke.behaves("true")
    command = [word.replace("$$", "$") for word in container["command"] + container["args"]]
    command[3] = str(gke.folder / "tokens")
    subprocess.run(command, env=gke.env | {"MEDMOE_PROCESS": "0"}, check=True)
    assert gke.arguments(0) == job and gke.environment(0)["HF_TOKEN"] == "hunter 2"


def test_one_node_has_all_chips_of_a_small_slice(gke):
    one = manifest(gke, "run", "--accelerator-type=tpu7x-8", "--", "eval")
    pods = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pods["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu7x"
    assert pods["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x1"
    (container,) = pods["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and "env" not in container
    assert "exclusive-topology" not in json.dumps(one)


def test_a_job_is_made_taken_away_and_done(gke):
    """Its pods wait, run, are preempted once, run again; the secret is nowhere but in its file."""
    (gke.folder / "tokens").write_text("HF_TOKEN=hunter2\n")
    for start in (0, 1):
        for index in range(4):
            (gke.folder / f"log-medmoe-slice-0-{index}-s{start}").write_text(
                f"{index} at {start}\n"
            )
    first, again = ([pod(i, "Running", start) for i in range(4)] for start in (0, 1))
    first[2] = pod(2, "Failed", 0, "75")
    first[1] = pod(1, "Failed", 0, "69")  # ended later
    looks(
        gke,
        ["|", pod(0, "Pending", waits=" 0/3 nodes are available"), pod(1, "Pending")],
        ["|0", *first],
        ["|1", *again],
        ["Completed|1", *(pod(i, "Succeeded", 1, "0") for i in range(4))],
    )
    ended = gke("resume", "--env-file=tokens", *JOB)
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr
    assert "worker 0 (medmoe-slice-0-0-s0) waits: 0/3 nodes are available" in said
    assert (
        "worker 2 (medmoe-slice-0-2) saved and ended after a preemption notice (status 75)" in said
    )
    assert "    2 at 0\n" in said and "status 69" not in said
    assert "start 2" in said and "JobSet medmoe: Completed, starts: 2, status: 0" in said
    # In either order: these looks follow each other at once.
    assert sorted(ended.stdout.splitlines()) == ["0 at 0", "0 at 1"]
    copy = (gke.folder / "runs/launch/worker-3.log").read_text()
    assert "3 at 0\n" in copy and "3 at 1\n" in copy
    assert not list((gke.folder / "runs/launch").glob("followers.*"))
    secret, jobset = ((gke.folder / f"made-{number}").read_text() for number in (0, 1))
    assert secret == f"labels {OURS.replace(',', ' ')}\nSecret of HF_TOKEN=hunter2\n"
    jsonschema.validate(yaml.safe_load(jobset), closed(SCHEMA))
    words = (gke.folder / "asked").read_text()
    assert "hunter2" not in words + jobset + said + ended.stdout
    assert all("--context=gke_p_z_c" in line for line in words.splitlines()[1:])
    removed = [line for line in asked(gke) if line[0] == "delete"]
    assert removed == [["delete", "secret", f"--selector={OURS}", "--ignore-not-found"]] * 2


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        (
            ["Failed|0", pod(0, "Running"), pod(1, "Failed", 0, "1")],
            1,
            "worker 1 (medmoe-slice-0-1)",
        ),
        (["Failed|3", pod(0, "Failed", 3, "137")], 137, "was killed by signal 9"),
        (["Failed|0"], 255, "Failed, starts: 1, status: 255"),
        (["gone"], 130, "stopped, starts: 1, status: 130"),
    ],
)
def test_how_a_job_can_end(gke, last, status, said):
    looks(gke, last)
    ended = gke("run", *JOB)
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr


def test_a_job_that_runs_is_followed_and_another_is_not_touched(gke):
    (gke.folder / "jobset").touch()
    looks(gke, ["|0"], ["Completed|0"])
    ended = gke("run", *JOB)
    assert ended.returncode == 0 and "this job runs already: following it" in ended.stderr
    (gke.folder / "looks").unlink()
    ended = gke("run", "--", "train", "other")
    assert ended.returncode == 1
    assert "another job of this name is there: medmoe 'train' '--workdir" in ended.stderr
    (gke.folder / "looks").unlink()
    (gke.folder / "owner").write_text("helm\n")
    ended = gke("run", *JOB)
    assert ended.returncode == 1 and "was not made by this launcher" in ended.stderr
    # One that has ended makes room.
    assert {line[0] for line in asked(gke)} <= {"config", "api-resources", "get", "delete"}
    (gke.folder / "looks").unlink()
    (gke.folder / "owner").write_text("medmoe-tpu-run\n")
    looks(gke, ["Failed|0"], ["Completed|0"])
    assert gke("run", "--", "train", "other").returncode == 0
    verbs = [" ".join(line[:2]) for line in asked(gke)]
    assert verbs.index("delete jobset,secret") < verbs.index("create --filename=-")


def test_what_the_cluster_refuses_leaves_nothing(gke):
    (gke.folder / "refuse").touch()
    (gke.folder / "tokens").write_text("HF_TOKEN=hunter2\n")
    ended = gke("run", "--env-file=tokens", *JOB)
    assert ended.returncode == 1
    assert "denied the request" in ended.stderr and "JobSet medmoe cannot be made" in ended.stderr
    assert asked(gke)[-1][:3] == ["delete", "jobset,secret", f"--selector={OURS}"]


def test_ctrl_c_removes_the_job(gke):
    """medmoe hears of it by SIGTERM, from Kubernetes, which waits for it."""
    (gke.folder / "wait-medmoe-slice-0-0-s0").touch()
    looks(gke, ["|0", pod(0, "Running")])
    begun = gke.begin("run", *JOB)
    until = time.monotonic() + 60
    while not (path := gke.folder / "asked").exists() or "'logs'" not in path.read_text():
        assert time.monotonic() < until and begun.poll() is None
        time.sleep(0.05)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130, said
    removed = ["delete", "jobset,secret", f"--selector={OURS}", "--cascade=foreground"]
    assert [*removed, "--timeout=120s"] in asked(gke)
    # The shell that heeds signals only waits: bash may lose one that comes while it expands.
    groups = {int(group) for group in (gke.folder / "groups").read_text().split()}
    assert len(groups) == 1 and begun.pid not in groups


def test_verbs_that_look(gke):
    (gke.folder / "log-now").touch()
    said = gke("create").stderr
    assert "v5e:4x4 takes 1 node pools of 4 machines ct5lp-hightpu-4t with the topology 4x4" in said
    assert "2 such nodes are there" in said
    assert gke("status").stdout == "medmoe: no such JobSet\n"
    (gke.folder / "jobset").touch()
    looks(gke, ["|1", pod(1, "Failed", 1, "137"), pod(0, "Pending", 1, waits="ErrImagePull ")])
    assert gke("status").stdout.splitlines() == [
        "medmoe: JobSet going on, start 2: medmoe 'train' '--workdir=gs://b/a'",
        "worker 0 (medmoe-slice-0-0-s1): Pending ErrImagePull",
        "worker 1 (medmoe-slice-0-1-s1): Failed, ended with status 137 at 2026-01-01T00:00:08Z",
    ]
    assert gke("logs", "--worker=3", "--lines=5", "--follow").returncode == 0
    assert asked(gke)[-1] == [
        "logs", "--tail=5", "--follow=true",
        "--selector=jobset.sigs.k8s.io/jobset-name=medmoe,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=3",
    ]  # fmt: skip
    for verb in ("stop", "delete"):
        assert gke(verb, "--grace=5").returncode == 0
        assert asked(gke)[-1] == [
            *("delete", "jobset,secret", f"--selector={OURS}"),
            *("--cascade=foreground", "--timeout=65s"),
        ]


def test_an_image_without_a_tag_is_built_of_the_tracked_files_once(gke):
    gke.stub(
        "docker",
        '#!/usr/bin/env bash\necho "$@" >>"$FAKE/docker"\n'
        'case $1 in manifest) [[ -e $FAKE/code ]] ;; build) cat >"$FAKE/code" ;; esac\n',
    )
    for _ in range(2):
        ended = gke("ship", "--image=r.dev/p/medmoe", "--packages=-e .[tpu,gcs]")
        assert ended.returncode == 0, ended.stderr
    inspect, build, push, again = (gke.folder / "docker").read_text().splitlines()
    tag = inspect.split()[-1]
    assert tag.startswith("r.dev/p/medmoe:") and again == inspect and push == f"push {tag}"
    assert build == (
        f"build --platform=linux/amd64 --file=launch/Dockerfile --tag={tag}"
        " --build-arg=PYTHON=3.12 --build-arg=PACKAGES=-e .[tpu,gcs] -"
    )
    members = subprocess.run(["tar", "-tzf", gke.folder / "code"], capture_output=True, text=True)
    assert {"setup.py", "launch/Dockerfile", "configs/medcare.py"} <= set(members.stdout.split())
    ended = gke("run", "--dry-run", "--image=r.dev/p/medmoe", *JOB)
    assert f"image: {tag}\n" in ended.stdout and f"# docker push {tag}\n" in ended.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--image=", *JOB], "--backend=gke needs --image=REGISTRY/NAME:TAG"),
        (["run", "--image=a b", *JOB], "--image=a b is no name of an image"),
        (["run", "--name=a-", *JOB], "--name=a-: Kubernetes wants a DNS label"),
        (["run", f"--name={'a' * 41}", *JOB], "here at most 40 of them"),
        (
            ["run", "--accelerator-type=v5e:3x3", *JOB],
            "'v5e:3x3' is not known; the closest is v5e:",
        ),
        (["run", "--accelerator-type=2xv5e-8", *JOB], "GKE joins slices of several nodes only"),
        (["run", "--hosts=3", *JOB], "--hosts=3: nodes share the 16 chips of v5e:4x4, all alike"),
        (["run", "--namespace=a: b", *JOB], "--namespace=a: b, --service-account=: lower-case"),
        (["run", "--volumes=runs", *JOB], "--volumes: 'runs' is not CLAIM:/PATH"),
        (
            ["run", "--volumes=runs:/mnt", "--", "train", "--workdir=/mnt2/a"],
            "--workdir=/mnt2/a would be lost with its pod",
        ),
        (["run", "--", "train", "--workdir=runs/a"], "--workdir=runs/a would be lost with its pod"),
        (["run", "--", "a\x01b"], "an argument of medmoe has a control character"),
    ],
)
def test_bad_input_is_one_message_and_asks_nobody(gke, words, message):
    ended = gke(*words)
    assert ended.returncode == 1 and not ended.stdout
    assert message in ended.stderr and ended.stderr.count("\n") == 1
    assert not asked(gke)


def test_no_kubectl_no_cluster_no_jobset(gke):
    (gke.folder / "resources").write_text("")
    assert "the cluster has no JobSet" in gke("run", *JOB).stderr
    gke.stub(
        "kubectl", KUBECTL.replace("api-resources/*) cat resources", "api-resources/*) exit 1")
    )
    assert "context 'gke_p_z_c' does not answer" in gke("run", *JOB).stderr
    (gke.folder / "context").unlink()
    ended = gke("run", *JOB)
    assert "kubectl has no cluster: gcloud container clusters get-credentials" in ended.stderr
    assert ended.stderr.count("\n") == 1 and not list(gke.folder.glob("made-*"))
    (gke.bin / "kubectl").unlink()
    gke.stub("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in ("bash", "dirname"):
        (gke.bin / tool).symlink_to(shutil.which(tool))
    ended = gke("run", *JOB, PATH=str(gke.bin))
    assert ended.returncode == 1 and "--backend=gke needs kubectl" in ended.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_the_real_kubectl_reads_what_the_launcher_asks(gke, tmp_path):
    """The Secret by its pipe, and the lines of pods and JobSet, without a cluster."""
    (gke.folder / "tokens").write_text("HF_TOKEN='hunter 2'\n")
    printed = gke("run", "--dry-run", "--env-file=tokens", *JOB).stdout
    (line,) = [one for one in printed.splitlines() if one.startswith("# kubectl")]
    made = line.removeprefix("# ").rpartition("|")[0]
    made = subprocess.run(made, shell=True, cwd=gke.folder, capture_output=True, check=True)
    secret = json.loads(made.stdout)
    assert secret["kind"] == "Secret" and secret["metadata"]["name"] == "medmoe-env"
    assert secret["metadata"]["labels"] == dict(pair.split("=") for pair in OURS.split(","))
    assert base64.b64decode(secret["data"]["env"]).decode() == "HF_TOKEN='hunter 2'\n"

    lines = [shlex.split(one) for one in gke("status", "--dry-run").stdout.splitlines()]
    jobset, pods = (next(w for w in one if w.startswith("--output=")) for one in lines)

    def shown(output: str, one: dict) -> str:
        (tmp_path / "one.json").write_text(json.dumps(one))
        words = ["kubectl", "label", "--local", f"--filename={tmp_path}/one.json", "a=b", output]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    labels = {"app.kubernetes.io/managed-by": "medmoe-tpu-run"}
    about = {"name": "x", "labels": labels, "annotations": {"medmoe-jax/job": "'train' 'a|b'"}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about}
    assert shown(jobset, config) == "medmoe-tpu-run|||'train' 'a|b'"
    labels |= {"jobset.sigs.k8s.io/restart-attempt": "1", "jobset.sigs.k8s.io/job-index": "0"}
    labels["batch.kubernetes.io/job-completion-index"] = "3"
    state = {"terminated": {"exitCode": 75, "finishedAt": "2026-01-01T00:00:00Z"}}
    status = {"phase": "Failed", "containerStatuses": [{"name": "medmoe", "state": state}]}
    status["conditions"] = [
        {"type": "Ready", "status": "False", "message": "no"},
        {"type": "PodScheduled", "status": "False", "message": "0/5 nodes"},
    ]
    one = {"apiVersion": "v1", "kind": "Pod", "metadata": about, "status": status}
    # The list of what `get pods` finds is not there in a local run.
    each = pods.replace("{range .items[*]}", "").replace("{end}", "")
    assert shown(each, one) == "2026-01-01T00:00:00Z|1|0|3|Failed|75|x| 0/5 nodes\n"
