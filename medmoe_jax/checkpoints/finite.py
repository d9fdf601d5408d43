"""Whether numbers are numbers: NaN and infinity are worth nothing, whatever is made of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.base import trees
from medmoe_jax.errors import UserError


def not_finite(tree: Any) -> list[str]:
    """Paths of the arrays, in nested dicts, that hold NaN or infinity; quantised ones by scales."""
    finite = jax.device_get(_all_finite(tree))
    return [path for path, fine in trees.flatten(finite) if not all(jax.tree.leaves(fine))]


def check_finite(tree: Any, where: str, advice: str) -> None:
    """Raise UserError, beginning with `where`, for NaN or infinity in arrays; names them."""
    if bad := not_finite(tree):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{where}: NaN or infinity in {', '.join(bad[:3])}{more}; {advice}")


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
