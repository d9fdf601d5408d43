"""Fingerprints: independent of placement, sensitive to every bit, place, name, dtype and shape."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

from medmoe_jax.checkpoints.fingerprint import json_fingerprint, tree_fingerprint
from medmoe_jax.parallel import hashing

VALUE = np.random.default_rng(0).normal(size=(16, 8, 24)).astype(ml_dtypes.bfloat16)


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def reference(array: np.ndarray) -> list[int]:
    """The two sums, element by element in Python integers."""
    bits = array.reshape(-1, array.shape[-1]).view(np.uint16)
    lanes = ((0x9E3779B1, 0x85EBCA77, 0x165667B1), (0xC2B2AE3D, 0x27D4EB2F, 0xD3A2646C))
    return [
        sum(
            mix((mix(int(b) ^ salt) + r * row + c * col) % 2**32)
            for (r, c), b in np.ndenumerate(bits)
        )
        % 2**32
        for row, col, salt in lanes
    ]


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 50 elements, so that arrays of the tests have many and a rest."""
    monkeypatch.setattr(hashing, "SLICE_ELEMENTS", 50)
    hashing._hash_rows.clear_cache()
    yield
    hashing._hash_rows.clear_cache()


def test_the_hash_is_that_of_a_loop_over_the_elements():
    want = json_fingerprint([["a/b", "bfloat16", [16, 8, 24], reference(VALUE)]])
    assert tree_fingerprint({"a": {"b": VALUE}}) == want


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(), ("x",), (None, "x", "y"), (("x", "y"),), ("y", None, "x")])
def test_every_sharding_gives_the_same(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    array = jax.device_put(VALUE, jax.NamedSharding(mesh, jax.P(*spec)))
    assert tree_fingerprint([array]) == tree_fingerprint([VALUE])


def test_slicing_changes_nothing(request):
    tree = {"a": VALUE, "b": jnp.arange(137.0), "c": np.arange(30, dtype=np.int64)}
    whole = tree_fingerprint(tree)
    request.getfixturevalue("small_slices")
    assert tree_fingerprint(tree) == whole
    for leading in ((16,), (16, 8)):  # the path of accelerators: one call for a whole shard
        ints = VALUE.view(np.uint16).reshape(*leading, -1)
        parts = hashing._hash(jnp.asarray(ints), [0] * ints.ndim, ints.shape)
        host = hashing._add(hashing._host_sums(ints, [0] * ints.ndim, ints.shape))
        np.testing.assert_array_equal(parts, host)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5),
        np.arange(5, dtype=np.int8) - 2,
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.arange(6, dtype=ml_dtypes.int4).reshape(2, 3),
        np.arange(6, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn).reshape(2, 3),
        np.arange(6, dtype=np.uint32).reshape(1, 2, 3),
    ],
)
def test_numpy_and_jax_agree_for_every_kind_of_element(array):
    assert tree_fingerprint([array]) == tree_fingerprint([jnp.asarray(array)])


def test_every_bit_and_every_place_counts():
    seen = {tree_fingerprint([VALUE])}
    for bit in range(16):
        changed = VALUE.copy()
        changed.view(np.uint16)[3, 5, 7] ^= 1 << bit
        seen.add(tree_fingerprint([changed]))
    for axis in range(3):
        swapped = np.swapaxes(VALUE.copy(), 0, axis)
        swapped[[0, 1]] = swapped[[1, 0]]
        seen.add(tree_fingerprint([np.ascontiguousarray(np.swapaxes(swapped, 0, axis))]))
    seen.add(tree_fingerprint([VALUE.reshape(8, 16, 24)]))
    seen.add(tree_fingerprint([VALUE.view(np.float16)]))
    seen.add(tree_fingerprint({"a": VALUE}))
    seen.add(tree_fingerprint([VALUE, np.float32(0)]))
    assert len(seen) == 1 + 16 + 3 + 4


def test_64_bit_values_are_not_cut_short():
    small = tree_fingerprint([np.array([1, 2], np.int64)])
    assert small != tree_fingerprint([np.array([1 + 2**40, 2], np.int64)])


def test_random_keys_and_the_order_of_names():
    assert tree_fingerprint([jax.random.key(1)]) != tree_fingerprint([jax.random.key(2)])
    a, b = np.float32(1), np.float32(2)
    assert tree_fingerprint({"a": a, "b": b}) == tree_fingerprint({"b": b, "a": a})
    assert tree_fingerprint({"a": a, "b": b}) != tree_fingerprint({"a": b, "b": a})
    assert tree_fingerprint({}) == json_fingerprint([])


@pytest.mark.shipped
def test_temporaries_stay_far_below_the_array():
    array = jax.ShapeDtypeStruct((64, 1024, 1024), jnp.uint16)
    starts = jax.ShapeDtypeStruct((3,), jnp.uint32)
    compiled = hashing._hash_rows.lower(array, starts, (64, 1024)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 1024 * 1024 * 2 / 4


def test_json_fingerprint_ignores_only_the_order_of_keys():
    assert json_fingerprint({"a": 1, "b": [1, 2]}) == json_fingerprint({"b": [1, 2], "a": 1})
    assert json_fingerprint({"a": 1}) != json_fingerprint({"a": 1.5})
    assert json_fingerprint([1, 2]) != json_fingerprint([2, 1])
