"""Write a trained model for other tools.

  medmoe export --config=FILE --workdir=DIR --format=hf --output=merged
  medmoe export --config=FILE --workdir=DIR --format=peft --output=adapter
  medmoe export --config=FILE --workdir=DIR --format=gguf --dtype=q8_0 --output=model
  medmoe export --config=FILE --workdir=DIR --format=gguf-adapter --output=adapter
  medmoe export --config=FILE --workdir=DIR --format=ming --output=adapter

  hf            every bank folded into the weights, as a folder that
                transformers loads
  peft          every bank, merged ones too, as one LoRA adapter of summed
                rank over the base as it was, with the leaves of the base that
                were trained as modules_to_save, biases or DoRA's magnitudes;
                it says what vLLM needs to load it
  gguf          every bank folded into the weights, as one file for llama.cpp,
                and a Modelfile for Ollama
  gguf-adapter  the adapter of peft as a file that llama.cpp puts over the
                base in a GGUF file
  ming          one bank of experts with routers, and the adapter of peft for
                the other banks, as the code of MING-MOE loads them beside the
                base

Beside or in them stand the tokenizer, the chat template that was trained with its options, the ids
that end an answer, and a model card (README.md): base, recipe, data, scores and limits.
A bank whose gate depends on the token fits none of the others; --off=BANK leaves it out.
--push=ORG/NAME uploads the folder to a new repository on the Hugging Face hub, with the token of
`hf auth login` or $HF_TOKEN; nothing is uploaded without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.adapters import lifecycle
from medmoe_jax.api.opening import open_stage
from medmoe_jax.base import decoder
from medmoe_jax.checkpoints import companions, gguf_export
from medmoe_jax.checkpoints.families import FAMILIES
from medmoe_jax.checkpoints.files import check_new, read_json
from medmoe_jax.checkpoints.huggingface import published, save_hf
from medmoe_jax.checkpoints.peft_export import TrainedLeaves, save_peft, serving
from medmoe_jax.checkpoints.peft_names import CONFIG
from medmoe_jax.checkpoints.released_export import save_released
from medmoe_jax.checkpoints.uploads import check_repository, upload
from medmoe_jax.cli.model_card import card_files
from medmoe_jax.cli.session import add_model_arguments, open_run
from medmoe_jax.data import ollama
from medmoe_jax.data.gguf_fields import tokenizer_fields
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.portable import portable_template
from medmoe_jax.errors import UserError
from medmoe_jax.training.leaves import match_leaves
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import chain
from medmoe_jax.training.terminal import note, say
from medmoe_jax.training.trained import Trained

# What else is written into the folder: a path to copy, bytes, or a value to write as JSON, by name.
Files = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    parser.add_argument("--output", required=True, help="the folder to write; a new one")
    parser.add_argument(
        "--dtype",
        choices=list(gguf_export.KINDS),
        help="of the tensors (default: the base's for hf and gguf, float32 for adapters); all but "
        "float32 and bfloat16 are gguf's alone",
    )
    parser.add_argument(
        "--push", default="", metavar="ORG/NAME", help="upload it too, to a new repository of a hub"
    )
    parser.add_argument("--private", action="store_true", help="with --push: not for everybody")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    check_new(arguments.output)
    if arguments.push:
        check_repository(arguments.push)
    elif arguments.private:
        raise UserError("--private says how --push=org/name uploads; give that too")
    export = FORMATS[arguments.format]
    if arguments.dtype and arguments.dtype not in export.dtypes:
        raise UserError(
            f"--dtype={arguments.dtype}: --format={arguments.format} writes "
            f"{', '.join(export.dtypes)}"
        )
    opened = open_run(rest, arguments.workdir)
    trained = open_stage(opened, arguments.stage)
    roster = trained.roster
    for name in arguments.off:
        roster = lifecycle.set_state(roster, name, "off")
    trained = dataclasses.replace(trained, roster=roster)
    card = card_files(opened, trained, arguments.off, export.library)
    export.write(opened.setup, trained, arguments.output, arguments.dtype, card)
    say(f"written to {arguments.output}")
    if arguments.push:
        place = upload(arguments.output, arguments.push, arguments.private)
        say(f"uploaded to {place}")


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


def _export_hf(setup: Setup, trained: Trained, output: str, dtype: str | None, card: Files) -> None:
    base, tokenizer = setup.base, setup.tokenizer
    ids = companions.token_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    prompting = _prompting(setup)
    if FAMILIES[base.family].within and b"image" not in prompting[companions.TEMPLATE]:
        note(
            "the exported chat template is the one trained with, of text alone: an image has no "
            "place in it (data.template=tokenizer keeps the model's own)"
        )
    save_hf(
        output,
        base.config,
        trained.whole,
        base.family,
        members=_members(trained, lifecycle.ACTIVE),
        dtype=np.dtype(dtype or setup.dtype),
        source=base.folder,
        extra=None if base.folder else ids,
        companions={**prompting, **card},
    )


def _export_peft(
    setup: Setup, trained: Trained, output: str, dtype: str | None, card: Files
) -> None:
    base, revision = published(setup.config.base.path)
    folder = save_peft(
        output,
        setup.base.config,
        setup.base.family,
        _members(trained, (*lifecycle.ACTIVE, "merged")),
        base=base,
        revision=revision,
        dtype=np.dtype(dtype or "float32"),
        trained=TrainedLeaves(
            _trained_leaves(setup, trained),
            trained.whole,
            _members(trained, lifecycle.ACTIVE),
            setup.load_base,
        ),
        companions={**_prompting(setup), **card},
    )
    for line in serving(read_json(folder / CONFIG)):
        note(line)


def _trained_leaves(setup: Setup, trained: Trained) -> list[str]:
    """Leaves of the base that the stages up to this one have trained."""
    leaves = decoder.shapes(setup.base.config)
    stages = chain(setup.stages, trained.stage)
    found = (sorted(match_leaves(leaves, stage.train_base)) for stage in stages)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _check_base(setup: Setup, trained: Trained, otherwise: str) -> None:
    """Raise UserError unless the base is as it was."""
    if leaves := _trained_leaves(setup, trained):
        raise UserError(
            f"leaves of the base were trained ({', '.join(leaves)}), which this format cannot "
            f"hold; {otherwise}"
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


def _export_gguf(
    setup: Setup, trained: Trained, output: str, dtype: str | None, card: Files
) -> None:
    base, encoder, tokenizer = setup.base, setup.encoder, setup.tokenizer
    template = portable_template(encoder).source
    fields = tokenizer_fields(encoder, base.config.vocab_size, template)
    jinja = Jinja(template, tokenizer.names, tokenizer.specials)
    frame = ollama.frame_of(lambda turns: jinja.render(turns, (), True))
    ends = [*map(tokenizer.text_of, encoder.stops.ids), *encoder.stops.texts]
    for lacking, what in (
        (not fields.same, "llama.cpp gives prompts other ids than were trained"),
        (fields.unnamed, "the file names three tokens that end an answer, and there are more"),
        (encoder.stops.texts, f"the file cannot say that answers end with {encoder.stops.texts}"),
        (
            not frame,
            "the chat template cannot be said in Ollama's language; the Modelfile has none",
        ),
        (FAMILIES[base.family].within, "the decoder alone is written, without what sees images"),
    ):
        if lacking:
            note(what)
    gguf_export.save_gguf(
        output,
        base.config,
        trained.whole,
        base.family,
        kind=dtype or str(np.dtype(setup.dtype)),
        members=_members(trained, lifecycle.ACTIVE),
        fields=fields.values,
        companions={
            ollama.MODELFILE: ollama.modelfile(gguf_export.MODEL, frame, ends).encode(),
            **card,
        },
    )


def _export_gguf_adapter(
    setup: Setup, trained: Trained, output: str, dtype: str | None, card: Files
) -> None:
    _check_base(setup, trained, "use --format=gguf")
    template = portable_template(setup.encoder).source
    gguf_export.save_gguf_adapter(
        output,
        setup.base.config,
        setup.base.family,
        _members(trained, (*lifecycle.ACTIVE, "merged")),
        kind=dtype or "float32",
        companions={companions.TEMPLATE: template.encode(), **card},
    )


def _export_released(
    setup: Setup, trained: Trained, output: str, dtype: str | None, card: Files
) -> None:
    _check_base(setup, trained, "train with train_base=() for it")
    base, revision = published(setup.config.base.path)
    states = (*lifecycle.ACTIVE, "merged")
    save_released(
        output,
        setup.base.config,
        setup.base.family,
        [(spec, trained.banks[spec.name]) for spec, at in trained.roster.values() if at in states],
        base=base,
        revision=revision,
        source=setup.base.folder,
        dtype=np.dtype(dtype or "float32"),
        companions={**_prompting(setup), **card},
    )


class Format(NamedTuple):
    """How a model is written.

    `write(setup, trained, output, dtype, more files by name)`, in what `dtypes`, and the `library`
    that loads it, by its name on the Hugging Face hub.
    """

    write: Callable[[Setup, Trained, str, str | None, Files], None]
    dtypes: tuple[str, ...]
    library: str


FORMATS = {
    "hf": Format(_export_hf, ("float32", "bfloat16"), "transformers"),
    "peft": Format(_export_peft, ("float32", "bfloat16"), "peft"),
    "gguf": Format(_export_gguf, tuple(gguf_export.KINDS), "gguf"),
    "gguf-adapter": Format(_export_gguf_adapter, ("float32", "float16", "bfloat16"), "gguf"),
    "ming": Format(_export_released, ("float32", "bfloat16"), "peft"),
}
