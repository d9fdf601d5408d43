"""The counter against products counted by hand, and against XLA where that has no loop to miss."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medmoe_jax.planning import hlo
from medmoe_jax.planning.hlo_text import arrays_of

pytestmark = pytest.mark.shipped

N, D, F = 48, 64, 96


def _text(fn, *shapes, **jit):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(fn, **jit).lower(*args).compile().as_text()


def _count(fn, *shapes, **jit):
    return hlo.count(_text(fn, *shapes, **jit))


def _product(n, d, f):
    return 2 * n * d * f


def test_types():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[], s4[5]{0:S(2)}, token[])"
    a, b, c, d = arrays_of(text)
    assert (a.shape, a.bytes, a.on_chip) == ((2, 3), 12, True)
    assert (b.shape, b.bytes, b.on_chip) == ((), 1, False)
    assert (c.shape, c.bytes, c.on_chip) == ((5,), 3, True)
    assert d.bytes == 0


def test_product():
    counts = _count(jnp.matmul, (N, D), (D, F))
    assert counts.flops == _product(N, D, F)
    assert counts.bytes == 4 * (N * D + D * F + N * F)
    assert counts.largest.shape == (N, F) and counts.largest.bytes == 4 * N * F
    assert counts.unknown == () and counts.collectives == {}


def test_batched_product():
    counts = _count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, N, D), (5, D, F))
    assert counts.flops == 5 * _product(N, D, F)


@pytest.mark.parametrize("strides, padding", [((1, 1), "SAME"), ((2, 1), "VALID")])
def test_convolution_leaves_its_padding_out(strides, padding):
    def fn(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=dims)

    text = _text(fn, (2, 9, 8, 3), (3, 2, 3, 5))
    if " convolution(" not in text:
        pytest.skip("compiled to something else")
    rows = {"SAME": 3 * 9 - 2, "VALID": 3 * 4}[padding]
    columns = {"SAME": 2 * 8 - 1, "VALID": 2 * 7}[padding]
    assert hlo.count(text).flops == 2 * 2 * 5 * 3 * rows * columns


def _stack(x, w_LxDxD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LxDxD)[0]


def test_loop_counts_its_trips_and_reads_a_slice_a_turn():
    L = 20
    counts = _count(_stack, (N, D), (L, D, D))
    assert counts.flops == L * _product(N, D, D)
    once = hlo.count(_text(lambda x, w: jnp.tanh(x @ w), (N, D), (D, D))).bytes
    assert counts.bytes < 3 * L * once
    assert counts.bytes < 0.5 * L * (4 * L * D * D)  # the whole stack a turn would be more


def test_nested_loops():
    def outer(x, w):
        return jax.lax.scan(lambda x, _: (_stack(x, w), None), x, None, length=5)[0]

    assert _count(outer, (N, D), (3, D, D)).flops == 15 * _product(N, D, D)


def test_loop_whose_trips_the_compiler_does_not_say():
    text = _text(_stack, (N, D), (6, D, D)).replace("known_trip_count", "nothing")
    counts = hlo.count(text)
    assert counts.flops == 6 * _product(N, D, D) and counts.unknown == ()


def test_loop_that_depends_on_data_is_named():
    def fn(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 3.0, lambda x: x @ w, x)

    counts = _count(fn, (N, D), (D, D))
    assert counts.flops == _product(N, D, D) and len(counts.unknown) == 1
    assert hlo.count(_text(fn, (N, D), (D, D)), turns=7).flops == 7 * _product(N, D, D)


def test_remat_counts_the_work_done_twice():
    def loss(remat, x, w):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w)) if remat else _plain
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0])

    def _plain(x, w):
        return jnp.tanh(x @ w)

    shapes = ((N, D), (4, D, D))
    plain, again = (
        _count(jax.grad(functools.partial(loss, remat), argnums=(0, 1)), *shapes).flops
        for remat in (False, True)
    )
    assert plain == 4 * 3 * _product(N, D, D)
    assert again == 4 * 4 * _product(N, D, D)


def test_dearest_branch():
    def fn(p, x, w):
        return jax.lax.cond(p[0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert _count(fn, (1,), (N, D), (D, D)).flops == 2 * _product(N, D, D)


def test_gather_and_update_count_what_they_touch():
    table, rows = (10_000, D), (8, D)
    gathered = _count(lambda t, i: t[i.astype(jnp.int32)], table, (8,))
    assert gathered.bytes < 20 * 4 * 8 * D
    updated = _count(
        lambda t, u: jax.lax.dynamic_update_slice(t, u, (5, 0)), table, rows, donate_argnums=0
    )
    assert updated.bytes < 20 * 4 * 8 * D


@pytest.mark.parametrize("case", ["mlp", "attention", "norm"])
def test_as_xla_counts_a_program_without_loops(case):
    """FLOPs up to elementwise work, bytes up to what is read more than once."""

    def mlp(x, w, v):
        return (jax.nn.silu(x @ w) * (x @ w)) @ v

    def attention(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    def norm(x, w, v):
        return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))) @ w @ v

    n = 256
    fn = {"mlp": mlp, "attention": attention, "norm": norm}[case]
    args = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * 3
    compiled = jax.jit(jax.grad(lambda *a: jnp.sum(fn(*a) ** 2), argnums=(0, 1, 2)))
    compiled = compiled.lower(*args).compile()
    ours, theirs = hlo.count(compiled.as_text()), compiled.cost_analysis()
    assert ours.flops == pytest.approx(theirs["flops"], rel=0.03)
    assert ours.bytes == pytest.approx(theirs["bytes accessed"], rel=0.15)


def _sharded(fn, spec_in, spec_out, n):
    mesh = Mesh(jax.devices()[:8], ("x",))
    placed = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=NamedSharding(mesh, spec_in))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)
    return hlo.count(jax.jit(mapped).lower(placed).compile().as_text()).collectives


ROWS, WHOLE = PartitionSpec("x"), PartitionSpec()
# Function, specs, the larger side and what a device receives, both as shares of the whole.
COLLECTIVES = {
    "all-gather": (lambda v: jax.lax.all_gather(v, "x", tiled=True), ROWS, WHOLE, 1, 7 / 8),
    "all-reduce": (lambda v: jax.lax.psum(v, "x"), ROWS, WHOLE, 1 / 8, 2 * 7 / 64),
    "reduce-scatter": (lambda v: jax.lax.psum_scatter(v, "x", tiled=True), WHOLE, ROWS, 1, 7 / 8),
    "all-to-all": (
        lambda v: jax.lax.all_to_all(v, "x", 0, 0, tiled=True),
        ROWS,
        ROWS,
        1 / 8,
        7 / 64,
    ),
    "collective-permute": (
        lambda v: jax.lax.ppermute(v, "x", [(i, (i + 1) % 8) for i in range(8)]),
        ROWS,
        ROWS,
        1 / 8,
        1 / 8,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives(kind):
    fn, spec_in, spec_out, share, received = COLLECTIVES[kind]
    size = 4 * 1024
    want = {kind: hlo.Traffic(1, size * share, size * received, 0)}
    assert _sharded(fn, spec_in, spec_out, 1024) == want


def test_collectives_in_a_loop():
    def fn(v):
        return jax.lax.scan(lambda v, _: (jax.lax.psum(v, "x") * 0.1, None), v, None, length=6)[0]

    assert _sharded(fn, ROWS, ROWS, 1024)["all-reduce"] == hlo.Traffic(
        6, 6 * 4 * 128, 6 * 2 * 4 * 128 * 7 / 8, 0
    )


KERNEL = """HloModule jit_f

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %c = f32[8,128]{1,0:T(8,128)S(1)} copy(%x)
  ROOT %ours.3 = f32[8,128]{1,0:T(8,128)} custom-call(%x, %c), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a": "b"
}}, backend_config={"custom_call_config":{"body":"TUz"COST}}
}
"""  # noqa: E501


def test_kernels():
    size = 4 * 8 * 128
    bare = hlo.count(KERNEL.replace("COST", ""))
    assert bare.unknown == ("ours",) and bare.flops == 0
    assert bare.bytes == size + 2 * size  # the copy's read; the kernel's, but for on-chip memory
    # x twice, c in on-chip memory thrice, the result once.
    claim = (
        f',"cost_estimate":{{"flops":"500","transcendentals":"0","bytes_accessed":"{6 * size}"}}'
    )
    claimed = hlo.count(KERNEL.replace("COST", claim))
    assert (claimed.flops, claimed.bytes, claimed.unknown) == (500, size + (6 - 1) * size, ())
    in_main = hlo.count(KERNEL.replace("COST", claim).replace("S(1)", ""))
    assert in_main.bytes == 2 * size + 6 * size
    partly = hlo.count(KERNEL.replace("COST", claim.replace(str(6 * size), "70")))
    assert partly.bytes == size
    told = hlo.count(KERNEL.replace("COST", claim), {"ours": hlo.Cost(9, 3)})
    assert (told.flops, told.bytes) == (9, size + 3)


TWO_SLICES = """HloModule jit_f, num_partitions=4

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%x, %after-all.1), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), is_host_transfer=true
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all.1), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done.1 = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv.1), is_host_transfer=true
  ROOT %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%recv-done.1), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize("slices", [2, 4])
