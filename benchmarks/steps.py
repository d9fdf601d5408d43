"""The training steps of the table, by name, each as a function that runs one of them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import jax

from benchmarks import dense_gather
from benchmarks.variants import (
    BATCH,
    DECODER,
    TOKENS,
    Variant,
    adapted_variant,
    frozen_variant,
    make_batch,
    medcare_stage_1,
    plain_lora,
    shipped_stage_1,
)
from medmoe_jax.base import decoder
from medmoe_jax.base.execution import Execution

# Unrolled, nothing that is kept for the backward pass is copied into a stack and out of it again; a
# loop over layers needs less memory.
PLAIN = Execution(unroll=DECODER.n_layers)
AGAIN = Execution(unroll=DECODER.n_layers, remat="full")
SCANNED = Execution()
# As `medmoe train` runs on a processor.
TRAINED = Execution(remat="dots")


@functools.cache
def base():
    """The frozen weights, one copy for all variants of a process."""
    return decoder.init(DECODER, jax.random.key(0))


def _adapted(specs: Callable, execution: Execution, dispatch: str = "stacked") -> Variant:
    return adapted_variant(DECODER, execution, base(), specs(DECODER), dispatch)


def _tunix() -> Variant:
    from benchmarks.tunix_peer import tunix_variant

    return tunix_variant(DECODER, base(), (BATCH, TOKENS))


VARIANTS: dict[str, Callable[[], Variant]] = {
    "frozen": lambda: frozen_variant(DECODER, PLAIN, base(), (BATCH, TOKENS)),
    "plain_lora": lambda: _adapted(plain_lora, PLAIN),
    "medcare": lambda: _adapted(medcare_stage_1, PLAIN),
    "medcare_shipped": lambda: _adapted(shipped_stage_1, PLAIN),
    "medcare_trained": lambda: _adapted(shipped_stage_1, TRAINED),
    "frozen_scanned": lambda: frozen_variant(DECODER, SCANNED, base(), (BATCH, TOKENS)),
    "medcare_scanned": lambda: _adapted(medcare_stage_1, SCANNED),
    **{
        name + suffix: functools.partial(_adapted, medcare_stage_1, execution, name)
        for name in dense_gather.BASELINES
        for suffix, execution in (("", PLAIN), ("_remat", AGAIN))
    },
}
SLOW = tuple(name for name in VARIANTS if name.startswith("dense_gather"))
NOT_QUICK = (*SLOW[1:], "frozen_scanned", "medcare_scanned")
if importlib.util.find_spec("tunix"):
    VARIANTS["tunix_frozen"] = _tunix


def make(name: str) -> Callable[[], None]:
    """A function that runs the variant's next step to its end."""
    dense_gather.register()
    variant, batch = VARIANTS[name](), make_batch(DECODER)
    carry = [variant.carry]

    def call() -> None:
        carry[0], loss = variant.run(carry[0], variant.frozen, batch)
        jax.block_until_ready((carry[0], loss))

    return call
