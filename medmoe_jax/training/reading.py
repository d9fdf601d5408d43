"""What a stage reads: its sources, opened and checked, as batches for the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from medmoe_jax.data.batches import BatchStream, StreamSpec, make_stream
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.data.sources import Opened, check_source, open_sources
from medmoe_jax.errors import UserError, field_names
from medmoe_jax.training.placement import Placement
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.terminal import note


class StageData(NamedTuple):
    """What a stage reads.

    Attributes:
      stream: its batches, those of this process's data shards.
      placement: puts them on the mesh.
      digests: content of each source that decides what it ends with.
      languages: for each source, how many rows named their language, had it detected, or are of
        unknown language; empty without a table of languages.
      held_out: rows that it is scored on while it trains, by source.
    """

    stream: BatchStream
    placement: Placement
    digests: dict[str, str]
    languages: dict[str, dict[str, int]]
    held_out: dict[str, EncodedRows]


def check_sources(setup: Setup, stage: Stage) -> None:
    """Raise UserError for a source of the stage that cannot be there, before any is read."""
    for name in (*stage.sources, *stage.held_out):
        fields = setup.config.data.sources[name]
        check_source(name, fields)
        if fields.window and not stage.config.steps:
            raise UserError(
                f"stages.{stage.name}.steps is 0, but the rows of source '{name}' are streamed and "
                "not counted; say how many steps"
            )


def open_rows(setup: Setup, stages: Sequence[Stage]) -> dict[str, Opened]:
    """The training rows of every source that some stages read, or are scored on.

    Raises:
      UserError: a source cannot be read, or a row of it cannot be used.
    """
    read = (name for stage in stages for name in (*stage.sources, *stage.held_out))
    names = list(dict.fromkeys(read))
    with field_names("data."):
        opened = open_sources(setup.config.data.to_dict(), names, setup.encoder)
    for text in (text for one in opened.values() for text in one.notes):
        note(text)
    return opened


def place_batches(setup: Setup) -> Placement:
    """What puts batches on the mesh.

    Raises:
      UserError: a batch does not divide over micro-batches and devices, or over the data shards.
    """
    setup.check_batch()
    data = setup.config.data
    with field_names("data."):
        return Placement(setup.mesh, data.global_batch, data.shards)


def open_data(setup: Setup, stage: Stage, opened: Mapping[str, Opened] | None = None) -> StageData:
    """A stage's batches, and what is known of its sources.

    Args:
      setup, stage: of the run.
      opened: its sources, as `open_rows` gives them; None = they are opened here.

    Raises:
      UserError: the batch does not divide over the devices, or as `open_rows` does.
    """
    if opened is None:
        opened = open_rows(setup, [stage])
    data, placement = setup.config.data, place_batches(setup)
    spec = StreamSpec(data.global_batch, data.shards, data.seed, data.pack, placement.shard_ids)
    own = {name: opened[name] for name in stage.sources}
    stream = make_stream({name: one.rows for name, one in own.items()}, stage.sources, spec)
    languages = {name: one.languages for name, one in own.items() if one.languages}
    digests = {name: opened[name].digest for name in stage.deciding}
    # Those that are streamed are refused when the recipe is read.
    held_out = {name: cast(EncodedRows, opened[name].rows) for name in stage.held_out}
    return StageData(stream, placement, digests, languages, held_out)
