"""Seals: a file in a folder that lists every other file there with its size and hash.

A seal is written after the folder is whole, so that damage is seen before anything is loaded: bit
flips would otherwise load as other numbers.
"""

from pathlib import Path

from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.fingerprint import file_fingerprint
from medmoe_jax.errors import UserError
from medmoe_jax.storage.objects import files_below, size_of

SEAL = "SEAL.json"


def seal(folder: Path) -> None:
    """Write the seal of a folder.

    Raises:
      FileNotFoundError: the folder holds no file.
    """
    files = [(name, path) for name, path in files_below(folder) if path.name != SEAL]
    if not files:
        raise FileNotFoundError(f"{folder} is gone")  # an empty seal would vouch for nothing
    write_json(
        folder / SEAL,
        {name: [size_of(path), file_fingerprint(path)] for name, path in files},
    )


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, naming the file; empty if it is as it was written."""
    path = folder / SEAL
    try:
        for name, (size, digest) in read_json(folder / SEAL).items():
            path = folder / name
            if (found := size_of(path)) != size:
                return f"{path} is damaged: {found} bytes instead of {size}"
            if file_fingerprint(path) != digest:
                return f"{path} is damaged: its content is not what was written"
    except FileNotFoundError as error:
        return f"{error.filename or path} is damaged: the file is gone"
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    except (UserError, AttributeError, TypeError, ValueError) as error:
        return f"{folder / SEAL} is damaged: {error}"
    return ""
