"""Run lm-evaluation-harness on a model, with its own tasks, prompts and options.

  medmoe lm-eval --config=FILE --workdir=DIR run --tasks medqa_4options --num_fewshot 3
  medmoe lm-eval --config=FILE --workdir=DIR run --tasks mmlu_anatomy \\
      --apply_chat_template --fewshot_as_multiturn true --output_path out --log_samples
  medmoe lm-eval --config=FILE --workdir=DIR --data=FOLDER run --tasks medmcqa,pubmedqa

What follows `run` is given to `lm-eval run` with the model filled in; see `lm-eval run --help`.
Needs the extra `lm-eval`. The options before it are written with `=`.
--data=FOLDER reads the tasks' datasets from FOLDER/OWNER/NAME, as they lie on the hub, which is not
asked then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys

from medmoe_jax.api.opening import open_model
from medmoe_jax.cli.session import add_language_argument, add_model_arguments, open_run
from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import local

PASSED_ON = "run"  # from this word on, all belongs to lm-eval, which has a --config of its own
_OURS = ("--model", "--model_args", "-M", "-a")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    parser.add_argument(
        "--data", type=local, metavar="FOLDER", help="the tasks' datasets, in the place of the hub"
    )
    parser.add_argument(
        "asked", nargs=argparse.REMAINDER, metavar="run ...", help="options of `lm-eval run`"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'medmoe_jax[lm-eval]'")
    if processes.count() > 1:
        raise UserError("lm-eval runs in one process; leave out --coordinator")
    first, *asked = arguments.asked or [""]
    if first != PASSED_ON or not asked:
        raise UserError("say what to run behind the other options: run --tasks NAME ...")
    for option in asked:
        if option.partition("=")[0] in _OURS:
            raise UserError(f"{option}: the model is that of --config, --workdir and --stage")
    if arguments.data and not arguments.data.is_dir():
        raise UserError(f"--data: no folder {arguments.data}")
    opened = open_run(rest, arguments.workdir)
    model = open_model(opened, arguments.stage, arguments.off, arguments.language)
    # Imported here: it takes seconds.
    from lm_eval.__main__ import cli_evaluate

    from medmoe_jax.evaluation import harness, published

    harness.register(model)
    before, sys.argv = sys.argv, ["lm-eval", "run", "--model", harness.NAME, *asked]
    here = published.from_folder(arguments.data) if arguments.data else contextlib.nullcontext()
    try:
        with here:
            cli_evaluate()
    finally:
        sys.argv = before
