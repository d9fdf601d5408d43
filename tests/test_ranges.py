"""Whole numbers: what every part that Python calls makes of one that is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.adalora import Allocator
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.errors import ParameterError
from medmoe_jax.evaluation.shots import Shots
from medmoe_jax.evaluation.ways import Way
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import COUNT, FINITE, POSITIVE, SEED, SHARE

FIELDS = {
    "bank 'k'.experts": lambda n: BankSpec("k", ("mlp.up",), experts=n),
    "bank 'k'.rank": lambda n: BankSpec("k", ("mlp.up",), rank=n),
    "bank 'k'.top_k": lambda n: BankSpec("k", ("mlp.up",), experts=8, gate="token", top_k=n),
    "target_rank": lambda n: Allocator("k", target_rank=n),
    "t_init": lambda n: Allocator("k", target_rank=4, t_init=n),
    "t_final": lambda n: Allocator("k", target_rank=4, t_final=n),
    "every": lambda n: Allocator("k", target_rank=4, every=n),
    "seed": lambda n: Sampling(seed=n),
    "top_k": lambda n: Sampling(top_k=n),
    "shots": lambda n: Shots(n),
    "max_tokens": lambda n: Way(answer="free", max_tokens=n),
    "samples": lambda n: Way(answer="free", temperature=1.0, samples=n),
}


@pytest.mark.parametrize("value", [1.5, 2.0, "4", True, float("nan"), np.float32(2), [2]])
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_whole_number_is_named(field, value):
    with pytest.raises(ParameterError, match=rf"^{field}: "):
        FIELDS[field](value)


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["400", "-400", "5000"])
def test_a_number_that_no_float_holds_is_named(value):
    for field, give in FIELDS.items():
        with pytest.raises(ParameterError, match=rf"^{field}: has more digits"):
            give(value)
    for limits in (FINITE, POSITIVE, SHARE, SEED):
        with pytest.raises(ParameterError, match=r"^x: has more digits"):
            limits.check("x", value)


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), np.array(4), jnp.int32(4)])
@pytest.mark.parametrize("field", FIELDS)
def test_whole_numbers_of_any_library_are_taken(field, value):
    FIELDS[field](value)


@pytest.mark.parametrize("value", [np.array(1.5), np.array([2, 3]), jnp.float32(2)])
def test_arrays_that_are_no_whole_number_are_refused(value):
    with pytest.raises(ParameterError, match=r"^n: "):
        COUNT.check_whole("n", value)
