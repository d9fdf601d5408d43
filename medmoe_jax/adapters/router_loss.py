"""The losses that banks lay on their routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.routing.routers import balance_loss, z_loss


def router_loss(banks: Iterable[BankSpec], stats: Mapping[str, RouterStats]) -> jax.Array:
    """Σ over banks of their weighted router losses, each the mean over the bank's routers.

    Raises:
      UserError: a bank with such a loss has no statistics.
    """
    total = jnp.float32(0)
    for bank in banks:
        mine = [s for key, s in stats.items() if key.split("/")[0] == bank.name]
        if not mine and (bank.balance_loss or bank.z_loss):
            raise UserError(
                f"router_loss: there are no statistics of bank '{bank.name}'; leave it out where "
                "it is off, and take the statistics of a call in which its layers ran"
            )
        for weight, loss in ((bank.balance_loss, balance_loss), (bank.z_loss, z_loss)):
            if weight:
                total += weight * jnp.mean(jnp.concatenate([loss(s) for s in mine]))
    return total
