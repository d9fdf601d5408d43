"""Any bytes give a value or a UserError: a few inputs a target, and with `make fuzz` many."""

import copy
import json
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmoe_jax.errors import UserError
from tests.fuzz import mutations, targets
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_input_is_read_or_refused(name, tmp_path_factory):
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def attempt(random):
        try:
            TARGETS[name](random, tmp_path_factory.mktemp("fuzz"))
        except UserError as error:
            assert str(error)

    attempt()


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_without_a_change_is_read(name, tmp_path_factory, monkeypatch):
    """A target whose whole input were refused would look at nothing."""
    monkeypatch.setattr(targets, "changed_bytes", lambda random, whole: whole)
    monkeypatch.setattr(targets, "changed_json", lambda random, whole: json.dumps(whole).encode())
    monkeypatch.setattr(targets, "changed_text", lambda random, whole: whole)
    monkeypatch.setattr(targets, "changed_value", lambda random, whole: whole)
    monkeypatch.setattr(targets, "changed_template", lambda random: targets.TEMPLATES[0])
    refused = []
    for seed in range(8):
        try:
            TARGETS[name](Random(seed), tmp_path_factory.mktemp("whole"))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) < 8, refused[0]


def test_an_input_depends_on_its_seed_alone():
    before = copy.deepcopy(mutations.VALUES)
    made = [
        [mutations.changed_json(Random(seed), {"a": {"b": [1, "c"]}}) for seed in range(400)]
        for _ in range(2)
    ]
    assert made[0] == made[1] and repr(mutations.VALUES) == repr(before)
