"""One optimiser step on the trainable tree.

Axes: A micro-batches, B rows, T tokens.
`trainable` is `{"banks": {name: parameters}, "base": nested dict of base leaves}`, all float32; it
is the only tree that is differentiated, updated and donated. `frozen` is `{"base": ..., "banks":
...}`, an argument of the compiled step, never closed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medmoe_jax.adapters import model
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.router_loss import router_loss
from medmoe_jax.base import decoder, trees
from medmoe_jax.base.loss import cross_entropy, next_token_targets
from medmoe_jax.base.seam import Context, Params
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.parallel.hashing import mix
from medmoe_jax.routing import telemetry
from medmoe_jax.seeds import random_key


class TrainState(NamedTuple):
    """What a step changes."""

    step: Any  # [] int32, updates made
    trainable: Any
    optimiser: Any


class Regulariser(Protocol):
    """A loss on parameters alone; `specs` and `banks` hold every bank by name."""

    @property
    def name(self) -> str:
        """The name that its metrics begin with."""
        ...

    @property
    def uses(self) -> tuple[str, ...]:
        """The banks that it reads."""
        ...

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """What its gradient changes, each as `(bank, part)`; a part is `factors` or `gate`."""
        ...

    @property
    def weight(self) -> float:
        """The weight on its value."""
        ...

    def value(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """The unweighted loss, float32 scalar."""
        ...

    def measure(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> Any:
        """Small arrays from which `figures` are made, inside jit."""
        ...

    def figures(self, measured: Any) -> dict[str, float]:
        """More metrics, on the host."""
        ...


@dataclass(frozen=True)
class Objective:
    """What is minimised: token cross-entropy plus losses on parameters.

    Attributes:
      model: decoder and active banks.
      regularisers: losses on parameters, each weighted, entering once a step.
      specs: every bank, for the regularisers.
      accumulation: micro-batches a step.
      seed: of dropout.
    """

    model: AdaptedConfig
    regularisers: tuple[Regulariser, ...] = ()
    specs: tuple[BankSpec, ...] = ()
    accumulation: int = 1
    seed: int = 0


def nll(
    config: AdaptedConfig,
    trainable: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, RouterStats]]]:
    """Σ −log p over the batch's targets.

    Args:
      config: decoder and active banks.
      trainable, frozen: see the module.
      batch: `tokens`, `loss_mask`, `segment_ids`, `positions` and, where known, `language_ids`,
        each `[B, T]`.
      key: of dropout and router noise; None means neither, nor forced picks in training.

    Returns:
      `(Σ nll, (Σ weight, {"bank/site": RouterStats}))`.
    """
    banks = trees.overlay(frozen["banks"], trainable["banks"])
    targets_BxT, weights_BxT = next_token_targets(
        batch["tokens"], batch["loss_mask"], batch["segment_ids"]
    )
    context = Context(
        language_ids_BxT=batch.get("language_ids"), dropout_key=key, training=key is not None
    )
    x_BxTxD, _, aux = model.hidden(
        config,
        frozen["base"],
        banks,
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        trained=trainable["base"],
        context=context,
    )
    head_VxD = decoder.head(frozen["base"], trainable["base"])
    train_head = ("embed" if config.decoder.tied else "head") in trainable["base"]
    total = cross_entropy(
        config.decoder,
        train_head,
        head_VxD,
        x_BxTxD,
        targets_BxT,
        weights_BxT,
        config.execution,
    )
    return total, (jnp.sum(weights_BxT), telemetry.collect(aux))


def _targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Σ weight of the batch's targets."""
    _, weights = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    return jnp.sum(weights)


def _tokens(batch: Mapping[str, jax.Array]) -> jax.Array:
    """How many tokens are no padding."""
    return jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)


