"""Every command through `main([...])`, in this process."""

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import medmoe_jax
from medmoe_jax.adapters.lifecycle import active_banks
from medmoe_jax.checkpoints import stages
from medmoe_jax.cli.main import COMMANDS, main
from medmoe_jax.cli.session import read_rows
from medmoe_jax.evaluation import ways
from medmoe_jax.evaluation.tasks import list_tasks
from medmoe_jax.inference.decoding import DecodingRows
from medmoe_jax.screen import harmless
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny


def write_rows(path, rows):
    return str(tiny.write_rows(path, rows))


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def fails(capsys, *arguments):
    """Exit status 1 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"medmoe {arguments[0]}: error: "), error
    assert "Traceback" not in error
    return lines[0]


def test_a_process_that_does_not_fit_is_named_by_its_flag(capsys):
    assert main(["--processes=2", "train", "--workdir=w"]) == 1
    said = "medmoe train: error: --processes: 2 need a coordinator"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    "command",
    ["", *COMMANDS, "data build", "data inspect", "data languages", "tokenizer train"],
)
def test_help(command, capsys, monkeypatch):
    """Its sentences keep to the terminal; examples are whole lines, to be copied."""
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: medmoe" in text
    assert not [line for line in text.splitlines() if line[:1].isalpha() and len(line) > 70]
    if command == "eval":
        assert "\n  medmoe eval --list\n  medmoe eval --config=FILE" in text
    if not command:
        assert all(name in text for name in COMMANDS)


@pytest.mark.slow
def test_a_notice_while_a_stage_is_evaluated(tmp_path, config, monkeypatch, capsys):
    """The training is saved by then: the next start only evaluates."""
    row = {"answer": "yes", "choices": ["yes", "no"]}
    rows = [{"prompt": f"{n} mg: yes or no?", **row} for n in range(9)]
    items = write_rows(tmp_path / "items.jsonl", rows)
    command = ["train", config, f"--workdir={tmp_path / 'w'}", f"--config.run.tasks=('{items}',)"]
    command += ["--config.stages.order=('aggregate',)", "--config.stages.aggregate.steps=2"]
    command += ["--config.run.score_batch=1"]  # eight at a time
    asked, real = [], ways.ask

    def ask(*arguments, **options):
        asked.append(0)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(ways, "ask", ask)
    assert main(command) == 75
    said = capsys.readouterr().err
    assert "evaluation was asked to stop, in task 'items'; the same command continues" in said
    end = tmp_path / "w" / "stages" / "aggregate"
    assert len(asked) == 1 and not (end / "manifest.json").exists()
    assert main(command) == 0
    assert "continues after step 2 of 2" in capsys.readouterr().err
    assert json.loads((end / "report.json").read_text())["results"][0]["n"] == 9


def test_usage_errors(capsys):
    for arguments in (["fly"], ["train"], ["data"], ["score", "--input=x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        main(["--version"])
    assert medmoe_jax.__version__ in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_runs_as_a_program(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("x = 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "medmoe_jax.cli.main", "train", f"--config={file}", "--workdir=w"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"medmoe train: error: {file}: ")
    assert "get_config" in done.stderr and done.stderr.count("\n") == 1


def test_train_continues_where_it_is(config, workdir, capsys):
    assert main(["train", config, f"--workdir={workdir}", "--config.run.log_every=3"]) == 0
    assert "stage 'align' is finished: skipped" in capsys.readouterr().err


def test_train_refuses(config, workdir, tmp_path, capsys):
    new = f"--workdir={tmp_path / 'w'}"
    assert "--config is missing: a file, or one of apollo_moe" in fails(capsys, "train", new)
    line = fails(capsys, "train", config, f"--workdir={workdir}", "--config.data.seed=4")
    assert "data.seed: 0 then, 4 now" in line
    line = fails(capsys, "train", config, new, "--config.stages.align.after=ghost")
    assert "stages.align.after: 'ghost'" in line
    line = fails(capsys, "train", config, new, "--config.run.tasks=('no_such_set',)")
    assert "no_such_set" in line
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    line = fails(capsys, "train", config, new, f"--config.data.sources.knowledge.path={bad}")
    assert f"{bad}, line 2: not valid JSON" in line
    line = fails(capsys, "train", config, new, "--config.base.decoder.x=1")
    assert "--config.base.decoder.x: the configuration has no such field" in line
    assert not (tmp_path / "w").exists()


def test_score_is_the_log_probability(config, workdir, tmp_path, capsys):
    """Against a float64 forward pass with the three banks unmerged on the base as it was."""
    rows = [
        {"prompt": "What is codeine for?", "completion": "It is for cough.", "id": 7},
        {"prompt": "digoxin: yes or no, fever?", "completion": "yes"},
        {"prompt": "é 患", "completion": ""},
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "deep" / "out.jsonl"
    arguments = [config, f"--workdir={workdir}", f"--input={source}", f"--output={out}"]
    assert main(["score", *arguments]) == 0
    assert "3 rows scored" in capsys.readouterr().out
    setup, _ = tiny.trained()
    model = open_trained(Run(setup, workdir), "align")
    stage_one = open_trained(Run(setup, workdir), "aggregate")
    attention = stage_one.roster["attention"][0]
    specs = (attention, *active_banks(model.roster))
    original, t = setup.load_base(), setup.tokenizer
    for row, scored in zip(rows, read(out), strict=True):
        prompt = [t.bos_id, *t.encode("User:"), *t.encode(row["prompt"]), *t.encode("\n")]
        prompt += t.encode("Assistant:")
        ids = [*prompt, *t.encode(row["completion"]), t.eos_id]
        batch, _ = naive.pack([ids], [[0]], len(ids))
        linear = naive.adapted(specs, model.banks)
        z = naive.logits(setup.base.config, original, batch, linear)[0]
        top = z.max(-1, keepdims=True)
        z = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
        want = sum(z[i - 1, ids[i]] for i in range(len(prompt), len(ids)))
        assert scored["logprob"] == pytest.approx(want, rel=1e-5, abs=1e-4)
        assert scored["tokens"] == len(ids) - len(prompt)
        assert {k: scored[k] for k in row} == row


def test_stages_and_banks_can_be_chosen(config, workdir, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "aspirin?", "completion": "pain"}])

    def score(*more):
        out = tmp_path / "out.jsonl"
        arguments = [config, f"--workdir={workdir}", f"--input={source}", f"--output={out}"]
        assert main(["score", *arguments, *more]) == 0
        return read(out)[0]["logprob"]

    scores = [
        score(),
        score("--off", "alignment"),
        score("--stage=aggregate"),
        score("--stage=aggregate", "--off=noise", "--off=knowledge", "--off=attention"),
    ]
    assert len(set(scores)) == 4
    # The noise bank is dropped before the alignment bank is added.
    without = score("--stage=aggregate", "--off", "noise")
    assert without == pytest.approx(scores[1], rel=1e-5)
    assert score("--stage=align") == scores[0]
    assert score("--stage=base") == pytest.approx(scores[3], rel=1e-6)


@pytest.mark.parametrize(
    "words, prompt, about",
    [
        (["--config.base.path=my exports/hf"], None, ["--config.base.path=my exports/hf"]),
        (["--config.run.profile=(10, 3)", "Why?"], "Why?", ["--config.run.profile=(10, 3)"]),
        (["--config.base.path=-- a -b", "Why?"], "Why?", ["--config.base.path=-- a -b"]),
        (["--config", "my recipe.py:a b", "Why?"], "Why?", ["--config=my recipe.py:a b"]),
        (["--config", "--off=noise", "Why?"], "Why?", ["--config"]),
        (["Why?", "--config=medcare"], "Why?", ["--config=medcare"]),
        (["--config=medcare", "--", "--config.x is set?"], "--config.x is set?", None),
        (["--config=medcare", "--", "--config"], "--config", None),
        (["--config=medcare", "--", "--off="], "--off=", None),
        (["--config=medcare", "--", "--output="], "--output=", None),
        (["--config=medcare", "--", "--why=a b"], "--why=a b", None),
        (["--config=medcare", "-- why = a b?"], "-- why = a b?", None),
    ],
)
def test_what_is_about_the_configuration_is_no_prompt(monkeypatch, words, prompt, about):
    """Nor is a prompt behind `--` about the configuration, or an option."""
    seen = []
    monkeypatch.setattr("medmoe_jax.cli.generate.run", lambda *given: seen.append(given))
    assert main(["generate", "--max-tokens=8", "--stop=--a=b c", *words]) == 0
    ((arguments, rest),) = seen
    assert (arguments.prompt, rest) == (prompt, about or ["--config=medcare"])


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--confg.run.profile=(10, 3)"],
        ["generate", "--promt=Why is that?"],
        ["plot", "runs/a", "--outputs=my plots"],
        ["completion", "bash", "--for=my shell"],
    ],
)
def test_an_unknown_option_with_a_space_is_no_prompt(words, capsys):
    assert f"error: unknown argument '{words[-1]}'; see --help" in fails(capsys, *words)


def test_what_follows_run_belongs_to_lm_eval(monkeypatch):
    """Which has a `--config` of its own; before it, a space is no end of our options."""
    seen = []
    monkeypatch.setattr("medmoe_jax.cli.lm_eval.run", lambda *given: seen.append(given))
    own = ["--config=medcare", "--config.base.path=a b"]
    asked = ["run", "--config", "own.yaml", "--gen_kwargs=a b", "--tasks="]
    assert main(["lm-eval", *own, "--stage=base", *asked]) == 0
    ((arguments, rest),) = seen
    assert (arguments.asked, arguments.stage, rest) == (asked, "base", own)


def test_run_is_a_word_like_any_other_elsewhere(monkeypatch):
    seen = []
    monkeypatch.setattr("medmoe_jax.cli.train.run", lambda *given: seen.append(given))
    assert main(["train", "--workdir", "run", "--config", "medcare"]) == 0
    assert [(given.workdir, rest) for given, rest in seen] == [("run", ["--config=medcare"])]


def test_answers_are_kept_until_all_are_there(config, workdir, tmp_path, monkeypatch, capsys):
    """Stopped, even within a line, the same command asks the rest, which draws as in the whole."""
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": f"{n} or {n}?"} for n in range(20)])
    model = [config, f"--workdir={workdir}", f"--input={source}", "--config.run.score_batch=2"]
    command = ["generate", *model, "--max-tokens=12", "--temperature=1", "--seed=4"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main([*command, f"--output={whole}"]) == 0
    step, submit, ended, asked = DecodingRows.step, DecodingRows.submit, [], []

    def interrupted(rows):
        if len(ended) > 2:
            raise KeyboardInterrupt
        said = step(rows)
        ended.extend(one.request for one in said if one.ended)
        return said

    with monkeypatch.context() as patch:
        patch.setattr(DecodingRows, "step", interrupted)
        assert main([*command, f"--output={out}"]) == 130
    left = tmp_path / "out.jsonl.unfinished"
    assert f"{len(ended)} of 20 answers are kept in {left}" in capsys.readouterr().err
    assert 2 < len(ended) < 20 and not out.exists()
    with left.open("a") as file:
        file.write('{"step": 5, "ans')  # as a process leaves it that is killed
    kept = left.read_bytes()
    error = fails(capsys, *command, "--temperature=2", f"--output={out}")
    assert f"{left}: holds {len(ended)} answers of a command that was stopped" in error
    assert "with other temperature; " in error and left.read_bytes() == kept
    monkeypatch.setattr(DecodingRows, "submit", lambda rows, r: asked.append(r) or submit(rows, r))
    assert main([*command, f"--output={out}"]) == 0
    assert f"{len(ended)} of 20 answers are there, from {left}" in capsys.readouterr().err
    assert len(asked) == 20 - len(ended)
    assert out.read_text() == whole.read_text() and not left.exists()


@pytest.mark.slow
def test_generate(config, workdir, tmp_path, capsys):
    model = [config, f"--workdir={workdir}", "--max-tokens=8"]
    prompts = [row["prompt"] for row in tiny.alignment_rows()[:3]]
    assert main(["generate", *model, prompts[0]]) == 0
    printed = capsys.readouterr().out
    shown = re.sub(r"\\x\w\w", "\0\0\0\0", printed)  # a control is written out, and no stop
    stop = next(c for c in shown[1:] if c not in "\0 \n")
    assert main(["generate", *model, f"--stop={stop}", "--stop=zzz", prompts[0]]) == 0
    assert capsys.readouterr().out == printed[: shown.index(stop)] + "\n"
    sharp = ["--temperature=3", "--top-k=1", "--min-p=0.1", "--repetition-penalty=1"]
    assert main(["generate", *model, *sharp, prompts[0]]) == 0
    assert capsys.readouterr().out == printed
    source = write_rows(
        tmp_path / "p.jsonl", [{"prompt": p, "n": i} for i, p in enumerate(prompts)]
    )
    out = tmp_path / "a.jsonl"
    assert main(["generate", *model, f"--input={source}", f"--output={out}"]) == 0
    rows = read(out)
    assert [row["prompt"] for row in rows] == prompts and [row["n"] for row in rows] == [0, 1, 2]
    assert printed == harmless(rows[0]["response"]) + "\n"
    for arguments, words in (
        ([], "give either a prompt or --input=FILE"),
        (["x", f"--input={source}"], "give either a prompt or --input=FILE"),
        ([f"--input={source}"], "--input and --output go together"),
        (["x", "--temperature=-1"], "--temperature: -1.0 is below 0"),
        (["x", "--temperature=nan"], "--temperature: nan is not a finite number"),
        (["x", "--temperature=inf"], "--temperature: inf is not a finite number"),
        (["x", "--top-p=nan"], "--top-p: nan is not a finite number"),
        (["x", "--top-p=-0.1"], "--top-p: -0.1 is below 0"),
        (["x", "--top-k=-1"], "--top-k: -1 is below 0"),
        (["x", "--min-p=2"], "--min-p: 2.0 is above 1"),
        (["x", "--repetition-penalty=0"], "--repetition-penalty: 0.0 is not above 0"),
        (["x", "--stop="], "stops: every one needs at least one character"),
        (["x", f"--seed={2**63}"], "--seed: 9223372036854775808 is above"),
        (["x", "--max-tokens=0"], "--max-tokens: 0 is below 1"),
        (["x", "--max-tokens=-1"], "--max-tokens: -1 is below 1"),
        (
            ["x", "--max-tokens=500"],
            "--max-tokens: 500 leave no room for a question in a context of 128",
        ),
        (["x", "--zzz"], "unknown argument '--zzz'"),
    ):
        assert words in fails(capsys, "generate", config, f"--workdir={workdir}", *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["eval", "--tasks=x", "--output=o", "--limit=0"], "--limit: 0 is below 1"),
        (["eval", "--tasks=cmb", "--output=o", "--temperature=nan"], "--temperature: nan is not a"),
        (["eval", "--tasks=cmb", "--output=o", "--samples=0"], "--samples: 0 is below 1"),
        (["analyze", "routing", "--data=d", "--out=o", "--limit=-1"], "--limit: -1 is below 1"),
        (["plan", "--topology=v5e:2x2", "--search=-1"], "--search: -1 is below 0"),
        (["train", "--workdir=w", "--config.stages.align.b1=1.0"], "stages.align.b1: 1.0 is not"),
        (["train", "--workdir=w", "--config.stages.align.clip=nan"], "stages.align.clip: nan is n"),
        (["train", "--workdir=w", "--config.run.profile=(3,)"], "run.profile: (3,) is neither"),
    ],
)
def test_numbers_that_make_no_sense(config, capsys, arguments, words):
    command, *rest = arguments
    assert f"error: {words}" in fails(capsys, command, config, *rest)


def test_eval(config, workdir, tmp_path, capsys):
    rows = [
        {"prompt": r["prompt"], "answer": r["response"], "choices": ["yes", "no"]}
        for r in tiny.alignment_rows()
    ]
    task = write_rows(tmp_path / "formats.jsonl", rows)
    out = tmp_path / "new" / "folder"
    arguments = ["eval", config, f"--workdir={workdir}", f"--tasks={task}", f"--output={out}"]
    assert main(arguments) == 0
    (result,) = json.loads((out / "report.json").read_text())["results"]
    records = read(out / "records.jsonl")
    assert result["n"] == len(records) == 16
    right = [r["prediction"] == r["answer"] for r in records]
    assert result["score"] == pytest.approx(np.mean(right))
    assert result["majority"] == result["chance"] == 0.5
    about = json.loads((out / "report.json").read_text())["about"]
    assert about["stage"] == "align" and about["template"] and about["versions"]["jax"]
    manifest = json.loads(Path(workdir, "stages/align/manifest.json").read_text())
    assert about["fingerprint"] == manifest["content"]
    page = (out / "report.html").read_text()
    assert "Right answers" in page and "Confusion: formats" in page
    capsys.readouterr()
    assert main(["eval", "--list"]) == 0
    assert capsys.readouterr().out.split() == [task.name for task in list_tasks()]
    model = [config, f"--workdir={workdir}"]
    assert "--tasks is empty" in fails(capsys, "eval", *model)
    assert "no_such" in fails(capsys, "eval", *model, "--tasks=no_such", f"--output={tmp_path}/x")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    assert f"{bad}:2" in fails(capsys, "eval", *model, f"--tasks={bad}", f"--output={tmp_path}/x")
    assert not (tmp_path / "x" / "report.json").exists()
    assert "unknown argument '--wat'" in fails(capsys, "eval", "--list", "--wat")
    line = fails(capsys, "eval", *model, "--tasks=suite:cblu", f"--output={tmp_path}/x")
    assert "did you mean 'cblue'" in line
    assert "'appolo'" in fails(capsys, "eval", *model, f"--tasks={task}", "--compat=appolo")
    assert main(["eval", "--list-suites"]) == 0
    assert "suite:medcare-exams: " in capsys.readouterr().out


def test_tasks_that_cannot_be_had_are_told_by_reason(config, tmp_path, capsys, monkeypatch):
    """With their names, once, and how to get sets; a file of one's own is scored all the same."""
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path / "none"))
    task = write_rows(tmp_path / "mine.jsonl", [{"prompt": "a", "answer": "b", "choices": ["b"]}])
    out = f"--output={tmp_path / 'out'}"
    sets = ["medqa", "pubmedqa@test", "cmb"]
    reason = f"{', '.join(sets)}: {tmp_path / 'none'} is no folder: $MEDMOE_DATA must name"
    asked = ["eval", config, "--stage=base", f"--tasks={','.join([task, *sets])}", out]
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert said.count("is no folder") == 2  # before the others, and at the end
    assert f"left out: {reason}" in said and "`medmoe eval --list` prints" in said
    notes = f"{', '.join(sets)}: not done: {tmp_path / 'none'} is no folder"
    assert notes in said
    assert main([*asked[:3], f"--tasks={','.join(sets)}", out]) == 1
    said = capsys.readouterr().err
    assert (
        said.count("is no folder") == 1
        and f"error: none of the tasks can be had\n  {reason}" in said
    )


