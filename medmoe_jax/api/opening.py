"""Opening a run, and the model at the end of one of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints.agreement import check_alike
from medmoe_jax.checkpoints.fingerprint import code_fingerprint
from medmoe_jax.checkpoints.manifest import library_versions
from medmoe_jax.data.conversation import check_texts
from medmoe_jax.data.languages import detector
from medmoe_jax.data.templates import doubts
from medmoe_jax.errors import ParameterError
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.training.compiling import keep_compiled
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.terminal import note
from medmoe_jax.training.trained import Trained, open_trained


def open_run(config: ConfigDict, workdir: str | Path) -> Run:
    """A configuration in a work directory, the same in every process.

    Args:
      config: the configuration.
      workdir: of the run, where compiled programs are kept too, unless `run.compilation_cache`
        says otherwise; "" = there is none.

    Raises:
      UserError: a bad configuration, or processes with different ones, other code or libraries.
    """
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
      UserError: `off` is no list of names or names a bank that is not there, or the recipe's table
        has no such language.
    """
    check_texts("off", off)
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


def stage_of(run: Run, stage: str | None, parameter: str = "stage") -> str:
    """The name of a stage, "" for the bare base; see `open_stage`. `parameter` is for messages.

    Raises:
      ParameterError: no such stage, or none is finished.
    """
    names = [one.name for one in run.stages]
    if stage is None:
        name = run.last_finished() if run.workdir else ""
        if names and not name:
            otherwise = "or ask for the bare base, which is called base"
            if not run.workdir:
                raise ParameterError(
                    f"{parameter}: there is no work directory; name one, {otherwise}"
                )
            raise ParameterError(
                f"{parameter}: no stage is finished in '{run.workdir}'; run medmoe train first, "
                f"{otherwise}"
            )
    else:
        name = "" if stage == "base" else stage
    if name and name not in names:
        raise ParameterError(f"{parameter}: '{name}' is none of base, {', '.join(names)}")
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
