"""Two processes that hold half a model each write it together: the first one writes for both."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.checkpoints.peft_export import save_peft
from tests import naive, quick
from tests.naive import TINY
from tests.several import free_port

SPECS = (
    BankSpec("attention", ("attn.q", "attn.o"), 0, 3, rank=4),
    BankSpec("knowledge", ("mlp.up", "mlp.down"), 1, 2, experts=2, rank=4),
)
PROGRAM = """
import sys
import jax
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from pathlib import Path
import numpy as np
from medmoe_jax.checkpoints import files
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import RULES, shardings
from tests.checkpoints.test_export_processes import export, model

def place(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
trees = [jax.tree.map(place, tree, shardings(tree, mesh, RULES)) for tree in model()]
assert not trees[0]["layers"]["mlp"]["up"]["kernel"].is_fully_addressable
export(Path(folder), *trees)

def full(*_, **__):
    raise OSError(28, "No space left on device")

if index == 0:
    files.save_file = full
try:
    export(Path(folder) / "second", *trees)
except UserError as error:
    print(error)
"""


def model():
    """`(base, banks)` of every process alike."""
    return naive.random_params(TINY), naive.random_banks(SPECS, TINY)


def export(folder, base, banks):
    """Both formats, the model in several files."""
    members = [(spec, banks[spec.name]) for spec in SPECS]
    save_hf(folder / "hf", TINY, base, "llama", members=members, max_shard_bytes=10_000)
    save_peft(folder / "peft", TINY, "llama", members)


@pytest.mark.processes
def test_two_processes_write_one_model(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "two"), str(port), str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": quick.flags(4)},
        )
        for index in range(2)
    ]
    try:
        answers = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, answers, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert out.count("hf: cannot be written") == 1 and "No space left on device" in out
    assert not (tmp_path / "two" / "second").exists()
    export(tmp_path / "one", *model())
    for kind in ("hf", "peft"):
        one, two = (sorted((tmp_path / n / kind).iterdir()) for n in ("one", "two"))
        assert [path.name for path in one] == [path.name for path in two]
        assert len(list((tmp_path / "two" / "hf").glob("*.safetensors"))) > 2
        for a, b in zip(one, two, strict=True):
            if a.suffix == ".json":
                assert a.read_text() == b.read_text()
                continue
            a, b = load_file(a), load_file(b)
            assert a.keys() == b.keys()
            for name, x in a.items():
                np.testing.assert_allclose(b[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
