"""Numbers that a configuration cannot hold are refused by the name of their field."""

import dataclasses
import math

import pytest

from medmoe_jax.adapters.adalora import Allocator
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.orthogonality import Orthogonality
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.adapters.sparsity import Sparsity
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import DECAY, POSITIVE, Range
from medmoe_jax.training import config as sections
from medmoe_jax.training.limits import LIMITS, check_numbers


def full_recipe():
    """A recipe with a section of every kind."""
    config = sections.recipe()
    config.stages.order = ("s",)
    config.stages.s = sections.stage(
        banks={"b": sections.bank(sites=("mlp.*",))},
        stack={"k": sections.stacked(("b",))},
        losses={
            "o": sections.orthogonality("b", "c"),
            "n": sections.orthonormality("b"),
            "p": sections.sparsity("k"),
        },
        allocators={"a": sections.allocator("b", 2)},
        mixture={"rows": 1.0},
    )
    config.base.decoder = {"norm_eps": 1e-5}
    config.data.sources.rows = sections.source("rows.jsonl")
    return config


def numbers(config, kind, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from numbers(value, kind, f"{prefix}{key}.")
        elif type(value) is kind:
            yield prefix + key


def refusal(field, value):
    config = full_recipe()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as caught:
        check_numbers(config)
    return str(caught.value)


def test_the_defaults_are_allowed():
    check_numbers(full_recipe())


def test_no_field_may_be_nan_or_infinite():
    fields = list(numbers(full_recipe(), float))
    assert len(fields) >= 25 and "stages.s.losses.o.weight" in fields
    for field in fields:
        for value in (math.nan, math.inf, -math.inf):
            assert refusal(field, value) == f"{field}: {value} is not a finite number"


def test_no_field_may_be_beyond_what_is_computed_with():
    whole = [name for name in numbers(full_recipe(), int) if not name.endswith("seed")]
    assert len(whole) >= 25
    for field in whole:
        assert refusal(field, 2**31) == f"{field}: 2147483648 is above 2147483647"
        assert refusal(field, -(2**31) - 1).startswith(f"{field}: -2147483649 is below ")
    for field in numbers(full_recipe(), float):
        assert refusal(field, 1e39).startswith(f"{field}: 1e+39 is "), field
        assert refusal(field, -1e39).startswith(f"{field}: -1e+39 is below "), field
    for name in ("learning_rate", "final_learning_rate", "weight_decay"):
        assert "is above 10" in refusal(f"stages.s.{name}", 1000.0)


REFUSED = {
    "stages.s.learning_rate": (-1e-3, "-0.001 is below 0"),
    "stages.s.final_learning_rate": (-0.1, "-0.1 is below 0"),
    "stages.s.warmup": (100.0, "100.0 is above 1"),
    "stages.s.weight_decay": (-0.1, "-0.1 is below 0"),
    "stages.s.clip": (-1.0, "-1.0 is below 0"),
    "stages.s.b1": (1.0, "1.0 is not below 1"),
    "stages.s.b2": (1.5, "1.5 is above 1"),
    "stages.s.eps": (0.0, "0.0 is not above 0"),
    "stages.s.evaluation.every": (-2, "-2 is below 0"),
    "stages.s.evaluation.limit": (-1, "-1 is below 0"),
    "stages.s.evaluation.patience": (-1, "-1 is below 0"),
    "stages.s.steps": (-1, "-1 is below 0"),
    "stages.s.epochs": (-0.5, "-0.5 is below 0"),
    "stages.s.seed": (2**63, "9223372036854775808 is above 9223372036854775807"),
    "stages.s.mixture.rows": (-1.0, "-1.0 is below 0"),
    "stages.s.banks.b.alpha": (0.0, "0.0 is not above 0"),
    "base.seed": (-(2**63) - 1, "-9223372036854775809 is below -9223372036854775808"),
    "data.seed": (10**400, "has more digits than any number"),
    "data.length": (-1, "-1 is below 0"),
    "data.global_batch": (0, "0 is below 1"),
    "data.shards": (0, "0 is below 1"),
    "data.detect_language": (1.5, "1.5 is above 1"),
    "data.sources.rows.window": (-1, "-1 is below 0"),
    "run.accumulation": (0, "0 is below 1"),
    "run.unroll": (0, "0 is below 1"),
    "run.log_every": (0, "0 is below 1"),
    "run.save_every": (-4, "-4 is below 1"),
    "run.keep": (0, "0 is below 1"),
    "run.task_limit": (-1, "-1 is below 0"),
    "run.score_batch": (0, "0 is below 1"),
}


def test_every_limit_is_tested():
    fields = {field.replace(".s.", ".*.").replace(".b.", ".*.").replace(".rows", ".*")
              for field in REFUSED}  # fmt: skip
    assert fields == set(LIMITS)


@pytest.mark.parametrize("field", REFUSED)
def test_refused(field):
    value, words = REFUSED[field]
    message = refusal(field, value)
    assert message.startswith(f"{field}: ") and words in message


ROUNDED = {
    "stages.s.b1": (1 - 1e-9, 1 - 1e-7, "0.999999999 is 1.0 in float32: 1.0 is not below 1"),
    "stages.s.b2": (0.99999999999, 0.9999, "0.99999999999 is 1.0 in float32: 1.0 is not below 1"),
    "stages.s.eps": (1e-46, 1e-37, "1e-46 is 0.0 in float32: 0.0 is not above 0"),
    "stages.s.banks.b.alpha": (1e-39, 1e-37, "1e-39 is 0.0 in float32: 0.0 is not above 0"),
}


@pytest.mark.parametrize("field", ROUNDED)
def test_what_float32_makes_of_a_number_is_in_its_range_too(field):
    value, near, words = ROUNDED[field]
    assert refusal(field, value) == f"{field}: {words}"
    config = full_recipe()
    config.update_from_flattened_dict({field: near})
    check_numbers(config)


def test_seeds_of_any_kind_are_no_floats():
    """They have 64 bits, of which float32 keeps few."""
    config = full_recipe()
    config.data.seed = config.base.seed = 2**63 - 1
    check_numbers(config)


def test_limits_go_by_whole_names():
    """A stage, bank or source may be called as a field is."""
    config = full_recipe()
    config.stages.s.banks = {"mixture": sections.bank(sites=("mlp.*",), router_noise=0.5)}
    config.stages.s.mixture = {"alpha": 0.0}
    check_numbers(config)


@pytest.mark.parametrize("profile", [(3,), (0, 2), (2, 0), (1.5, 2), (1, 2, 3), ("a", "b")])
def test_a_profile_is_two_counts(profile):
    assert refusal("run.profile", profile).startswith(f"run.profile: {profile} is neither empty")


def test_open_and_closed_ends():
    for one, inside, outside in (
        (POSITIVE, (1e-9, 3), (0, -1)),
        (DECAY, (0, 0.999), (1, 1.1)),
        (Range(0, 1, above=True), (0.1, 1), (0, 2)),
    ):
        for value in inside:
            one.check("x", value)
        for value in (*outside, math.nan):
            with pytest.raises(UserError, match=r"^x: "):
                one.check("x", value)


PARTS = {
    BankSpec: (sections.bank(), {"name", "start", "stop"}, {"layers"}),
    Orthogonality: (sections.orthogonality("a", "b"), set(), {"kind"}),
    Orthonormality: (sections.orthonormality("a"), set(), {"kind"}),
    Sparsity: (sections.sparsity("a"), set(), {"kind"}),
    Allocator: (sections.allocator("a", 2), set(), set()),
}


@pytest.mark.parametrize("kind", PARTS)
def test_sections_have_the_fields_and_defaults_of_their_dataclass(kind):
    section, not_there, more = PARTS[kind]
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert set(section) - more == set(fields) - not_there
    for name in set(section) & set(fields):
        if fields[name] is not dataclasses.MISSING:
            assert section[name] == fields[name]


def test_a_stack_has_the_gate_of_a_bank():
    section, bank = sections.stacked(("a", "b"), mix_softmax=True), sections.bank()
    assert set(section) - {"of"} <= set(bank)
    own = {"of": ("a", "b"), "gate": "skill", "mix_softmax": True}
    assert {k: v for k, v in section.items() if k in own} == own
    assert all(section[k] == bank[k] for k in set(section) - set(own))
