"""A program compiled for a slice, and what one chip of it holds, computes, moves and waits for."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from medmoe_jax.errors import field_names
from medmoe_jax.mesh_axes import SEQUENCE, TENSOR
from medmoe_jax.parallel.mesh import batch_shards, slice_of
from medmoe_jax.parallel.room import beside_arguments, compiler_recomputes
from medmoe_jax.parallel.topology import Topology, compile_for
from medmoe_jax.planning import hlo
from medmoe_jax.planning.attention import AttentionShape, splash_costs
from medmoe_jax.planning.hlo import Traffic
from medmoe_jax.planning.programs import Program, bytes_of
from medmoe_jax.planning.roofline import Bound, bound
from medmoe_jax.training.setup import Setup

GIB = 2**30
_UNKNOWN = Bound(0.0, 0.0, 0.0, 0.0)
# What the compiler says of a program that does not fit, or of its temporaries alone.
_TOO_LARGE = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+. hbm|\))")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True)
class Figures:
    """What one program takes, on one chip and in one step; memory in GiB, time in seconds.

    Attributes:
      name: the program's.
      fits: whether the compiler found room; without it nothing but memory is known.
      hbm: arguments, results that are not donated arguments, temporaries and code at once.
      arguments, temporaries: GiB.
      flops, bytes: those of products and kernels; those to and from HBM.
      collectives: by kind.
      bound: the least time of each resource.
      unknown: kernels of unknown FLOPs.
      compile_seconds: on this machine.
      recomputed: whether the compiler computes values twice to make it fit.
    """

    name: str
    fits: bool
    hbm: float
    arguments: float
    compile_seconds: float
    temporaries: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, Traffic] = field(default_factory=dict)
    bound: Bound = _UNKNOWN
    unknown: tuple[str, ...] = ()
    recomputed: bool = False


def measure(setup: Setup, topology: Topology, program: Program) -> Figures:
    """Compile a program and count it.

    Raises:
      UserError: attention or a kernel cannot run these shapes.
      JaxRuntimeError: the compiler fails for another reason than want of memory.
    """
    arguments = bytes_of(program.arguments) / GIB
    start = time.monotonic()
    try:
        with field_names("run."):
            compiled = compile_for(topology, program.function, *program.arguments)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_gib(str(error))
        if needed is None:
            raise
        return Figures(program.name, False, needed, arguments, time.monotonic() - start)
    seconds = time.monotonic() - start
    slices = len(set(map(slice_of, topology.devices)))
    kernels = _splash(setup, program)
    text, sizes = compiled.as_text(), compiled.memory_analysis()
    if text is None or sizes is None:
        raise RuntimeError("the compiler tells neither its program nor what memory that takes")
    counts = hlo.count(text, kernels, slices, program.turns)
    links = {
        kind: Traffic(*(program.times * value for value in traffic))
        for kind, traffic in counts.collectives.items()
    }
    flops, memory = program.times * counts.flops, program.times * counts.bytes
    ici, dcn = (sum(getattr(t, link) for t in links.values()) for link in ("ici", "dcn"))
    return Figures(
        program.name,
        True,
        (sizes.argument_size_in_bytes + beside_arguments(sizes)) / GIB,
        arguments,
        seconds,
        sizes.temp_size_in_bytes / GIB,
        flops,
        memory,
        links,
        bound(topology.chip, flops, memory, ici, dcn),
        counts.unknown,
        compiler_recomputes(text),
    )


def needed_gib(message: str) -> float | None:
    """What a program needs at least, from the compiler's refusal; None if that is another one."""
    found = _TOO_LARGE.search(message)
    return float(found[1]) * _UNITS[found[2].upper()] / GIB if found else None


def _splash(setup: Setup, program: Program) -> dict[str, hlo.Cost]:
    """Attention's kernels on one device's rows and heads."""
    decoder, tensor = setup.base.config, setup.mesh.shape[TENSOR]
    cut = tensor if decoder.n_kv_heads % tensor == 0 else 1
    rows = program.rows // batch_shards(setup.mesh)
    itemsize = jnp.dtype(setup.dtype).itemsize
    heads, groups = decoder.n_heads // cut, decoder.n_kv_heads // cut
    parts = setup.mesh.shape[SEQUENCE]
    shape = AttentionShape(rows, program.length, heads, groups, decoder.head_dim, itemsize, parts)
    return splash_costs(shape, decoder.windows)
