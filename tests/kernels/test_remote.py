"""Rows by remote DMA on eight simulated devices, against a loop over parcels; no races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.remote import remote_exchange
from medmoe_jax.parallel import topology as topologies
from medmoe_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices")

DATA, EXPERT, N, MOST, D = 2, 4, 12, 7, 5
ROWS = EXPERT * MOST


def _parcels(rng):
    """Uneven parcels `[DATA, from, to]`: one device gets nothing, one all of a sender's rows."""
    count = np.zeros((DATA, EXPERT, EXPERT), np.int32)
    for d, p in np.ndindex(DATA, EXPERT):
        count[d, p] = rng.multinomial(N - p, [0.5, 0.25, 0.0, 0.25]).clip(0, MOST)
    count[1, 2] = (0, MOST, 0, 0)
    start = np.cumsum(count, axis=2) - count
    landing = np.broadcast_to(MOST * np.arange(EXPERT)[None, :, None], count.shape)
    return start.astype(np.int32), count, landing.astype(np.int32)


def _loop(x, start, count, landing):
    out = np.zeros((DATA, EXPERT, ROWS, D))
    for d, p, q in np.ndindex(DATA, EXPERT, EXPERT):
        n, a, b = count[d, p, q], start[d, p, q], landing[d, p, q]
        out[d, q, b : b + n] = x[d, p, a : a + n]
    return out


def test_rows_land_where_they_should_and_gradients_come_back():
    rng = np.random.default_rng(0)
    start, count, landing = _parcels(rng)
    x = rng.standard_normal((DATA, EXPERT, N, D)).astype(np.float32)
    weight = rng.standard_normal((DATA, EXPERT, ROWS, D)).astype(np.float32)
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(DATA, EXPERT),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
    )

    def local(x, weight, *parcels):
        parcels = [v[0, 0] for v in parcels]

        def loss(x):
            y = remote_exchange(x, parcels, ROWS, MOST, "expert", backend="interpret")
            return jnp.sum(y * weight[0, 0]), y

        grad, y = jax.grad(loss, has_aux=True)(x[0, 0])
        return y[None, None], grad[None, None]

    spec = P("data", "expert")
    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
    )
    got, grad = run(x, weight, start, count, landing, np.swapaxes(count, 1, 2))
    want = _loop(x, start, count, landing)
    assert np.array_equal(got, want.astype(np.float32))
    assert 0 < (want != 0).sum() < want.size
    back = np.zeros_like(x)
    for d, p, q in np.ndindex(DATA, EXPERT, EXPERT):
        n, a, b = count[d, p, q], start[d, p, q], landing[d, p, q]
        back[d, p, a : a + n] = weight[d, q, b : b + n]
    assert np.array_equal(grad, back)
    assert not interpret_pallas_call.races.races_found


def test_plain_jax_is_refused():
    with pytest.raises(UserError, match="'xla' is none of pallas, interpret"):
        parcels = [jnp.zeros(2, jnp.int32)] * 4
        remote_exchange(jnp.zeros((2, 2)), parcels, 2, 1, "expert", backend="xla")


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_for_tpu(name, dtype):
    topology = topologies.describe(name)
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}, topology.devices)

    def local(x, *parcels):
        def loss(x):
            y = remote_exchange(x, parcels, 4 * 256, 256, "expert", backend="pallas")
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss)(x)

    spec = P(("data", "expert"))
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    parcels = [shape((8 * 4,), jnp.int32)] * 4
    text = topologies.compile_for(topology, run, shape((8 * 512, 2048), dtype), *parcels).as_text()
    assert text.count("tpu_custom_call") >= 2
