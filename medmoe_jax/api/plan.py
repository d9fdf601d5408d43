"""What a recipe takes on a TPU slice that is not there: `medmoe_jax.plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax import interrupts
from medmoe_jax.api import configs
from medmoe_jax.parallel.topology import describe
from medmoe_jax.planning.plan import Plan, make_plan
from medmoe_jax.planning.programs import open_abstract, start


@interrupts.never_lost()
def plan(
    config: str | os.PathLike[str] | ConfigDict,
    topology: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    stage: str = "",
    everything: bool = False,
) -> Plan:
    """Compile a stage's training step for a slice and count the program, as `medmoe plan` does.

    No TPU, weights, tokenizer or data are needed; the libtpu wheel is. See docs/scaling.md for
    what the figures are.

    Args:
      config: the recipe, as of `medmoe_jax.config`.
      topology: the slice, `v5e:4x4`; several of them: `2xv5e:4x4`.
      overrides: values by field, `{"run.mesh.fsdp": 8}`.
      stage: whose step it is; "" = the first.
      everything: the frozen base's step, scoring and generation too.

    Raises:
      UserError: a bad recipe, an unknown slice, or no libtpu wheel.
    """
    slices = describe(topology)
    setup = open_abstract(configs.config(config, overrides), slices)
    return make_plan(setup, slices, start(setup, stage), everything)
