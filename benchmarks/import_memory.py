"""Host memory that loading a Hugging Face directory takes, over the bytes of the loaded base.

  python benchmarks/import_memory.py            # a random Qwen2-1.5B directory, 3.1 GB on disk
  python benchmarks/import_memory.py --small    # 0.4 GB in floats, for continuous integration

Every case runs in a process of its own, on 1 or 8 simulated CPU devices, whose memory *is* host
memory. From outside, the parent samples the child's anonymous and shared memory (RssAnon + RssShmem
of /proc/PID/status); mapped file pages are left out, because the kernel drops them when memory is
short (so VmHWM, which counts them, would not do). What the imports take is subtracted. The table is
also written as JSON; a ratio above 1.3 is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medmoe_jax.storage.places import local

LIMIT = 1.3
KINDS = ("", "int8", "nf4")
RESULTS = Path(__file__).parent / "results"


def write_checkpoint(folder: Path, small: bool) -> None:
    """A random bfloat16 Qwen2 checkpoint, written a few tensors at a time."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from medmoe_jax.base.presets import preset
    from medmoe_jax.checkpoints import families
    from medmoe_jax.checkpoints.files import write_json

    config = preset("qwen2-1.5b")
    if small:
        config = config.replace(n_layers=12, d_model=1024, n_heads=8, d_ff=4096, vocab_size=20000)
    rng = np.random.default_rng(0)
    write_json(folder / "config.json", families.config_to_hf(config, "qwen2"))
    weight_map: dict[str, str] = {}
    tensors = list(families.tensors(config, "qwen2"))
    for first in range(0, len(tensors), 12):
        name = f"model-{first:05d}.safetensors"
        part = {}
        for tensor in tensors[first : first + 12]:
            # Random signs and mantissas, magnitudes from 2^-7 to 2^-5.
            bits = rng.integers(0, 2**16, tensor.shape, np.uint16) & 0x80FF | 0x3C00
            part[tensor.name] = bits.view(ml_dtypes.bfloat16)
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def load(folder: str, kind: str) -> None:
    """The child: report when the imports are done, load, report the base's bytes."""
    import jax
    import jax.numpy as jnp

    from medmoe_jax.checkpoints.bases import open_base
    from medmoe_jax.parallel.mesh import make_mesh
    from medmoe_jax.parallel.rules import BASE_RULES, shardings

    print(json.dumps({"imported": True}), flush=True)
    sys.stdin.readline()
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    base = open_base(folder, "", {}, 0, kind)
    start = time.perf_counter()
    params = base.load(jnp.bfloat16, shardings(base.abstract(jnp.bfloat16), mesh, BASE_RULES))
    jax.block_until_ready(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"base_bytes": size, "seconds": time.perf_counter() - start}), flush=True)


def resident(pid: int) -> int:
    """Anonymous and shared bytes of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields.get(key, "0").split()[0]) for key in ("RssAnon", "RssShmem"))


def measure(folder: Path, devices: int, kind: str) -> dict:
    """One case in a child process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", str(folder), kind],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    json.loads(child.stdout.readline())
    before = peak = resident(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    while child.poll() is None:
        peak = max(peak, resident(child.pid))
        time.sleep(0.002)
    if child.returncode:
        sys.exit(f"the child for {devices} devices, '{kind}' failed")
    report = json.loads(child.stdout.readline())
    return {
        "devices": devices,
        "quantise": kind or "bfloat16",
        "base_gb": report["base_bytes"] / 1e9,
        "imports_gb": before / 1e9,
        "peak_gb": (peak - before) / 1e9,
        "ratio": (peak - before) / report["base_bytes"],
        "seconds": report["seconds"],
    }


def main() -> None:
    """Write the checkpoint, measure every case, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a base of 0.4 GB, in floats only")
    parser.add_argument("--output", type=local, default=None, help="JSON file of the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        load(*args.child)
        return
    rows = []
    print("devices  kernels    base GB  peak GB  ratio  seconds")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.small)
        # On a small base, what compilation takes would weigh more than a quantised base itself.
        kinds = KINDS[:1] if args.small else KINDS
        for devices, kind in itertools.product((1, 8), kinds):
            row = measure(Path(folder), devices, kind)
            rows.append(row)
            print(
                f"{devices:7d}  {row['quantise']:9s}  {row['base_gb']:7.3f}  "
                f"{row['peak_gb']:7.3f}  {row['ratio']:5.2f}  {row['seconds']:7.1f}",
                flush=True,
            )
    name = "import_memory_small.json" if args.small else "import_memory.json"
    output = args.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"limit": LIMIT, "cases": rows}, indent=2) + "\n")
    worst = max(row["ratio"] for row in rows)
    if worst > LIMIT:
        sys.exit(f"{worst:.2f} times the base's bytes exceeds {LIMIT}")


if __name__ == "__main__":
    main()
