"""The manifest: a round trip, and one clear error for everything that can be wrong with it."""

import copy

import jax
import pytest

from medmoe_jax.checkpoints.manifest import BANK_STATES, BankEntry, Manifest, library_versions
from medmoe_jax.errors import UserError

MANIFEST = Manifest(
    stage="alignment",
    after="knowledge",
    recipe_fingerprint="r",
    base_fingerprint="b",
    parent_fingerprint="p",
    operations=[{"op": "merge", "bank": "attention"}, {"op": "drop", "bank": "noise"}],
    banks={
        "attention": BankEntry("merged", {"attn.q/lora_a": [2, 8, 1, 4]}),
        "noise": BankEntry("dropped"),
    },
    steps=120,
    metrics={"loss": 1.25},
    versions={"jax": "0.10.2"},
)


def test_round_trip(tmp_path):
    MANIFEST.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == MANIFEST


@pytest.mark.parametrize("field", list(MANIFEST.to_json()))
def test_every_field_is_needed_and_typed(field):
    value = MANIFEST.to_json()
    with pytest.raises(UserError, match=f"m.json: field {field} is .*must be"):
        Manifest.from_json({**value, field: 1.5}, "m.json")
    del value[field]
    with pytest.raises(UserError, match=f"m.json: field {field} is missing"):
        Manifest.from_json(value, "m.json")


@pytest.mark.parametrize(
    "path, put, message",
    [
        (["stagee"], "x", "unknown field stagee"),
        (["steps"], True, "field steps is True; it must be int"),
        (
            ["operations", 0],
            {"bank": "attention"},
            r"operations\[0\] must be an object with .*`op`",
        ),
        (["operations", 1], "drop", r"operations\[1\] must be"),
        (["banks", "noise", "state"], "gone", "banks.noise.state is 'gone'; .*frozen"),
        (["banks", "noise"], "dropped", "banks.noise must be a JSON object"),
        (["banks", "noise", "rank"], 8, "unknown field banks.noise.rank"),
        (["banks", "attention", "shapes", "attn.q/lora_a"], [2.0], "banks.attention.shapes.attn.q"),
        (["versions", "jax"], 10, "field versions.jax must be str"),
    ],
)
def test_what_is_wrong_is_named(path, put, message):
    value = copy.deepcopy(MANIFEST.to_json())
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = put
    with pytest.raises(UserError, match=f"m.json: {message}"):
        Manifest.from_json(value, "m.json")


def test_a_file_that_is_no_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest.json: expected a JSON object"):
        Manifest.read(tmp_path / "manifest.json")


def test_every_state_is_accepted():
    for state in BANK_STATES:
        value = {**MANIFEST.to_json(), "banks": {"x": {"state": state, "shapes": {}}}}
        assert Manifest.from_json(value).banks["x"].state == state


def test_versions_are_those_installed():
    assert library_versions()["jax"] == jax.__version__
