"""Pallas TPU kernels, each with a reference in plain JAX and gradients of its own.

One convention holds for the whole room. Every public function takes `backend`:

| backend | what runs | where |
|---|---|---|
| `"xla"` | the reference twin in plain JAX, same arguments and results | anywhere |
| `"pallas"` | the Pallas kernel | TPU |
| `"interpret"` | the Pallas kernel in the TPU interpreter | CPU, in tests |

The caller chooses; no kernel looks at the machine it runs on, and none falls back. A shape that a
kernel cannot tile is a UserError when the function is traced. Blocks and values fit 48 MiB of the
64 that VMEM has on the smallest chip, a core of v5p; `lora_linear` is told what a device has
(`tiles.KernelMemory`). Kernels see one device: under a mesh, call them inside `jax.shard_map`.
"""