def test_what_slices_exchange(slices):
    size = 4 * 8 * 128
    counts = hlo.count(TWO_SLICES, slices=slices)
    dcn = 2 * size * (slices - 1) / slices
    assert counts.collectives == {"all-reduce": hlo.Traffic(1, size, 0, dcn)}
    assert counts.bytes == 2 * size  # read to be sent, written when received


PIECES = """HloModule jit_f, num_partitions=4

%start (p: f32[64]) -> (f32[64], f32[256]) {
  %p = f32[64]{0} parameter(0)
  %all-gather.1 = f32[256]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %begun = (f32[64]{0}, f32[256]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: f32[64], w: f32[256]) -> (f32[64], f32[256]) {
  %p = f32[64]{0} parameter(0)
  %w = f32[256]{0} parameter(1)
  %all-gather.2 = f32[256]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %both = (f32[64]{0}, f32[256]{0}) tuple(%p, %all-gather.2)
}

%done (p: f32[64], w: f32[256]) -> f32[256] {
  %p = f32[64]{0} parameter(0)
  %w = f32[256]{0} parameter(1)
  %all-gather.3 = f32[256]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %ended = f32[256]{0} custom-call(%p, %w, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.4 (q: f32[256]) -> f32[64] {
  %q = f32[256]{0} parameter(0)
  %all-reduce.9 = f32[256]{0} all-reduce(%q), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = f32[64]{0} dynamic-slice(%all-reduce.9, %zero), dynamic_slice_sizes={64}
}

ENTRY %main (x: f32[64], y: f32[8]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %async-collective-start = (f32[64]{0}, f32[256]{0}) fusion(%x), kind=kCustom, calls=%start
  %x.1 = f32[64]{0} get-tuple-element(%async-collective-start), index=0
  %w.1 = f32[256]{0} get-tuple-element(%async-collective-start), index=1
  %fusion.7 = (f32[64]{0}, f32[256]{0}) fusion(%x.1, %w.1), kind=kOutput, calls=%async_collective_fusion.7
  %x.2 = f32[64]{0} get-tuple-element(%fusion.7), index=0
  %w.2 = f32[256]{0} get-tuple-element(%fusion.7), index=1
  %async-collective-done = f32[256]{0} fusion(%x.2, %w.2), kind=kCustom, calls=%done
  %all-reduce.5 = f32[8]{0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-reduce.6 = f32[64]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[64]{0} fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.4
}
"""  # noqa: E501


