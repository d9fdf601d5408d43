"""Records of a finished stage changed so that they still belong together."""

from collections.abc import Callable
from typing import Any

from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.records import read_record, write_record

Change = Callable[[dict[str, Any]], object]


def forge(
    folder: StageFolder, recipe: Change = lambda _: None, manifest: Change = lambda _: None
) -> None:
    """Rewrite a stage's recipe and manifest, each after a change in place, as a run would."""
    record, _ = read_record(folder.recipe)
    told, _ = read_record(folder.manifest)
    recipe(record["recipe"])
    told["recipe_fingerprint"] = write_record(folder.recipe, record)
    manifest(told)
    write_record(folder.manifest, told)