def _micro_loss(config: AdaptedConfig, trainable, frozen, batch, key, whole):
    """`nll` plus the router losses times the step's targets, by which both are divided.

    A router sees every token, so a micro-batch's share of its loss is that of the step's tokens:
    the mean over micro-batches is then the mean over tokens. `whole` is the step's batch.
    """
    loss, (weight, stats) = nll(config, trainable, frozen, batch, key)
    share = _tokens(batch) / jnp.maximum(_tokens(whole), 1.0)
    extra = router_loss(config.banks, stats) * share * _targets(whole)
    return loss + extra, (loss, extra, weight, stats)


def _weighted(objective: Objective, regulariser: Regulariser, trainable, frozen):
    """A regulariser's value times its weight, and its value."""
    banks = trees.overlay(frozen["banks"], trainable["banks"])
    value = regulariser.value({spec.name: spec for spec in objective.specs}, banks)
    return regulariser.weight * value, value


def micro_batches(batch: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """`[B, T]` to `[A, B/A, T]`, row i in micro-batch i mod A, so that every device has a share."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )


def gradients(
    objective: Objective,
    trainable: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    step: jax.Array,
) -> tuple[Any, dict[str, Any]]:
    """The gradient of the mean loss over all target tokens, plus the regularisers'.

    Sums are accumulated over micro-batches and devices and divided once, so a short answer's
    token weighs as much as a long one's.

    Returns:
      `(gradients, metrics)`.
    """
    step_key = jax.random.fold_in(random_key(objective.seed), step)

    def micro(carry, inputs):
        index, micro_batch = inputs
        key = jax.random.fold_in(step_key, index)
        grad = jax.grad(_micro_loss, argnums=1, has_aux=True)
        grads, (*sums, stats) = grad(objective.model, trainable, frozen, micro_batch, key, batch)
        return jax.tree.map(jnp.add, carry, (grads, *sums)), stats

    A = objective.accumulation
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    carry = (zeros, jnp.float32(0), jnp.float32(0), jnp.float32(0))
    xs = (jnp.arange(A), micro_batches(batch, A))
    if A == 1:
        carry, stats = micro(carry, jax.tree.map(lambda x: x[0], xs))
    else:
        carry, stats = jax.lax.scan(micro, carry, xs)
        stats = jax.tree.map(lambda x: x.sum(0), stats)
    grads, loss, extra, weight = carry
    scale = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    metrics = {"loss": loss * scale, "target_tokens": weight, "router": stats}
    if stats:
        metrics["non_finite"] = sum(jnp.sum(s.non_finite) for s in stats.values())
    if any(bank.balance_loss or bank.z_loss for bank in objective.model.banks):
        metrics["router_loss"] = extra * scale
    for one in objective.regularisers:
        grad = jax.grad(_weighted, argnums=2, has_aux=True)
        own_grads, value = grad(objective, one, trainable, frozen)
        grads = jax.tree.map(jnp.add, grads, own_grads)
        metrics[one.name] = value
        metrics[f"{one.name}/gradient_norm"] = optax.tree.norm(own_grads)
    return grads, metrics


def rows_hash(batch: Mapping[str, jax.Array]) -> jax.Array:
    """A uint32 that tells batches apart by their rows and masks, wherever on the mesh each row is.

    Two runs of one recipe read the same where this is the same step by step.
    """
    total = jnp.uint32(0)
    salt_T = np.arange(batch["tokens"].shape[1], dtype=np.uint32) * np.uint32(0x9E3779B1)
    for name in ("tokens", "loss_mask", "segment_ids"):
        mixed_BxT = mix(batch[name].astype(jnp.uint32) + salt_T[None])
        total = total * jnp.uint32(31) + jnp.sum(mixed_BxT, dtype=jnp.uint32)
    return total


def train_step(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
) -> tuple[TrainState, dict[str, Any]]:
    """One update: `(state, metrics)`; jit it with the first two arguments static.

    Metrics are float32 scalars, except `router` (RouterStats by bank and site) and `rows_hash`.
    """
    grads, metrics = gradients(objective, state.trainable, frozen, batch, state.step)
    updates, opt_state = optimiser.update(grads, state.optimiser, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    metrics["tokens"] = _tokens(batch)
    metrics["rows_hash"] = rows_hash(batch)
    return TrainState(state.step + 1, trainable, opt_state), metrics
