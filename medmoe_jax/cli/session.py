"""Plugging the rooms together for a command: configuration, model, tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints.agreement import check_alike
from medmoe_jax.checkpoints.fingerprint import code_fingerprint
from medmoe_jax.checkpoints.manifest import library_versions
from medmoe_jax.cli.configs import load_config
from medmoe_jax.data.conversation import Turn, check_text, turns_of
from medmoe_jax.data.languages import detector
from medmoe_jax.data.templates import doubts
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.report import Report
from medmoe_jax.evaluation.run import evaluate
from medmoe_jax.evaluation.shots import Fitter
from medmoe_jax.evaluation.tasks import Task, expand, load_task
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.training.compiling import keep_compiled
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.terminal import console, note
from medmoe_jax.training.trained import Trained, open_trained


def open_run(arguments: Sequence[str], workdir: str) -> Run:
    """The configuration that command-line arguments name, the same in every process.

    Args:
      arguments: about the configuration (`load_config`).
      workdir: of the run, where compiled programs are kept too, unless `run.compilation_cache`
        says otherwise; "" = there is none.

    Raises:
      UserError: a bad configuration, or processes with different ones, other code or libraries.
    """
    config = load_config(arguments)
    check_alike(
        {
            "config": config.to_dict(),
            "code": code_fingerprint(),
            "libraries": library_versions(),
        }
    )
    keep_compiled(config.run.compilation_cache, workdir)
    setup = open_setup(config)
    for text in (*setup.base.notes, *doubts(setup.template, setup.tokenizer)):
        note(text)
    return Run(setup, workdir)


def language_model(
    setup: Setup, trained: Trained, off: Sequence[str] = (), language: str = ""
) -> LanguageModel:
    """A model that answers, with some of its banks left out.

    Args:
      setup, trained: the configuration's parts and its weights.
      off: banks left out.
      language: code of the texts' language; "" = it is detected, text by text, where a bank asks.

    Raises:
      UserError: `off` names a bank that is not there, or the recipe's table has no such language.
    """
    roster = trained.roster
    for name in off:
        roster = lifecycle.set_state(roster, name, "off")
    config = setup.model(lifecycle.active_banks(roster))
    batch = setup.config.run.score_batch
    engine = Engine(config, trained.base, trained.banks, trained.leaves, setup.mesh, batch)
    expert_of = _experts(setup, config.banks, language)
    return LanguageModel(engine, setup.tokenizer, setup.template, expert_of)


def _experts(setup: Setup, banks: Sequence[BankSpec], language: str) -> Callable[[str], int]:
    """The expert of a text's language, or -1: of the given one, or of a detected one."""
    if language:
        expert = setup.language_expert(language)
        return lambda text: expert
    if not any(bank.gate == "language" and bank.forcing == "always" for bank in banks):
        return lambda text: -1
    detect = detector(setup.config.data.detect_language)
    experts = setup.languages.ids if setup.languages else {}
    return lambda text: experts.get(detect(text), -1)


def open_model(
    run: Run, stage: str | None = None, off: Sequence[str] = (), language: str = ""
) -> LanguageModel:
    """What `open_stage` gives, as a model that answers; see `language_model`."""
    return language_model(run.setup, open_stage(run, stage), off, language)


def open_stage(run: Run, stage: str | None = None) -> Trained:
    """The weights of a run at the end of a stage.

    Args:
      run: the run; one of a recipe with no stage needs no work directory.
      stage: its name; None = the last finished one, "base" = the bare base.

    Raises:
      UserError: no such stage, or it is not finished.
    """
    return open_trained(run, stage_of(run, stage))


def stage_of(run: Run, stage: str | None, option: str = "--stage") -> str:
    """The name of a stage, "" for the bare base; see `open_stage`. `option` is for messages."""
    names = [one.name for one in run.stages]
    if stage is None:
        name = run.last_finished() if run.workdir else ""
        if names and not name:
            raise UserError(
                f"no stage is finished in '{run.workdir}'; run medmoe train first, or ask for the "
                f"bare base with {option}=base"
            )
    else:
        name = "" if stage == "base" else stage
    if name and name not in names:
        raise UserError(f"{option}: '{name}' is none of base, {', '.join(names)}")
    return name


