"""The names of slices: all that mean one are one, and what is close to a wrong one."""

import math
import os
import subprocess
import sys

import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import slices
from medmoe_jax.parallel.slices import FAMILIES, Slice, parse

# By hand, from the pages of each chip: names, chips, hosts, Google Cloud's own name.
SAME = [
    (["v5litepod-16", "v5e-16", "v5e:4x4", "v5litepod:4x4"], 16, 4, "v5litepod-16"),
    (["v5litepod-8", "v5e-8", "v5e:2x4"], 8, 1, "v5litepod-8"),
    (["v6e-1", "v6e:1x1"], 1, 1, "v6e-1"),
    (["v6e-256", "v6e:16x16"], 256, 64, "v6e-256"),
    (["v5p-16", "v5p:2x2x2"], 8, 2, "v5p-16"),
    (["v5p-384", "v5p:4x4x12"], 192, 48, "v5p-384"),
    (["v5p-1536", "v5p:8x8x12"], 768, 192, "v5p-1536"),
    (["v5p-12288", "v5p:16x16x24"], 6144, 1536, "v5p-12288"),
    (["v4-8", "v4:2x2x1"], 4, 1, "v4-8"),
    (["v4-16", "v4:2x2x2"], 8, 2, "v4-16"),
    (["v7x-128", "tpu7x-128", "v7x:4x4x4", "tpu7x:4x4x4"], 64, 16, "tpu7x-128"),
    (["v7x-2", "v7x:1x1x1"], 1, 1, "tpu7x-2"),
]


@pytest.mark.parametrize(("names", "chips", "hosts", "cloud"), SAME)
def test_names_of_one_slice(names, chips, hosts, cloud):
    (one,) = {parse(name) for name in names}
    assert (one.chips, one.hosts, one.accelerator_type) == (chips, hosts, cloud)
    assert parse(one.name) == parse(one.accelerator_type) == one
    assert {parse(f"3x{name}") for name in names} == {one._replace(count=3)}
    assert parse(f"3x{names[0]}").name == f"3x{one.name}"


def test_every_slice_has_names_that_lead_back_to_it():
    for chip, family in FAMILIES.items():
        all_ = slices.layouts(chip)
        assert len(all_) == len(set(all_)) and {len(one.split("x")) for one in all_} == {
            2 if family.flat else 3
        }
        for layout in all_:
            one = Slice(chip, layout)
            assert parse(one.name) == one
            # The number stands for the most compact of the layouts that have it.
            named = parse(one.accelerator_type)
            assert named.chips == one.chips == math.prod(map(int, layout.split("x")))
            sides = [sum(map(int, it.layout.split("x"))) for it in (named, one)]
            assert sides[0] <= sides[1]
            assert one.hosts * (8 if family.flat else 4) >= one.chips <= family.most
    assert slices.layouts("v5p")[:7] == (
        "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("v5e:9x9", "v5e:8x8"),
        ("v5e-12", "v5e:2x4"),
        ("v5litepod-9999", "v5e:16x16"),
        ("v5p:2x2", "v5p:2x2x1"),
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v5p-6", "v5p:2x2x1"),
        ("V6E-16", "v6e:4x4"),
        ("tpu7-8", "v7x:2x2x1"),
        ("2xv5-16", "2xv5p:2x2x2"),
        ("0xv5e:2x2", "v5e:2x2"),
        ("v5e:0x0", "v5e:1x1"),
        ("v5e:x", "v5e:"),
        ("v5e:٣x3", "v5e:"),
        ("v5e", "v5e:"),
        ("v5e:2x2-4", ""),
        ("v5e-" + "9" * 5000, ""),
        ("v5e:" + "9" * 5000, "v5e:16x16"),
        ("v5e:4x4\n", ""),
        ("2x2", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_is_told_the_closest(name, closest):
    with pytest.raises(UserError) as caught:
        parse(name)
    said = str(caught.value)
    assert said.startswith(f"slice '{name}' is not known; the closest is {closest}")
    assert "chips are v4, v5e, v5litepod, v5p, v6e, v7x, tpu7x" in said
    near = said.removeprefix(f"slice '{name}' is not known; the closest is ").split(". ")[0]
    assert parse(near)


def test_a_shell_is_told_without_jax():
    """As the launcher asks: with a Python that has nothing installed."""
    words = [sys.executable, "-S", "-m", "medmoe_jax.parallel.slices"]
    env = {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(slices.__file__)))}
    told = subprocess.run([*words, "2xv5e-16"], env=env, capture_output=True, text=True, check=True)
    assert dict(line.split("=") for line in told.stdout.splitlines()) == {
        "NAME": "2xv5e:4x4", "LAYOUT": "4x4", "COUNT": "2", "CHIPS": "16", "HOSTS": "4",
        "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
        "ACCELERATOR": "tpu-v5-lite-podslice", "MACHINE": "ct5lp-hightpu",
    }  # fmt: skip
    assert slices.main(["v9"]) == 1
