"""Completion, asked of the shells themselves."""

import shutil
import subprocess

import pytest

from medmoe_jax.cli import main

# What bash puts into the variables when the key is pressed: it splits words at `=` and `:` too.
ASKED = """source {script}
ask() {{
  COMP_LINE="$*" COMP_POINT=${{#COMP_LINE}}
  local text=${{COMP_LINE//=/ = }}
  text=${{text//:/ : }}
  read -ra COMP_WORDS <<<"$text"
  [[ $COMP_LINE == *[=\\ ] ]] && COMP_WORDS+=("")
  [[ $COMP_LINE == *= ]] && unset 'COMP_WORDS[-1]'
  COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
  _medmoe && echo "${{COMPREPLY[*]}}"
}}
ask "medmoe do"
ask "medmoe train --work"
ask "medmoe train --config=ming"
ask "medmoe eval --workdir=w --tasks=pubm"
ask "medmoe export --format="
ask "medmoe completion "
ask "medmoe eval --tasks=suite:medc"
ask "medmoe eval --tasks=suite:"
ask "medmoe --coordinator=host:8476 --processes=2 tra"
ask "medmoe --proc"
complete -p medmoe
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Gives the file of a shell's script."""

    def make(shell):
        path = tmp_path_factory.mktemp(shell) / "medmoe"
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr("medmoe_jax.cli.completion.say", said.append)
            assert main.main(["completion", shell]) == 0
        path.write_text(said[0] + "\n")
        return path

    return make


def shell_says(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_bash(script):
    lines = shell_says("bash", "--norc", "-c", ASKED.format(script=script("bash")))
    first, option, recipe, task, formats, shells, suite, every, behind, before, declared = lines
    assert first == "doctor" and option == "--workdir=" and recipe == "ming_moe"
    assert task == "pubmedqa" and {"peft", "gguf"} <= set(formats.split())
    assert {"bash", "zsh", "fish", "--help"} <= set(shells.split())
    assert suite == "medcare-exams" and {"cblue", "apollo12"} <= set(every.split())
    assert behind == "train" and before.split() == ["--processes=", "--process="]
    assert declared.endswith("-F _medmoe medmoe")


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh(script):
    """As bashcompinit calls it: arrays count from 0, and words are split at spaces alone."""
    asked = f"""autoload -U compinit; compinit -u -D; source {script("zsh")}
    ask() {{
      emulate -L ksh
      COMP_LINE="$*" COMP_POINT=${{#1}}
      COMP_WORDS=(${{(s: :)1}})
      COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
      _medmoe && echo "${{COMPREPLY[@]}}"
    }}
    ask "medmoe do"; ask "medmoe train --config=ming"; ask "medmoe eval --tasks=pubm"
    echo $_comps[medmoe]"""
    first, recipe, task, declared = shell_says("zsh", "-f", "-c", asked)
    assert first == "doctor" and recipe == "--config=ming_moe" and task == "--tasks=pubmedqa"
    assert "_medmoe" in declared


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish(script):
    asked = [f"source {script('fish')}"]
    for line in ("do", "train --work", "train --config=ming", "eval --tasks=pubm", "completion z"):
        asked.append(f"complete -C 'medmoe {line}' | string split -f 1 \\t | string join ' '")
    lines = shell_says("fish", "--no-config", "-c", "\n".join(asked))
    wanted = ["doctor", "--workdir", "--config=ming_moe", "--tasks=pubmedqa", "zsh"]
    assert [line.split()[0] for line in lines] == wanted, lines