def open_models(run: Run, asked: Sequence[tuple[str, Sequence[str]]]) -> list[LanguageModel]:
    """Models of one run that share the base, but for the kernels that a stage has merged into.

    Args:
      run: the run.
      asked: the stage of each ("" = the bare base) and its banks that are left out.

    Raises:
      UserError: as of `open_stage` and `language_model`.
    """
    stages = dict.fromkeys(stage for stage, _ in asked)
    if any(stages):
        _ = run.setup.base_fingerprint  # what is read for it is not read again
    base = run.setup.load_base()
    trained = {stage: open_trained(run, stage, base) for stage in stages}
    return [language_model(run.setup, trained[stage], off) for stage, off in asked]


def run_tasks(
    setup: Setup,
    model: LanguageModel,
    names: Sequence[Task | str],
    limit: int | None = None,
    **options: Any,
) -> Report:
    """Evaluate on tasks by name, with prompts as training rows have them.

    Those too long for the context are shortened in their body.
    """
    fit = Fitter(model.encoder, setup.base.config.max_positions)
    tasks = [name if isinstance(name, Task) else load_task(name, limit, fit=fit) for name in names]
    for task in tasks:
        check_items(setup, task)
    report = evaluate(model, tasks, limit=limit, batch=8 * model.engine.batch, **options)
    for line in report.notes():
        note(line)
    note_cut(model)
    return report


def check_items(setup: Setup, task: Task) -> None:
    """Raise UserError, with its place, for an item of a task that the template refuses."""
    check_prompts(setup, [i.turns for i in task.items], f"task '{task.name}', item {{}}".format)


def check_prompts(
    setup: Setup,
    prompts: Sequence[str | Sequence[Turn]],
    place: Callable[[int], str],
    answers: Sequence[str] | None = None,
) -> None:
    """Raise UserError, with its `place`, for a prompt or answer that the template refuses."""
    for number, prompt in enumerate(prompts):
        try:
            if answers is None:
                setup.encoder.prompt(turns_of(prompt))
            else:
                said: Turn = {"role": "assistant", "content": answers[number]}
                setup.encoder({"conversations": [*turns_of(prompt), said], "language": ""})
        except UserError as error:
            raise UserError(f"{place(number)}: {error}") from None


def note_cut(model: LanguageModel) -> None:
    """Say how many prompts a model had to cut."""
    if model.shortened:
        context = model.engine.config.decoder.max_positions
        note(f"{model.shortened} prompts were cut to fit {context} positions with their answers")


def stage_evaluator(run: Run, stop: Callable[[], bool]) -> Callable[[Trained], dict[str, Any]]:
    """What `train` calls at the end of a stage: the scores of `run.tasks`, kept in report.json.

    Args:
      run: the run.
      stop: asked after every batch of items, whether to end there (`Stopped`).
    """
    setup = run.setup
    names = expand(setup.config.run.tasks)
    limit = setup.config.run.task_limit or None
    for name in names:  # an unknown name or a bad item shows now, not after the training
        check_items(setup, load_task(name, limit))

    def evaluate_stage(trained: Trained) -> dict:
        if not names:
            return {}
        model = language_model(setup, trained)
        report = run_tasks(setup, model, names, limit, stop=stop)
        report.save(run.stage(trained.stage).folder.report)
        console.print(report.table())
        return {r.title: {"score": r.score, "low": r.low, "high": r.high} for r in report.results}

    return evaluate_stage


def no_rest(rest: Sequence[str]) -> None:
    """Raise UserError for arguments that nobody asked for."""
    if rest:
        raise UserError(f"unknown argument '{rest[0]}'; see --help")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that opens a model."""
    parser.add_argument("--workdir", default="", help="of the run; not needed for a bare base")
    parser.add_argument("--stage", help="whose end is used; 'base' = no bank (default: the last)")
    parser.add_argument(
        "--off", action="append", default=[], metavar="BANK", help="leave out a bank; repeatable"
    )


def add_language_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of every command that answers."""
    parser.add_argument(
        "--language",
        default="",
        metavar="CODE",
        help="of the texts, for routers that always force its expert (default: detected)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that draws tokens."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus size (%(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from so many tokens; 0 = all (%(default)s)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="least share of the likeliest's (%(default)s)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How tokens are drawn, by the arguments of `add_sampling_arguments`."""
    return Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )


def read_rows(path: str, fields: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Rows of a JSONL file, each with the given text fields, and the file and line of each.

    Raises:
      UserError: a row is not JSON or lacks a field, or the file is not UTF-8; names file and line.
    """
    file = fetched(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    rows, places = [], []
    for place, row in json_text.lines(file.read_bytes(), path):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f'{place}: the row needs a text field "{field}"')
        check_text(row, place)
        rows.append(row)
        places.append(place)
    if not rows:
        raise UserError(f"{path}: no row in the file")
    return rows, places
