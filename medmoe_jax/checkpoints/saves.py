"""What a work directory has saved, as one line that changes with every save.

  python -m medmoe_jax.checkpoints.saves gs://bucket/runs/mine

The launcher asks so whether a start has brought the run forward, where it cannot look itself.
"""

from __future__ import annotations

import hashlib
import sys

from medmoe_jax.checkpoints.folders import MANIFEST
from medmoe_jax.checkpoints.seals import SEAL
from medmoe_jax.errors import StorageError, UserError
from medmoe_jax.storage.objects import files_below
from medmoe_jax.storage.places import place


def saves(workdir: str) -> str:
    """A digest of the names of all whole checkpoints and finished stages; "" where none is.

    Raises UserError, StorageError: the directory cannot be read.
    """
    found = (name for name, _ in files_below(place(workdir) / "stages"))
    names = sorted(name for name in found if name.rpartition("/")[2] in (SEAL, MANIFEST))
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest() if names else ""


if __name__ == "__main__":
    try:
        print(saves(sys.argv[1]))
    except (UserError, StorageError) as error:
        sys.exit(f"error: {error}")
