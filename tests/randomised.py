"""A finished run with random values in its banks, so large that every one of them matters."""

import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.folders import StageFolder


def random_leaf(path, struct, size: float):
    """A leaf of a bank: A of unit gain, B of gain `size`; the same in every stage and run."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(struct.shape, np.float32)
    if name.endswith(("lora_a", "kernel")):
        x *= struct.shape[1] ** -0.5
    elif name.endswith("lora_b"):
        x *= size * struct.shape[2] ** -0.5
    return jnp.asarray(x)


def randomise(workdir: Path, target: Path, size: float) -> Path:
    """A copy of a work directory in which the banks of every stage, all finished, are random."""
    shutil.copytree(workdir, target, ignore=shutil.ignore_patterns("steps"))
    for path in sorted((target / "stages").iterdir()):
        folder = StageFolder(path)
        final, manifest = store.load_final(folder)
        banks = jax.tree_util.tree_map_with_path(
            lambda path, leaf: random_leaf(path, leaf, size), final["banks"]
        )
        folder.manifest.unlink()
        store.save_final(folder, {**final, "banks": banks}, manifest)
    return target