def test_eval_in_several_ways_and_compared(config, workdir, tmp_path, capsys, monkeypatch):
    """A stage against the base on the same items; a task that is not there does not stop it."""
    rows = [
        {"prompt": r["prompt"], "answer": r["response"], "choices": ["yes", "no"]}
        for r in tiny.alignment_rows()
    ]
    task = write_rows(tmp_path / "formats.jsonl", rows)
    monkeypatch.setenv("MEDMOE_DATA", str(tmp_path))
    asked = ["eval", config, f"--workdir={workdir}", f"--tasks={task},medqa", "--limit=8"]
    for name, more in {
        "base": ["--stage=base"],
        "last": [],
        "constrained": ["--answer=constrained"],
        "turns": ["--shots=1", "--shots-as=turns"],
        "free": ["--free", "--samples=2", "--temperature=0.5", "--max-tokens=8", "--shots=1"],
    }.items():
        assert main([*asked, f"--output={tmp_path / name}", *more]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert [f["task"] for f in report["failures"]] == ["medqa"]
        assert report["results"][0]["n"] == 8
        assert report["about"].get("shots_as") == {"turns": "turns", "free": "prompt"}.get(name)
    assert report["settings"]["samples"] == 2 and report["results"][0]["shots"] == 1
    assert all(len(r["raw"]) == 2 for r in read(tmp_path / "free" / "records.jsonl"))
    runs = [str(tmp_path / name) for name in ("base", "last")]
    assert main(["compare", *runs, f"--output={tmp_path / 'both'}"]) == 0
    compared = json.loads((tmp_path / "both" / "compared.json").read_text())
    (found,) = compared["runs"][runs[1]]
    right = [[r["right"] for r in read(f"{run}/records.jsonl")] for run in runs]
    assert found["difference"] == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    assert "Side by side" in (tmp_path / "both" / "compared.html").read_text()
    records = {run: (Path(run) / "records.jsonl").read_text() for run in runs}
    for run, first in zip(runs, ("1", "2"), strict=True):
        own = json.dumps(json.loads(records[run].splitlines()[0]) | {"task": "apart", "id": first})
        (Path(run) / "records.jsonl").write_text(records[run] + own + "\n")
    capsys.readouterr()
    assert main(["compare", *runs]) == 0
    assert "no item in common, and not compared: apart" in capsys.readouterr().err
    assert "at least two runs" in fails(capsys, "compare", runs[0])
    assert "is not a folder" in fails(capsys, "compare", "a", "b", f"--output={task}")
    assert "no such file" in fails(capsys, "compare", runs[0], str(tmp_path / "none"))


def test_overlap(tmp_path, capsys):
    train = write_rows(
        tmp_path / "train.jsonl", [{"prompt": "what is flu?", "response": "a virus"}] * 2
    )
    items = [{"prompt": "What is flu", "answer": "x"}, {"prompt": "What is gout", "answer": "y"}]
    tasks = write_rows(tmp_path / "items.jsonl", items)
    out = f"--output={tmp_path / 'o'}"
    assert main(["overlap", f"--train={train}", f"--tasks={tasks}", out]) == 0
    (found,) = read(tmp_path / "o" / "overlap.jsonl")
    assert found["item"] == 0 and found["row"].endswith("train.jsonl, line 1")
    assert found["row_text"] == "what is flu? a virus"
    assert [place.rpartition(", ")[2] for place in found["also"]] == ["line 2"]
    assert "give --tasks to look for" in fails(capsys, "overlap", f"--tasks={tasks}", out)
    searched = ["overlap", f"--train={tmp_path / 'none'}", f"--tasks={tasks}"]
    assert "is not a folder" in fails(capsys, *searched, f"--output={train}")
    rows = write_rows(tmp_path / "rows.jsonl", [{"ask": "What is flu?", "response": "x", "id": 7}])
    command = ["overlap", f"--train={rows}", f"--tasks={tasks}", out]
    for given, told in (
        ([], "say what it is with --column=KEY=NAME, or add it to --ignore"),
        (["--ignore=id"], "say what it is with --column=KEY=NAME"),
        (["--ignore=id", "--column=prompt=asked"], "no column 'asked' (--column=prompt)"),
    ):
        assert told in fails(capsys, *command, *given)
    assert main([*command, "--ignore=id", "--column=prompt=ask"]) == 0
    (found,) = read(tmp_path / "o" / "overlap.jsonl")
    assert found["row_text"] == "What is flu? x"


def test_data_and_tokenizer(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", tiny.knowledge_rows())
    assert main(["data", "build", "--input", source, "--output", str(tmp_path / "d")]) == 0
    assert "built" in capsys.readouterr().out
    model = tmp_path / "t.model"
    train = ["tokenizer", "train", f"--output={model}", "--vocab-size=300"]
    assert main([*train, "--input", str(tmp_path / "d")]) == 0
    assert "300 pieces" in capsys.readouterr().out
    look = ["data", "inspect", f"--dataset={tmp_path / 'd'}", f"--tokenizer={model}"]
    assert main([*look, "--length=200"]) == 0
    assert "aspirin" in capsys.readouterr().out
    assert "row 99" in fails(capsys, *look, "--row=99")
    assert "unknown argument '--x'" in fails(capsys, *look, "--x")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": 3, "response": "b"}\n')
    for command in (
        ["data", "build", "--input", str(bad), f"--output={tmp_path / 'e'}"],
        ["tokenizer", "train", "--input", str(bad), f"--output={tmp_path / 'u.model'}",
         "--vocab-size=300"],
    ):  # fmt: skip
        assert f"{bad}, line 3: 'prompt' must be text" in fails(capsys, *command)
    assert not list((tmp_path / "e").rglob("*.array_record*"))
    assert not list(tmp_path.glob("*u.model*"))


def test_bad_rows_name_file_and_line(config, workdir, tmp_path, capsys):
    bad = tmp_path / "rows.jsonl"
    out = tmp_path / "out.jsonl"
    model = ["score", config, f"--workdir={workdir}", f"--input={bad}", f"--output={out}"]
    good = '{"prompt": "a", "completion": "b"}\n'
    for text, words in (
        (good + '{"prompt": "a"}\n', f'{bad}:2: the row needs a text field "completion"'),
        (good + "\n{not json\n", f"{bad}:3: not JSON"),
        (good + '{"prompt": 1, "completion": "b"}\n', f'{bad}:2: the row needs a text field "pro'),
        ("[1, 2]\n", f"{bad}:1: the row needs a text field"),
        (good + '{"prompt": "a", "completion": "b", "by": [NaN]}\n', f"{bad}:2: by[0] is nan"),
        (good + '{"prompt": "a", "completion": "b", "x": 1e400}\n', f"{bad}:2: x is inf"),
        ("\n", f"{bad}: no row in the file"),
    ):
        bad.write_text(text)
        assert words in fails(capsys, *model)
    separated = {"prompt": "a\u2028b", "completion": "c\x85"}
    bad.write_text(json.dumps(separated, ensure_ascii=False) + "\n")
    assert read_rows(str(bad), ("prompt",)) == ([separated], [f"{bad}:1"])
    bad.write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    assert "UTF-8" in fails(capsys, *model)
    assert not out.exists()


def test_bad_models(config, workdir, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    out = tmp_path / "out.jsonl"
    score = ["score", config, f"--input={source}", f"--output={out}"]
    there = f"--workdir={workdir}"
    assert "--stage: there is no work directory; name one, or ask for the bare base" in fails(
        capsys, *score
    )
    line = fails(capsys, *score, f"--workdir={tmp_path / 'none'}")
    assert "no stage is finished" in line and "medmoe train" in line
    line = fails(capsys, *score, f"--workdir={tmp_path / 'none'}", "--stage=align")
    assert "stage 'aggregate' is not finished" in line
    line = fails(capsys, *score, there, "--stage=algin")
    assert "--stage: 'algin' is none of base, aggregate, align" in line
    line = fails(capsys, *score, there, "--off", "nois")
    assert "there is no bank 'nois'; known: attention" in line
    line = fails(capsys, *score, there, "--config.base.tokenizer=nowhere.model")
    assert "nowhere.model: no such tokenizer file" in line
    broken = tmp_path / "base"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    line = fails(capsys, *score, "--stage=base", f"--config.base.path={broken}")
    assert "config.json" in line and "JSON" in line
    assert not out.exists()


def test_a_vocabulary_too_large_for_the_base(config, tmp_path, capsys):
    words = [f"{a}{b}" for a in ("al", "be", "ga", "de", "ep") for b in tiny.DRUGS]
    rows = [{"prompt": word, "response": word * 2} for word in words]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    model = tmp_path / "large.model"
    train = ["tokenizer", "train", f"--output={model}", "--vocab-size=320", "--input", source]
    assert main(train) == 0
    line = fails(capsys, "train", config, f"--workdir={tmp_path / 'w'}",
                 f"--config.base.tokenizer={model}")  # fmt: skip
    assert "320 ids but the model's vocabulary has 304" in line
    assert not (tmp_path / "w").exists()


def test_control_c(config, workdir, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medmoe_jax.cli.train.train_run", stop)
    assert main(["train", config, f"--workdir={workdir}"]) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_control_c_where_no_exception_leaves(config, workdir, capsys, monkeypatch):
    """As in a callback of JAX's, while the collector works."""

    class Pressed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def lose(*_, **__):
        Pressed()
        threading.Event().wait(60)

    monkeypatch.setattr("medmoe_jax.cli.train.train_run", lose)
    assert main(["train", config, f"--workdir={workdir}"]) == 130
    assert capsys.readouterr().err.endswith("the same command continues\n")


@pytest.mark.parametrize(
    "error, status",
    [
        (OSError(errno.EIO, "Input/output error"), 74),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "rows.jsonl"), 1),
        (stages.WriteError("the checkpoint of step 4 could not be written"), 74),
        (stages.CheckpointError("none of the checkpoints can be read"), 1),
    ],
)
def test_lost_storage_is_not_bad_input(config, workdir, capsys, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("medmoe_jax.cli.train.train_run", fail)
    assert main(["train", config, f"--workdir={workdir}"]) == status
    said = capsys.readouterr().err
    assert str(error) in said
    nameless = type(error) is OSError  # then the folder that is written is told
    assert (f"a file of --workdir={workdir} was written" in said) == nameless


def unread():
    """A standard output whose reader is gone, as `head` is once it has what it wants."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_a_reader_that_is_gone_ends_every_command_quietly(tmp_path, capsys, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", tiny.knowledge_rows())
    look = ["data", "inspect", f"--dataset={rows}", f"--tokenizer={tiny.tokenizer().path}"]
    for arguments in (["eval", "--list"], ["train", "--help"], [], look):
        with unread() as stream, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            assert main(arguments) == 141, arguments
        assert capsys.readouterr().err == ""
    program = [sys.executable, "-m", "medmoe_jax.cli.main", "eval", "--list"]
    for buffered in ("", "1"):
        with unread() as stream:
            env = {**os.environ, "PYTHONUNBUFFERED": buffered}
            done = subprocess.run(program, stdout=stream, stderr=-1, env=env, timeout=60)
        assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_command_without_a_standard_stream_ends_as_ever(closed, monkeypatch):
    monkeypatch.setattr(f"sys.{closed}", None)  # as Python has it after `>&-`
    assert main(["eval", "--list"]) == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_signs_that_the_output_lacks_are_written_out(tmp_path, encoding):
    """As texts and as a table; what it has stays as it is."""
    text = "Qu\u2019est-ce, \u00e9\u75c5?"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text, "response": text}])
    look = [f"--dataset={rows}", f"--tokenizer={tiny.tokenizer().path}"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "medmoe_jax.cli.main", "data", "inspect", *look]
    done = subprocess.run(command, stdout=-1, stderr=-1, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert text.encode(encoding, "backslashreplace") in done.stdout


def test_a_pipe_that_is_not_the_output_is_an_error(config, workdir, capsys, monkeypatch):
    def fail(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("medmoe_jax.cli.train.train_run", fail)
    assert "Broken pipe" in fails(capsys, "train", config, f"--workdir={workdir}")


@pytest.mark.parametrize(
    "entry",
    ["import medmoe_jax.cli.main", "runpy.run_module('medmoe_jax.cli.main', alter_sys=True)"],
    ids=["medmoe", "module"],
)
@pytest.mark.parametrize(
    "sent, status, said",
    [
        ("SIGTERM", 75, "medmoe: asked to stop before it began; the same command starts again\n"),
        ("SIGINT", 130, ""),
    ],
)
def test_a_signal_while_modules_are_imported(entry, sent, status, said):
    """The first of them that takes time never is."""
    code = f"""
import os, runpy, signal, sys

class Kills:
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), signal.{sent})

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # these tests run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["medmoe", "train"]
sys.meta_path.insert(0, Kills())
{entry}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_background_job_goes_on_to_ignore_control_c():
    code = """
import signal, sys

signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["medmoe", "train"]
from medmoe_jax.cli import early
with early.stoppable():
    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("sent, status", [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_program_that_is_cut_short_ends_before_python_takes_itself_apart(sent, status):
    """What JAX was about to do is not there any more then. All that waits for the end is called."""
    code = f"""
import atexit, os, signal, sys, threading

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

def run(*_):
    print("begun")
    os.kill(os.getpid(), signal.{sent})
    threading.Event().wait(60)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["medmoe", "completion", "bash"]
from medmoe_jax.cli import completion, main

completion.run = run
atexit.register(print, "the end")
threading.Thread(target=lambda: (threading.main_thread().join(), print("a thread"))).start()
kept = Kept()
sys.exit(main.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "begun\na thread\nthe end\n"), done.stderr


def test_the_collector_passes_by_what_a_program_imports():
    """Whoever imports the package keeps their own collector as it is, as these tests do."""
    # Python 3.12 puts a few hundred objects there by itself.
    assert gc.isenabled() and gc.get_freeze_count() < 10_000
    code = """
import gc, sys

sys.argv = ["/usr/bin/medmoe", "train"]
import medmoe_jax.cli.main
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True True\n", done.stderr


def test_a_command_logs_its_own_way():
    """Though libraries that it imports have set a handler of their own."""
    code = """
import logging, sys

sys.argv = ["/usr/bin/medmoe", "completion", "bash"]
from medmoe_jax.cli.main import main

main()
logging.getLogger("medmoe_jax.data").info("rows of '\x1b[2J'")
logging.getLogger("jax").warning("slow")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "INFO: rows of '\\x1b[2J'\nWARNING: slow\n"


@pytest.mark.parametrize("during", ["cli.session.load_config", "api.opening.open_setup",
                                    "cli.train.open_run"])  # fmt: skip
def test_sigterm_before_training_listens(config, tmp_path, monkeypatch, capsys, during):
    """While the configuration is read, while the base is opened, and right before the loop."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"medmoe_jax.{during}", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", config, f"--workdir={tmp_path / 'w'}"]) == 75
    assert "asked to stop; it starts again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "w").exists()


def test_names_that_leave_the_work_directory(config, tmp_path, capsys):
    new = f"--workdir={tmp_path / 'w'}"
    assert "--workdir: is empty" in fails(capsys, "train", config, "--workdir=")
    for name in ("..", "a/b", "", "/x", "x" * 101, "a\nb", "base", ".hidden"):
        override = f"--config.stages.order=({name!r},)"
        line = fails(capsys, "train", config, new, override)
        said = "no stage 'base'" if name == "base" else "is no name of a stage"
        assert "stages.order: " in line and said in line, name
