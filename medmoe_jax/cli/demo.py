"""A chat model before and after MedCare's two stages, in minutes on two cores.

  medmoe demo --config.base.path=MODEL     a folder, a GGUF file or hf://ORGANISATION/NAME
  medmoe demo --tiny                       on a tiny base of its own, which needs no model

Asks the model open questions, trains medical knowledge and clinical formats in two stages, asks
again; prints and writes (report.json, report.html) what each stage gained on held-out paraphrases
and inputs. With --tiny, a tokenizer and a tiny bilingual base are trained first.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medmoe_jax.api.opening import open_models
from medmoe_jax.api.tasks import open_tasks, run_tasks
from medmoe_jax.checkpoints.files import read_metrics, write_json
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.session import open_run
from medmoe_jax.data import tokenizers
from medmoe_jax.data.demo import answers, corpus
from medmoe_jax.data.demo.answers import Question
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import html
from medmoe_jax.evaluation.logged import pictures, read_logged
from medmoe_jax.evaluation.report import Report, Result
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.screen import ScreenTable
from medmoe_jax.training.kept import is_kept, kept
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.terminal import console, note
from medmoe_jax.training.train import train

_ANSWER_TOKENS = 48
_COLUMNS = ("model", "knowledge", "format")
_SETTINGS = (
    *("stage", "steps", "rows × tokens a step", "learning rate"),
    *("parameters of trained banks", "tokens read", "minutes"),
)
_STEPS_ONLY = "Minutes of the steps alone, without compilation, saving and evaluation."


class Compared(NamedTuple):
    """A model that the demonstration looks at.

    Attributes:
      label: for people.
      stage: at whose end; "" = the base as it came.
      off: banks left out.
      asked: whether it answers the open questions.
    """

    label: str
    stage: str
    off: tuple[str, ...] = ()
    asked: bool = False


class Demonstration(NamedTuple):
    """What is trained and compared.

    Attributes:
      recipe: its name.
      workdir: where nobody names one.
      tasks: of knowledge, then of formats.
      models: compared; the first is the base.
    """

    recipe: str
    workdir: str
    tasks: tuple[str, str]
    models: tuple[Compared, ...]


_STAGES = (
    Compared("stage 1, with the noise bank", "aggregate"),
    Compared("stage 1, noise bank dropped", "aggregate", ("noise",), asked=True),
    Compared("stage 2", "align", asked=True),
    Compared("stage 2 without orthogonality", "align_free"),
)
CHAT = Demonstration(
    "demo",
    "runs/demo",
    ("demo_knowledge:en", "demo_alignment:en"),
    (Compared("base", "", asked=True), *_STAGES),
)
TINY = Demonstration(
    "demo_tiny",
    "runs/demo-tiny",
    ("demo_knowledge", "demo_alignment"),
    (Compared("base", "pretrain"), *(one._replace(asked=False) for one in _STAGES)),
)


class Seen(NamedTuple):
    """What a model scored, and what it answered, question by question."""

    report: Report
    answers: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", help=f"({CHAT.workdir}; with --tiny {TINY.workdir})")
    parser.add_argument("--tiny", action="store_true", help="train a tiny base first; no model")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    show = TINY if arguments.tiny else CHAT
    workdir = Path(arguments.workdir or show.workdir)
    opened = _open(show, workdir, rest)
    as_they_came = [one for one in show.models if not one.stage]
    trained = [one for one in show.models if one.stage]
    seen = _look(opened, show, as_they_came)
    train(opened)
    seen |= _look(opened, show, trained)
    _write(opened, workdir, seen)


def _open(show: Demonstration, workdir: Path, rest: list[str]) -> Run:
    """The run; a base that is made here has a tokenizer that is trained here."""
    arguments = [f"--config={show.recipe}", *rest]
    config = load_config(arguments)
    _check_own(workdir, config.stages.order)
    if not config.base.path:
        tokenizer = workdir / "tokenizer.model"
        if not tokenizer.exists():
            note("training the tokenizer")
            size = config.base.decoder.vocab_size
            with only_writer(workdir):
                tokenizers.train(corpus.texts_for_tokenizer(), size, tokenizer)
        arguments.append(f"--config.base.tokenizer={tokenizer}")
    return open_run(arguments, str(workdir))


def _check_own(workdir: Path, stages: Sequence[str]) -> None:
    """Raise UserError where a work directory holds a run of other stages."""
    there = kept(workdir).stages.order if is_kept(workdir) else stages
    if tuple(there) != tuple(stages):
        raise UserError(
            f"--workdir: '{workdir}' holds another run (stages {', '.join(there)}); give the "
            "demonstration a new folder"
        )


def _look(run: Run, show: Demonstration, models: Sequence[Compared]) -> dict[str, Seen]:
    """What some models score and answer, by their labels."""
    opened = open_models(run, [(one.stage, one.off) for one in models])
    limit = run.setup.config.run.task_limit or None
    tasks = open_tasks(run.setup, show.tasks, limit).values()
    seen = {}
    for one, model in zip(models, opened, strict=True):
        note(f"evaluating: {one.label}")
        said = _asked(model) if one.asked else ()
        seen[one.label] = Seen(run_tasks(model, tasks, limit), said)
    return seen


def _asked(model: LanguageModel) -> tuple[str, ...]:
    """A model's answers to the open questions, printed."""
    questions = answers.questions()
    said = model.answer([one.text for one in questions], _ANSWER_TOKENS)
    for question, answer in zip(questions, said, strict=True):
        note(f"{question.text}\n  {_mark(question, answer.text)} {' '.join(answer.text.split())}")
    return tuple(answer.text for answer in said)


