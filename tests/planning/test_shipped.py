"""The recipes that users run, compiled for a TPU: each site with banks is one kernel."""

from pathlib import Path

import pytest

from medmoe_jax.cli.configs import load_config
from medmoe_jax.parallel.topology import compile_for, describe
from medmoe_jax.planning.programs import open_abstract, start, training
from tests import slices

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.aot
@pytest.mark.parametrize("recipe", ["medcare.py", "ming_moe.py"])
def test_every_site_with_banks_is_one_kernel(recipe):
    """Dropout and all; forward and backward, in the loop over layers."""
    topology = describe("v5e:1x1")
    fields = {"data.length": 256, "data.global_batch": 1, "run.accumulation": 1}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    setup = open_abstract(
        load_config([f"--config={CONFIGS / recipe}:qwen1.5-1.8b", *given]), topology
    )
    at = start(setup)
    banks = at.stage.config.banks.values()
    assert all(bank.dropout > 0 for bank in banks)
    program = training(setup, at, "none")
    calls = slices.kernels_of(compile_for(topology, program.function, *program.arguments))
    # Banks on all seven sites; those of the feed-forward network have routers.
    assert calls.count("lora_linear") == 2 * 7
    assert calls.count("route") == calls.count("route_gradients") == 3
