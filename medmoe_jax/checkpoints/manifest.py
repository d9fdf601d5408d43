"""The manifest of a finished stage: what it started from, what it did, and which banks it left."""

import dataclasses
import importlib.metadata
import math
import platform
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from medmoe_jax.adapters.lifecycle import STATES
from medmoe_jax.checkpoints.records import RecordError, read_record, remedy, write_record
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import place

BANK_STATES = (*STATES, "dropped")
LIBRARIES = ("medmoe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class BankEntry:
    """One bank after a stage.

    Attributes:
      state: one of BANK_STATES.
      shapes: the shape of each of its arrays, by path; {} if dropped.
    """

    state: str
    shapes: dict[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one finished stage is.

    Attributes:
      stage, after: its name, and that of the stage it starts from ("" for the first).
      recipe_fingerprint: of its recipe, which covers the stages before it.
      base_fingerprint: of the base: weights, architecture, tokenizer, template.
      parent_fingerprint: `content` of the stage it starts from ("" for the first).
      operations: what happened to the banks before it, in order, each a dictionary with `op`.
      banks: each bank's entry.
      steps: updates made.
      metrics: its last metrics, ranks, counts of rows, and scores.
      versions: of the libraries that made it.
      content: of its recipe and every bit of what it left; two that are equal are one model.
      seal: fingerprint of the seal of what it left.
      files: `[bytes, fingerprint]` of other files of its folder, by name.
    """

    stage: str
    after: str
    recipe_fingerprint: str
    base_fingerprint: str
    parent_fingerprint: str
    operations: list[dict[str, Any]]
    banks: dict[str, BankEntry]
    steps: int
    metrics: dict[str, Any]
    versions: dict[str, str]
    content: str = ""
    seal: str = ""
    files: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Parameters of the banks that it trained; not those of which only the gate was."""
        banks = [bank for bank in self.banks.values() if bank.state == "train"]
        return sum(math.prod(shape) for bank in banks for shape in bank.shapes.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON-able dictionaries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any, source: str | Path = "manifest") -> "Manifest":
        """The manifest in `value`; `source` is the file's name for messages.

        Raises:
          UserError: a field is absent, unknown, of another type, or an unknown state or op.
        """
        fields = _checked(value, cls, source, "")
        fields["banks"] = {
            name: BankEntry(**_checked(entry, BankEntry, source, f"banks.{name}."))
            for name, entry in fields["banks"].items()
        }
        for name, entry in fields["banks"].items():
            if entry.state not in BANK_STATES:
                known = ", ".join(BANK_STATES)
                raise UserError(
                    f"{source}: banks.{name}.state is {entry.state!r}; it must be one of {known}"
                )
            for leaf, shape in entry.shapes.items():
                if not isinstance(shape, list) or not all(type(n) is int for n in shape):
                    raise UserError(
                        f"{source}: banks.{name}.shapes.{leaf} is {shape!r}; "
                        "it must be a list of integers"
                    )
        for number, operation in enumerate(fields["operations"]):
            if not isinstance(operation, dict) or not isinstance(operation.get("op"), str):
                raise UserError(
                    f"{source}: operations[{number}] must be an object with a string `op`"
                )
        return cls(**fields)

    def write(self, path: str | Path) -> None:
        """Write the manifest to `path`, atomically."""
        write_record(path, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read a manifest.

        Raises:
          UserError: it is gone or damaged, or was changed; names the file, and line or field.
        """
        try:
            content, _ = read_record(path)
        except RecordError as error:
            raise RecordError(f"{error}; {remedy(place(path).parent)}") from None
        return cls.from_json(content, path)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _checked(value: Any, kind: type, source: str | Path, prefix: str) -> dict[str, Any]:
    """The fields of dataclass `kind` in `value`: all there, none unknown, each of its type."""
    if not isinstance(value, dict):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must be a JSON object")
    declared: dict[str, Any] = get_type_hints(kind)
    unknown = sorted(set(value) - set(declared))
    if unknown:
        raise UserError(f"{source}: unknown field {prefix}{unknown[0]}")
    for name, hint in declared.items():
        if name not in value:
            raise UserError(f"{source}: field {prefix}{name} is missing")
        wanted = get_origin(hint) or hint
        if type(value[name]) is not wanted:
            raise UserError(
                f"{source}: field {prefix}{name} is {value[name]!r}; it must be {wanted.__name__}"
            )
        if wanted is dict and get_args(hint)[1] is str:
            wrong = sorted(key for key, item in value[name].items() if not isinstance(item, str))
            if wrong:
                raise UserError(f"{source}: field {prefix}{name}.{wrong[0]} must be str")
    return dict(value)
