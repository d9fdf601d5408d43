"""What a run of the splash attention kernels costs, of which XLA knows nothing.

Axes: B rows, T tokens, H heads, h head dimension, all of one device.
Under a causal mask n (n + 1) / 2 of the n² pairs of blocks are visited; of the devices that share a
row, the one with its end has the most of them. A pair makes two products forward, four for the
gradients of keys and values, three for that of the queries; the two arrays that move along pairs
are fetched once a pair, the others once: a device's own queries, and the keys of the whole row.
Windows are not looked at.
"""

from __future__ import annotations

from medmoe_jax.planning.hlo import Cost

BLOCK = 128  # queries, and keys, of a block: the kernels' own default
# Kernel -> products a pair; arrays of a head that move once, as long as queries and as keys.
_KERNELS = {
    "splash_mha_fwd_segmented_residuals": (2, 2, 0),
    "splash_mha_fwd_segmented_no_residuals": (2, 2, 0),
    "splash_mha_dkv_segmented_no_residuals": (4, 0, 4),
    "splash_mha_dq_segmented_no_residuals": (3, 3, 0),
}


def splash_costs(B: int, T: int, H: int, h: int, itemsize: int, parts: int = 1) -> dict[str, Cost]:
    """The cost of one run of each kernel, by its name.

    Args:
      B, T, H, h: see the module.
      itemsize: bytes of a number.
      parts: devices that share a row's queries.
    """
    n = -(-T // BLOCK)
    before = n - n // parts  # blocks of queries of the other devices
    pairs = (n * (n + 1) - before * (before + 1)) // 2
    return {
        name: Cost(
            B * H * pairs * products * 2 * BLOCK * BLOCK * h,
            B * H * (pairs * 2 * BLOCK + queries * T // parts + keys * T) * h * itemsize,
        )
        for name, (products, queries, keys) in _KERNELS.items()
    }
