"""How several processes agree: on what the disk holds, on their settings, on one folder.

The first process reads and writes the disk; the others follow it. Processes talk through
`parallel.processes.gather`.
"""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from medmoe_jax.errors import StorageError, UserError, is_storage
from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import make_folder, place

_VISIBLE = 20  # seconds until a file shows on every machine of a shared disk


def from_first_process(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first process, a JSON-able value, on all of them.

    Raises:
      UserError: on all of them, where `decide` raises it or OSError on the first.
      StorageError: on all of them, where `decide` raises it on the first.
    """
    if processes.count() == 1:
        return decide()
    if processes.index():
        answer = processes.gather(None)[0]
        if "error" in answer:
            raise (StorageError if answer["storage"] else UserError)(answer["error"])
        return answer["value"]
    try:
        value = decide()
    except (UserError, OSError) as error:
        processes.gather({"error": str(error), "storage": is_storage(error)})
        raise
    processes.gather({"value": value})
    return value


def union(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all processes' mappings of JSON-able values; they agree where they overlap."""
    return {name: value for part in processes.gather(dict(by_name)) for name, value in part.items()}


def check_alike(what: Mapping[str, Any]) -> None:
    """Raise UserError, on all processes, unless they all give the same nested JSON-able value."""
    first, *others = (_flat(each, "") for each in processes.gather(what))
    for process, other in enumerate(others, 1):
        names = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if names:
            fields = ", ".join(f"{n} ({first.get(n)!r} and {other.get(n)!r})" for n in names)
            raise UserError(
                f"process {process} differs from process 0 in {fields}; start all of them with the "
                "same command, code and libraries"
            )


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    parts = (_flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def check_shared(directory: str | Path) -> None:
    """Raise UserError, on all processes, unless they all see the same folder, made if absent."""
    if processes.count() == 1:
        return
    directory = place(directory)

    def leave() -> str:
        make_folder(directory)
        name = f".seen-{uuid.uuid4().hex}"
        (directory / name).touch()
        return name

    token = directory / from_first_process(leave)
    seen = processes.gather(_appears(token))
    from_first_process(token.unlink)
    blind = [str(process) for process, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"{directory} of process {', '.join(blind)} is not that of process 0; a work directory "
            "must lie on a disk that all processes see"
        )


def _appears(path: Path) -> bool:
    until = monotonic() + _VISIBLE
    while not path.exists():
        if monotonic() > until:
            return False
        sleep(0.1)
    return True
