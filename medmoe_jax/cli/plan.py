"""What a stage takes on a TPU slice that is not there: memory, work, traffic, time.

  medmoe plan --config=medcare:qwen1.5-14b --topology=v5e:4x4
  medmoe plan --config=FILE --topology=2xv5p:2x2x2 --config.run.mesh.data=2 --all --json=plan.json
  medmoe plan --config=FILE --topology=v6e:2x4 --search

Compiles the real training step for the slice with the libtpu wheel (pip install 'medmoe_jax[aot]')
and counts the compiled program. No weights, tokenizer or data need exist: shapes come from the
configuration and, for a published base, its preset; a folder with nothing but a base's config.json
does, too (--config.base.path=FOLDER). A topology goes by any name of a slice: v5e:4x4, v5e-16 and
v5litepod-16 are one, v5p-16 has 8 chips, 2xv5e:4x4 are two. Times are bounds: the busiest resource
at its full speed.
"""

from __future__ import annotations

import argparse
import json

import jax

from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.cli.configs import load_config
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.parallel.topology import describe
from medmoe_jax.planning import plan as plans
from medmoe_jax.planning import search as searches
from medmoe_jax.planning.programs import open_abstract, start, training
from medmoe_jax.ranges import NOT_NEGATIVE
from medmoe_jax.storage.places import check_file
from medmoe_jax.training.placement import rows_of_shard
from medmoe_jax.training.summary import print_undivided
from medmoe_jax.training.terminal import console, note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4 or v5litepod-16"
    )
    parser.add_argument("--workdir", default="", help="whose configuration it is, without --config")
    parser.add_argument("--stage", default="", help="whose step it is (default: the first)")
    parser.add_argument(
        "--all", action="store_true", help="the frozen base's step, scoring and generation too"
    )
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=8,
        default=0,
        metavar="N",
        help="instead: compile the N most promising meshes, micro-batches and remats (%(const)s)",
    )
    parser.add_argument(
        "--print-shardings", action="store_true", help="how every array is spread over the mesh"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures too")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    NOT_NEGATIVE.check("search", arguments.search)
    if arguments.search and arguments.all:
        raise UserError("--all: a search compiles training steps alone; leave one of the two out")
    if arguments.json:
        check_file(arguments.json)
    # Nothing runs here: a TPU of this machine stays free for others.
    jax.config.update("jax_platforms", "cpu")
    topology = describe(arguments.topology)
    config = load_config(rest, arguments.workdir)
    if arguments.print_shardings or not arguments.search:
        setup = open_abstract(config, topology)
        at = start(setup, arguments.stage)
    if arguments.print_shardings:
        console.print(plans.shardings_table(setup, at))
    try:
        rows_of_shard(config.data.global_batch, config.data.shards)
    except ParameterError as error:  # no program tells of it
        note(f"training will refuse this batch: data.{error}")
    if arguments.search:
        tokens = config.data.global_batch * config.data.length
        result = searches.search(config, topology, arguments.stage, arguments.search, note)
        figures = searches.as_json(result, tokens)
        console.print(searches.table(result, topology, tokens))
        best = result.found[0] if result.found else None
        if best and best.figures.fits:
            console.print("the fastest:", " ".join(searches.flags(best.candidate)), soft_wrap=True)
        else:
            note("no candidate that was compiled fits: try more of them (--search=N) or more chips")
    else:
        plan = plans.make_plan(setup, topology, at, arguments.all)
        figures = plans.as_json(plan)
        console.print(plans.table(plan))
        state, frozen, _ = training(setup, at).arguments
        print_undivided({"state": state, "frozen": frozen}, setup.rules)
    if arguments.json:
        write_text(arguments.json, json.dumps(figures, indent=2) + "\n")
