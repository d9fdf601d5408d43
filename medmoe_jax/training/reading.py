"""What a stage reads: its sources, opened and checked, as batches for the mesh."""

from __future__ import annotations

from typing import NamedTuple

from medmoe_jax.data.batches import BatchStream, make_stream
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.languages import detector, name_languages
from medmoe_jax.data.sources import RowFitter, check_source, open_source
from medmoe_jax.errors import field_names
from medmoe_jax.training.placement import Placement
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.terminal import note


class StageData(NamedTuple):
    """What a stage reads.

    Attributes:
      stream: its batches, those of this process's data shards.
      placement: puts them on the mesh.
      digests: content of each of its sources.
      languages: for each source, how many rows named their language, had it detected, or are of
        unknown language; empty without a table of languages.
    """

    stream: BatchStream
    placement: Placement
    digests: dict[str, str]
    languages: dict[str, dict[str, int]]


def check_sources(setup: Setup, stage: Stage) -> None:
    """Raise UserError for a source of the stage that cannot be there, before any is read."""
    for name in stage.sources:
        source = setup.config.data.sources[name]
        check_source(name, source.path, source.reader)


def open_data(setup: Setup, stage: Stage) -> StageData:
    """A stage's batches, and what is known of its sources.

    Raises:
      UserError: a source cannot be read, a row is of a language that the table lacks, or the batch
        does not divide over the devices.
    """
    data = setup.config.data
    fit = RowFitter(Encoder(setup.tokenizer, setup.template), data.length)
    opened = {
        name: open_source(name, **data.sources[name].to_dict(), fit=fit) for name in stage.sources
    }
    if fit.shortened:
        note(f"{fit.shortened:,} rows were shortened to fit {data.length} tokens")
    setup.check_batch()
    datasets = {name: rows for name, (rows, _) in opened.items()}
    languages: dict[str, dict[str, int]] = {}
    if setup.languages:
        detect = detector(data.detect_language)
        for name in stage.sources:
            where = data.sources[name].path or data.sources[name].reader
            datasets[name], languages[name] = name_languages(
                f"data.sources.{name}: {where}", datasets[name], setup.languages.ids, detect
            )
    with field_names("data."):
        placement = Placement(setup.mesh, data.global_batch, data.shards)
    stream = make_stream(
        datasets,
        stage.sources,
        setup.tokenizer,
        setup.template,
        data.mask,
        data.length,
        data.global_batch,
        data.shards,
        data.seed,
        pack=data.pack,
        shard_ids=placement.shard_ids,
        languages=setup.languages.ids if setup.languages else None,
    )
    digests = {name: digest for name, (_, digest) in opened.items()}
    return StageData(stream, placement, digests, languages)
