"""A folder for tools that write to a disk only, wherever it is to be."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from medmoe_jax.storage import objects
from medmoe_jax.storage.places import is_remote


class Spool:
    """A folder on disk whose files are copied to object storage, where that is their place.

    Attributes:
      folder: where the tool writes.
    """

    def __init__(self, place: Path) -> None:
        """Begin for a place; nothing is made there yet."""
        self._place, self._copied = place, {}
        self.folder = Path(tempfile.mkdtemp(prefix="medmoe-")) if is_remote(place) else place

    def sync(self) -> None:
        """Copy what has changed. Raises OSError, StorageError."""
        if self.folder == self._place:
            return
        for name, path in objects.files_below(self.folder):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if self._copied.get(name) != state:
                objects.upload_file(path, self._place / name)
                self._copied[name] = state

    def close(self) -> None:
        """Copy what has changed, and remove the folder that is not the place."""
        self.sync()
        if self.folder != self._place:
            shutil.rmtree(self.folder)
