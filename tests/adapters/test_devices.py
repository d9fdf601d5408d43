"""One device and eight simulated ones agree: values, gradients, router sums, dropout masks."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.base.execution import Execution
from tests import naive
from tests.adapters.conftest import SPECS
from tests.adapters.test_model import compiled_gradient
from tests.naive import TINY, rel, tree_rel

pytestmark = pytest.mark.slow

DROPPED = tuple(s.replace(dropout=0.25) if s.name != "skills" else s for s in SPECS)


@pytest.fixture(scope="module")
def wide_batch():
    """Eight rows of unequal fill."""
    return naive.random_batch(TINY, rows=((4, 2), (5,), (2,), (6,)) * 2, length=6, seed=4)


@pytest.fixture(scope="module")
def one_device(base, banks, wide_batch):
    fn = compiled_gradient(specs=DROPPED)
    return fn, fn(banks, base, wide_batch, jax.random.key(7))


def _agree(a, b):
    (loss, stats), grads = a
    (want_loss, want_stats), want_grads = b
    assert abs(loss / want_loss - 1) < 1e-5
    assert tree_rel(grads, want_grads) < 1e-4
    assert tree_rel(stats, want_stats) < 1e-4


def test_dropout_is_at_work(one_device, base, banks, wide_batch):
    fn, ((loss, _), _) = one_device
    (other, _), _ = fn(banks, base, wide_batch, jax.random.key(8))
    assert abs(other / loss - 1) > 1e-3
    (again, _), _ = fn(banks, base, wide_batch, jax.random.key(7))
    assert again == loss


def test_remat_draws_the_same_mask(one_device, base, banks, wide_batch):
    fn = compiled_gradient(Execution(remat="full"), specs=DROPPED)
    _agree(fn(banks, base, wide_batch, jax.random.key(7)), one_device[1])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices")
def test_eight_devices(one_device, base, banks, wide_batch):
    """Rows over data and fsdp, the base's kernels over fsdp."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))

    def shard(leaf):
        spec = P(None, "fsdp", None) if leaf.ndim == 3 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree.map(shard, base)
    kernel = spread["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 4, 20)
    whole = NamedSharding(mesh, P())
    execution = Execution(activations=NamedSharding(mesh, P(("data", "fsdp"), None, None)))
    assert (execution.row_shards, Execution().row_shards) == (8, 1)
    fn = compiled_gradient(execution, specs=DROPPED)
    got = fn(
        jax.device_put(banks, whole),
        spread,
        jax.device_put(wide_batch, rows),
        jax.device_put(jax.random.key(7), whole),
    )
    assert len(got[0][0].sharding.device_set) == 8
    _agree(got, one_device[1])
    assert rel(got[0][0], one_device[1][0][0]) < 1e-5
