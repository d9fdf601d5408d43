"""The scripts as text: they parse, shellcheck finds nothing, help and README name every flag."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))


def test_scripts_parse_and_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 9
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_readme_lists_every_flag_as_help_does():
    shown = subprocess.run(
        [LAUNCH / "tpu_run.sh", "--help"], capture_output=True, text=True, check=True, env={}
    ).stdout
    flags = re.findall(r"^  (--[a-z-]+) +(TPU_RUN_[A-Z_]+) ", shown, re.MULTILINE)
    readme = (LAUNCH / "README.md").read_text()
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(TPU_RUN_[A-Z_]+)` \|", readme, re.MULTILINE)
    assert len(flags) > 20 and rows == flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "unknown verb 'fly'"),
        # Words, not patterns.
        (["ru."], "unknown verb 'ru.'"),
        ([".*"], "unknown verb '.*'"),
        (["create "], "unknown verb 'create '"),
        (["create", "--spot|no=yes"], "unknown flag --spot|no"),
        (["create", "--dir=../../etc"], "--dir=../../etc: a folder below the home folder"),
        (["create", "--dir=."], "--dir=.: a folder below the home folder"),
        (["create", "--dir=/tmp/x"], "--dir=/tmp/x: a folder below the home folder"),
        (["create", "--dir=a/../b"], "--dir=a/../b: a folder below the home folder"),
        (["create", "--dir=.ssh"], "--dir=.ssh: a folder below the home folder"),
        (["create", "--dir=a/"], "--dir=a/: a folder below the home folder"),
        (["run", "stop"], "'stop' after the verb 'run': arguments of medmoe come after --"),
        (["run", "--zone=z"], "run needs the arguments of medmoe"),
        (["create", "--zoen=z"], "unknown flag --zoen"),
        (["create", "--zone"], "--zone needs a value"),
        (["create", "--zone="], "needs --zone=ZONE"),
        (["create", "--spot=maybe"], "--spot=maybe: yes or no is needed"),
        (["create", "--backend=gpu"], "--backend=gpu: tpu, gke, ssh or local"),
        (
            ["create", "--zone=z", "--accelerator-type=v9x-8"],
            "--runtime-version=VERSION and --hosts",
        ),
        (
            ["create", "--zone=z", "--accelerator-type=v5e:4x5"],
            "--accelerator-type: slice 'v5e:4x5' is not known; the closest is v5e:4x4",
        ),
        (
            ["create", "--zone=z", "--accelerator-type=2xv5e:4x4"],
            "--backend=tpu makes one slice",
        ),
        (
            ["create", "--zone=z", "--accelerator-type=tpu7x-16"],
            "is rented through Kubernetes: --backend=gke",
        ),
        (
            ["stop", "--backend=local", "--hosts=a,b"],
            "--backend=local needs the number of processes",
        ),
        (["stop", "--backend=ssh"], "--backend=ssh needs --hosts=HOST,HOST,..."),
        (["stop", "--backend=ssh", "--hosts=a,-oProxy"], "'-oProxy' is no name of a host"),
        (["stop", "--backend=local", "--grace=soon"], "--grace=soon: a whole number"),
        (["logs", "--backend=local", "--worker=2"], "--worker=2: all, or a number from 0 to 1"),
        (["create", "--zone=z", "--name=My TPU"], "--name=My TPU: lower-case letters"),
        (["stop", "--backend=ssh", "--hosts=a", "--dir=~/x"], "--dir=~/x: a folder below the home"),
        (["ship", "--zone=z", "--env-file=missing"], "--env-file=missing cannot be read"),
        (["ship", "--zone=z", "--env-file=."], "--env-file=. cannot be read"),
        (
            ["run", "--zone=z", "--", "train", "--workdir", "runs/a"],
            "--workdir=runs/a: --backend=tpu needs an absolute path",
        ),
        (
            ["run", "--backend=local", "--", "train", "--workdir=s3://bucket/a"],
            "--workdir=s3://bucket/a: several workers write to a disk that all share, or to gs://",
        ),
        (
            ["run", "--backend=local", "--", "train", "--workdir=/a", "--workdir=az://box/a"],
            "--workdir=az://box/a: several workers",
        ),
        (
            ["run", "--backend=local", "--hosts=1", "--", "train", "--workdir=http://bucket/a"],
            "--workdir=http://bucket/a: several workers",
        ),
        (
            ["run", "--backend=ssh", "--hosts=a,b", "--", "train", "--workdir=s3://bucket/a"],
            "--workdir=s3://bucket/a: several workers",
        ),
        (
            ["run", "--backend=ssh", "--hosts=a", "--", "train", "--workdir=~/a"],
            "--workdir=~/a: --backend=ssh needs an absolute path",
        ),
    ],
)
def test_bad_input_is_one_message(launcher, words, message):
    ended = launcher()(*words)
    assert ended.returncode == 1
    assert message in ended.stderr and ended.stderr.count("\n") == 1
    assert not ended.stdout


@pytest.mark.parametrize(
    "line",
    [
        "URL=https://h/?a=1&b=2", "TOKEN=pa$HOME", 'TOKEN="pa$HOME"', "TOKEN=ab touch PWNED",
        "A=`id`", "A='it''s'", "9A=1", "A-B=1", "A", "A=1; touch PWNED", "A=~x",
        "A=$(touch PWNED)",
    ],
)  # fmt: skip
def test_variables_that_a_shell_would_read_otherwise(launcher, line):
    """Refused by the number of the line, which is a secret itself."""
    tool = launcher()
    (tool.folder / "tokens").write_bytes(f"# mine\n\nHF_TOKEN=hf_x\n{line}".encode())
    ended = tool("ship", "--zone=z", "--env-file=tokens")
    assert ended.returncode == 1 and "tokens, line 4: write VAR=value" in ended.stderr
    assert line.strip() not in ended.stderr.replace("VAR=value", "") or line == "A"
    assert not (tool.folder / "PWNED").exists()


def test_variables_as_a_shell_and_people_write_them(launcher):
    tool = launcher()
    lines = ["# mine", "", "  # and", "A=1", " B=a#b  ", "export C='x & y' # why", 'D="p q"', "E="]
    (tool.folder / "tokens").write_text("\n".join(lines))
    ended = tool("ship", "--zone=z", "--env-file=tokens", "--dry-run")
    assert "--env-file" not in ended.stderr
    (tool.folder / "tokens").write_bytes(b"A=1\r\n")
    ended = tool("ship", "--zone=z", "--env-file=tokens")
    assert "tokens, line 1: ends with a carriage return; convert the file" in ended.stderr


def test_an_old_bash_is_told_so(tmp_path):
    """One that does not know what the rest of the script says, such as 3.2 of macOS."""
    script = (LAUNCH / "tpu_run.sh").read_text().replace("BASH_VERSINFO", "VERSION")
    (tmp_path / "old").write_text("VERSION=(3 2)\nshopt() { echo invalid >&2; return 1; }\n")
    env = {**os.environ, "BASH_ENV": str(tmp_path / "old")}
    words = ["bash", "-c", script, "tpu_run.sh"]
    ended = subprocess.run(words, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "is too old: 5.1 or later is needed" in ended.stderr


def test_a_verb_is_needed(launcher):
    ended = launcher()()
    assert ended.returncode == 1 and "usage: launch/tpu_run.sh VERB" in ended.stderr