def test_collectives_in_pieces_and_others_of_the_same_channel():
    """A gather in three fusions is one; two sums are two; a sum of which a part is used is less."""
    assert hlo.count(PIECES).collectives == {
        "all-gather": hlo.Traffic(1, 1024, 1024 * 3 / 4, 0),
        "all-reduce": hlo.Traffic(2, 288, 2 * 288 * 3 / 4, 0),
        "reduce-scatter": hlo.Traffic(1, 1024, 1024 * 3 / 4, 0),
    }


# A slice of bytes whose tiles are read in another form, and one of an array that is copied first.
FORMS = """\
HloModule forms, is_scheduled=true

%form (input: s8[32,128]) -> s8[32,128] {
  %input = s8[32,128]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %same = s8[32,128]{1,0:T(8,128)(4,1)} copy(%input)
}

%slice (p: s8[32,128], i: s32[]) -> s8[1,128] {
  %p = s8[32,128]{1,0:T(32,128)(4,1)} parameter(0)
  %fusion.1 = s8[32,128]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, ALIAS calls=%form
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = s8[1,128]{1,0} dynamic-slice(%fusion.1, %i, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (x: s8[32,128], i: s32[]) -> s8[1,128] {
  %x = s8[32,128]{1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = s8[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice
}
"""


@pytest.mark.parametrize(
    ("alias", "read"),
    [("output_to_operand_aliasing={{}: (0, {})},", 128), ("", 32 * 128)],
    ids=["the same bytes", "another array"],
)
def test_a_slice_of_an_array_in_another_form(alias, read):
    assert hlo.count(FORMS.replace("ALIAS", alias)).bytes == read + 4 + 128


@pytest.mark.parametrize("name", ["ours.3", "ours", "ours.3.clone.remat2", "ours.3.rows_ref"])
def test_a_kernel_is_known_by_its_name(name):
    """Behind it stand numbers, and from JAX 0.11 on whose operand the result is."""
    text = KERNEL.replace("COST", "").replace("%ours.3", f"%{name}")
    counts = hlo.count(text, {"ours": hlo.Cost(7, 9)})
    assert counts.flops == 7 and counts.unknown == ()
