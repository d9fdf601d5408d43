"""medmoe_jax: medical adaptation of frozen decoder LLMs with sharded mixtures of LoRA experts.

    import medmoe_jax

    done = medmoe_jax.train("medcare:qwen2-1.5b", "runs/mine", {"data.sources.knowledge.path": ...})
    model = medmoe_jax.load("runs/mine")
    model.generate("What does a lack of vitamin C cause?")

Told in docs/python.md. JAX is imported with the first of these names that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmoe_jax.api.configs import config, variants
    from medmoe_jax.api.evaluate import Scores, evaluate
    from medmoe_jax.api.model import Model, load
    from medmoe_jax.api.plan import plan
    from medmoe_jax.api.plot import Pictures, plot
    from medmoe_jax.api.table import Table
    from medmoe_jax.api.train import Finished, train

__version__ = "0.2.0"
__all__ = [
    "Finished",
    "Model",
    "Pictures",
    "Scores",
    "Table",
    "config",
    "evaluate",
    "load",
    "plan",
    "plot",
    "train",
    "variants",
]

_MODULES = {
    "config": "configs",
    "evaluate": "evaluate",
    "Finished": "train",
    "load": "model",
    "Model": "model",
    "Pictures": "plot",
    "plan": "plan",
    "plot": "plot",
    "Scores": "evaluate",
    "Table": "table",
    "train": "train",
    "variants": "configs",
}


def __getattr__(name: str) -> Any:
    """A name of the public API, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module 'medmoe_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"medmoe_jax.api.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
