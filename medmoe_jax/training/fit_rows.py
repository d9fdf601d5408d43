"""The rows of a task that mixing weights are fitted on.

Axes: R rows, T tokens.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from medmoe_jax.base.attention import row_slots
from medmoe_jax.data.batches import epoch_batches
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.data.sources import open_source
from medmoe_jax.errors import UserError, field_names
from medmoe_jax.mesh_axes import SEQUENCE
from medmoe_jax.parallel.mesh import batch_sharding, put, round_up_rows
from medmoe_jax.training.config import source
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.terminal import note


def read_task(setup: Setup, name: str, path: str | Path) -> tuple[EncodedRows, str]:
    """A task's training rows, and a digest of their content.

    Raises:
      UserError: there is no row, or a bad one.
    """
    data = setup.config.data
    found = open_source(name, source(str(path)).to_dict(), data.ignore)
    with field_names("data."):
        rows = EncodedRows(name, found.rows, setup.encoder, data.length)
    if rows.counts.truncated_rows:
        cut, whole = rows.counts.truncated_rows, len(rows)
        note(f"task '{name}': {cut:,} of {whole:,} rows were cut at data.length")
    return rows, found.digest


def batch_of(setup: Setup, name: str, rows: EncodedRows) -> tuple[dict[str, jax.Array], int]:
    """All rows `[R, T]`, filled up to whole micro-batches of `run.score_batch`, and how many.

    Raises:
      UserError: no token is a target.
    """
    data = setup.config.data
    size = round_up_rows(setup.mesh, min(setup.config.run.score_batch, len(rows)))
    parts = list(epoch_batches(rows, size))
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if not arrays["loss_mask"].any():
        raise UserError(
            f"task '{name}': no token of its rows is a target, so there is nothing to fit; most "
            "likely data.length cuts them before their answers begin"
        )
    longest = int(np.max(np.sum(arrays["segment_ids"] > 0, axis=1)))
    length = row_slots(longest, setup.mesh.shape[SEQUENCE], data.length)
    where = batch_sharding(setup.mesh)
    return {k: put(a[:, :length], where) for k, a in arrays.items()}, len(parts)