def _mark(question: Question, answer: str) -> str:
    return "✓" if question.answered(answer) else "✗"


def _write(run: Run, workdir: Path, seen: Mapping[str, Seen]) -> None:
    """Print the table; write report.json and report.html."""
    rows = [[label, *map(_with_interval, one.report.results)] for label, one in seen.items()]
    counts = [result.n for result in next(iter(seen.values())).report.results]
    chance = (
        f"knowledge: the likeliest of four answers is right ({counts[0]} items, chance 25%); "
        f"format: what the model writes is the text that is asked for ({counts[1]} items)"
    )
    cosines = {stage: _cosine(run.stage(stage)) for stage in ("align", "align_free")}
    free = cosines["align_free"] / max(cosines["align"], 1e-12)
    overlap = (
        f"mean |cos| between alignment and knowledge rows: {cosines['align']:.4f} with the "
        f"orthogonality term, {cosines['align_free']:.4f} without ({free:.1f} times as much)"
    )
    questions = answers.questions()
    said = {label: one.answers for label, one in seen.items() if one.answers}
    write_json(
        workdir / "report.json",
        {
            "models": {label: one.report.to_dict()["results"] for label, one in seen.items()},
            "answers": [
                {"kind": q.kind, "question": q.text, "names": q.names}
                | {"answers": {label: texts[i] for label, texts in said.items()}}
                for i, q in enumerate(questions if said else ())
            ],
            "mean_abs_cos": cosines,
        },
    )
    scores = "Held-out scores, percent (95% interval)"
    sections = [
        *_answer_sections(questions, said),
        html.TableSection(scores, _COLUMNS, rows, chance),
        html.TextSection("Orthogonality", overlap),
        html.TableSection("Settings and times", _SETTINGS, [*_settings(run)], _STEPS_ONLY),
        *(picture for _, picture in pictures(read_logged([str(workdir)]))),
    ]
    page = html.report_html(
        workdir / "report.html", sections, "medmoe_jax demonstration", live=True
    )
    note(scores)
    console.print(ScreenTable(_COLUMNS[:1], _COLUMNS[1:], rows))
    for line in (chance, overlap, *_right(questions, said)):
        note(line)
    note(f"written to {workdir / 'report.json'} and {page}")
    note(f"talk with it: {shlex.join(['medmoe', 'chat', f'--workdir={workdir}'])}")


def _settings(run: Run) -> Iterator[list[str]]:
    """What every stage was trained with, and how long its steps took."""
    config = run.setup.config
    for stage in run.stages:
        rows = read_metrics(stage.folder.metrics)
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
        done = Manifest.read(stage.folder.manifest)
        yield [
            stage.name,
            str(done.steps),
            f"{config.data.global_batch} × {config.data.length}",
            f"{config.stages[stage.name].learning_rate:g}",
            f"{done.trained:,}",
            f"{sum(row['tokens'] for row in rows):,.0f}",
            f"{seconds / 60:.1f}",
        ]


def _with_interval(result: Result) -> str:
    return f"{100 * result.score:.1f} ({100 * result.low:.1f} – {100 * result.high:.1f})"


def _cosine(stage: StageRun) -> float:
    figures = Manifest.read(stage.folder.manifest).metrics["train"]
    return figures["overlap/alignment-knowledge/cos"]


def _right(questions: Sequence[Question], said: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """How many open questions of each kind each model answered, a line a model."""
    for label, texts in said.items():
        right: dict[str, list[bool]] = {}
        for question, text in zip(questions, texts, strict=True):
            right.setdefault(question.kind, []).append(question.answered(text))
        counts = (f"{sum(one)} of {len(one)} {kind}" for kind, one in right.items())
        yield f"{label}: {', '.join(counts)} questions answered right"


def _answer_sections(questions: Sequence[Question], said: Mapping[str, Sequence[str]]):
    """What each model answered to each open question."""
    if not said:
        return
    rows = [
        [q.text, *(f"{_mark(q, texts[i])} {texts[i]}" for texts in said.values())]
        for i, q in enumerate(questions)
    ]
    yield html.TableSection(
        "Open questions, asked in words of no training row",
        ("question", *said),
        rows,
        "✓: the answer names the fact. " + "; ".join(_right(questions, said)),
    )
