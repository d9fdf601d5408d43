"""A global batch on the mesh, read by the processes whose devices hold its rows.

Row i of a stream's global batch comes from data shard i mod S. On the mesh the rows lie shard by
shard, so a process reads the few shards that its devices hold, and where a row lies, hence which
dropout mask and micro-batch it gets, is the same for any number of processes.

Axes: B rows of the global batch, R = B / S rows of each shard in it, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from medmoe_jax.data.batches import array_names
from medmoe_jax.errors import ParameterError
from medmoe_jax.parallel.mesh import batch_sharding, put


def rows_of_shard(rows: int, shards: int) -> int:
    """How many rows of a global batch come from each data shard.

    Raises:
      ParameterError: the shards do not divide the rows.
    """
    if shards < 1 or rows % shards:
        raise ParameterError(f"shards: {shards} does not divide a global batch of {rows} rows")
    return rows // shards


class Placement:
    """Puts a process's part of a global batch on its devices.

    Attributes:
      sharding: of the `[B, T]` arrays.
      shard_ids: the data shards that this process has to read.
    """

    def __init__(self, mesh: Mesh, rows: int, shards: int) -> None:
        """For global batches of `rows` rows from `shards` data shards.

        Raises:
          ParameterError: the shards do not divide the rows.
        """
        self.sharding = batch_sharding(mesh)
        shard_B, turn_B = np.divmod(np.arange(rows), rows_of_shard(rows, shards))
        held = batch_sharding(mesh, 1).addressable_devices_indices_map((rows,)).values()
        own = np.unique(np.concatenate([shard_B[part] for part in held]))
        self.shard_ids = tuple(own.tolist())
        # Where a row on the mesh, if it is this process's, lies in the stream's batch.
        self._index_B = turn_B * len(own) + np.searchsorted(own, shard_B)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The stream's next batch, int32 `[R · shard_ids, T]` each, as global arrays `[B, T]`."""
        return {name: put(a, self.sharding, self._index_B) for name, a in batch.items()}


def abstract_batch(
    mesh: Mesh, rows: int, length: int, languages: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of `rows` rows of `length` tokens, for compiling.

    Args:
      mesh: where it lies.
      rows, length: its shape.
      languages: whether it says which language a token is of.
    """
    one = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=batch_sharding(mesh))
    return dict.fromkeys(array_names(languages), one)
