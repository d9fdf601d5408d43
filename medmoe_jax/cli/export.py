"""Write a trained model for other tools.

  medmoe export --config=FILE --workdir=DIR --format=hf --output=merged
  medmoe export --config=FILE --workdir=DIR --format=peft --output=adapter

hf: every bank folded into the weights, as a folder that transformers loads.
peft: every bank, merged ones too, as one LoRA adapter of summed rank over the base as it was.
Beside them stand the tokenizer, the chat template that was trained with its options, and the ids
that end an answer.
A bank whose gate depends on the token fits neither; --off=BANK leaves it out.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np

from medmoe_jax.adapters import lifecycle
from medmoe_jax.base import decoder
from medmoe_jax.checkpoints import companions
from medmoe_jax.checkpoints.files import check_new, read_json
from medmoe_jax.checkpoints.huggingface import HUB, save_hf
from medmoe_jax.checkpoints.peft import save_peft
from medmoe_jax.cli.session import add_model_arguments, open_run, open_stage
from medmoe_jax.data.portable import portable_template
from medmoe_jax.errors import UserError
from medmoe_jax.training.leaves import match_leaves
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import chain
from medmoe_jax.training.terminal import note
from medmoe_jax.training.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    parser.add_argument("--output", required=True, help="the folder to write; a new one")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the tensors (default: the base's for hf, float32 for peft)",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    check_new(arguments.output)
    opened = open_run(rest, arguments.workdir)
    trained = open_stage(opened, arguments.stage)
    roster = trained.roster
    for name in arguments.off:
        roster = lifecycle.set_state(roster, name, "off")
    trained = dataclasses.replace(trained, roster=roster)
    FORMATS[arguments.format](opened.setup, trained, arguments.output, arguments.dtype)
    print(f"written to {arguments.output}")


def _members(trained: Trained, states: tuple[str, ...]):
    """The banks in these states, which must all be such that they can be folded."""
    members = []
    for name, (spec, state) in trained.roster.items():
        if state in states:
            try:
                lifecycle.check_mergeable(spec)
            except UserError as error:
                raise UserError(f"{error} (--off={name} leaves it out)") from None
            members.append((spec, trained.banks[name]))
    return members


def _export_hf(setup: Setup, trained: Trained, output: str, dtype: str | None) -> None:
    base, tokenizer = setup.base, setup.tokenizer
    ids = companions.token_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    save_hf(
        output,
        base.config,
        trained.base,
        base.family,
        members=_members(trained, lifecycle.ACTIVE),
        dtype=np.dtype(dtype or setup.dtype),
        source=read_json(base.folder / "config.json") if base.folder else None,
        extra=None if base.folder else ids,
        companions=_prompting(setup),
    )


def _export_peft(setup: Setup, trained: Trained, output: str, dtype: str | None) -> None:
    leaves = decoder.shapes(setup.base.config)
    trained_leaves = [
        leaf
        for stage in chain(setup.stages, trained.stage)
        for leaf in sorted(match_leaves(leaves, stage.train_base))
    ]
    if trained_leaves:
        raise UserError(
            f"leaves of the base were trained ({', '.join(dict.fromkeys(trained_leaves))}), which "
            "an adapter cannot express; use --format=hf"
        )
    save_peft(
        output,
        setup.base.config,
        setup.base.family,
        _members(trained, (*lifecycle.ACTIVE, "merged")),
        base=setup.config.base.path.removeprefix(HUB),
        dtype=np.dtype(dtype or "float32"),
        companions=_prompting(setup),
    )


def _prompting(setup: Setup) -> dict[str, Any]:
    """What other tools need to ask as the model was trained: tokenizer, template, ends."""
    tokenizer, (ends, texts) = setup.tokenizer, setup.encoder.stops
    template = portable_template(setup.encoder)
    if not template.same:
        note(
            "the exported chat template writes the same text, but other tools give it other ids "
            "than were trained, as this vocabulary has no tokens for the template's marks"
        )
    ids = companions.token_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    generation = companions.generation_config(setup.base.folder, ids, ends, texts)
    return {
        companions.GENERATION: generation,
        **companions.prompting_files(tokenizer, template.source),
    }


FORMATS = {"hf": _export_hf, "peft": _export_peft}
