"""What the search tries, and what it can tell of a candidate without compiling it."""

import jax
import pytest
from rich.console import Console

from configs import medcare
from medmoe_jax.base.config import site_shapes
from medmoe_jax.base.presets import preset
from medmoe_jax.cli.configs import load_config
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.topology import CHIPS, Topology
from medmoe_jax.planning import search
from medmoe_jax.planning.figures import Figures
from medmoe_jax.planning.programs import bytes_of, open_abstract, start, training
from medmoe_jax.planning.roofline import bound
from medmoe_jax.planning.search import Candidate, Compiled, SearchResult, candidates, estimate

HERE = Topology("here", CHIPS["v5e"], tuple(jax.devices()))
CHIP, BASE = HERE.chip, "qwen1.5-0.5b"


def config_of(rows=16, accumulation=1):
    config = medcare.get_config("qwen1.5-1.8b")
    config.base.path, config.base.preset = "", BASE
    config.data.length, config.data.global_batch = 1024, rows
    config.run.accumulation = accumulation
    return config


def test_candidates():
    found = list(candidates(config_of(), HERE))
    assert len(found) == len(set(found))
    meshes = {c.mesh for c in found}
    # Eight chips and sixteen heads: every way to cut eight in three.
    assert meshes == {
        (d, 8 // t // d, 1, 1, t) for t in (1, 2, 4, 8) for d in (1, 2, 4, 8) if 8 % (t * d) == 0
    }
    assert {c.accumulation for c in found if c.mesh == (1, 8, 1, 1, 1)} == {1, 2}
    assert {c.accumulation for c in found if c.mesh == (1, 1, 1, 1, 8)} == {1, 2, 4, 8, 16}
    assert {c.remat for c in found} == {"none", "dots", "full"}
    assert {c.mesh for c in candidates(config_of(rows=4), HERE)} == {
        m for m in meshes if 8 // m[4] <= 4
    }


def test_the_expert_axis_stays_and_heads_limit_tensor():
    config = config_of()
    config.run.mesh.expert = 2
    config.base.preset = "qwen2-0.5b"  # fourteen heads, two of keys and values
    assert {c.mesh for c in candidates(config, HERE)} == {
        (1, 4, 2, 1, 1), (2, 2, 2, 1, 1), (4, 1, 2, 1, 1), (1, 2, 2, 1, 2), (2, 1, 2, 1, 2),
    }  # fmt: skip
    config.run.mesh.update({"expert": 1, "sequence": 4})
    assert {c.mesh for c in candidates(config, HERE)} == {
        (1, 2, 1, 4, 1), (2, 1, 1, 4, 1), (1, 1, 1, 4, 2)
    }  # fmt: skip


@pytest.mark.parametrize("mesh", [{}, {"data": 1}, {"fsdp": -1}])
def test_axes_that_the_recipe_leaves_out_have_size_1(mesh):
    """As where it is trained."""
    config, named = config_of(rows=16), config_of(rows=16)
    config.run.mesh = mesh
    named.run.mesh.update({"expert": 1, "sequence": 1})
    found = list(candidates(config, HERE))
    assert found and found == list(candidates(named, HERE))
    meshes = [search._with(config, c).run.mesh for c in found]
    assert [tuple(m[axis] for axis in search.AXES) for m in meshes] == [c.mesh for c in found]


def estimated(mesh, accumulation, remat, rows=16):
    config = search._with(config_of(rows), Candidate(mesh, accumulation, remat))
    setup = open_abstract(config, HERE)
    at = start(setup, "aggregate")
    return estimate(setup, at, HERE), bytes_of(training(setup, at).arguments)


def test_estimates_against_sums_by_hand():
    decoder = preset(BASE)
    layer = sum(i * o for i, o in site_shapes(decoder).values())
    tokens, L, D, F = 2 * 1024, 24, 1024, 2816
    head = decoder.vocab_size * D
    floor = tokens * (4 * (L * layer + head) + 6 * L * D * 1024)

    full, held = estimated((1, 8, 1, 1, 1), 1, "full")
    assert full.gib * 2**30 == held + L * tokens * D * 2
    again = 2 * tokens * L * (layer - D * F)
    assert full.least == pytest.approx((floor + again) / 197e12)
    # Every chip receives 7/8 of the layers, forward and backward.
    gathered = 2 * L * layer * 2 * 7 / 8
    assert full.seconds == pytest.approx(max(full.least, gathered / 200e9), rel=1e-2)

    dots, _ = estimated((1, 8, 1, 1, 1), 1, "dots")
    assert dots.gib * 2**30 == held + L * tokens * (D + 4 * D + 2 * F) * 2
    assert dots.least == pytest.approx(floor / 197e12)

    halves, _ = estimated((1, 8, 1, 1, 1), 2, "dots")
    assert halves.least == pytest.approx(dots.least)
    assert halves.gib < dots.gib
    assert halves.seconds >= dots.seconds

    tensor, _ = estimated((1, 4, 1, 1, 2), 1, "dots")
    assert tensor.least == pytest.approx(dots.least)

    sequence, _ = estimated((1, 4, 1, 2, 1), 1, "dots")
    assert sequence.least == pytest.approx(dots.least)
    assert sequence.gib == pytest.approx(dots.gib, rel=1e-3)


def test_a_search_compiles_what_may_win(monkeypatch):
    """The compiler replaced by the estimate: the first is the best, slower ones are left out."""
    compiled, promised = [], []

    def measured(setup, topology, program):
        run = setup.config.run
        mesh = tuple(setup.mesh.shape.values())
        compiled.append((mesh, run.accumulation, run.remat))
        at = start(setup, "aggregate")
        seconds = estimate(setup, at, HERE).seconds
        promised.append(seconds)
        fits = len(compiled) > 1
        return Figures("train", fits, 9.0, 1.0, 1.0, bound=bound(CHIP, 197e12 * seconds, 0))

    monkeypatch.setattr(search, "measure", measured)
    lines = []
    # Eight devices do not divide into the recipe's own micro-batches: the search has others.
    result = search.search(config_of(rows=8, accumulation=8), HERE, "", 3, lines.append)
    assert len(compiled) == len(result.found) <= 3
    others = set(candidates(config_of(rows=8), HERE)) - {Candidate(*one) for one in compiled}
    possible = [estimated(*one, rows=8)[0] for one in others]
    assert promised == sorted(promised)
    assert promised[-1] <= min(one.seconds for one in possible if one.gib < CHIP.limit_gib)
    assert not result.found[-1].figures.fits and result.found[0].figures.fits
    # Each is told of before it is compiled, and what was found right after.
    assert len(lines) == 1 + 2 * len(compiled)
    assert lines[2] == "  does not fit: 9.00 of 15.75 GiB"
    seconds = next(f for f in result.found if f.figures.fits).figures.bound.seconds
    assert f"{1e3 * seconds:.2f} ms by products" in "".join(lines[4::2])
    total = len(list(candidates(config_of(rows=8), HERE)))
    assert len(compiled) + result.too_large + result.too_slow + result.left == total
    assert result.too_slow > 0


@pytest.mark.parametrize("sizes", [{"sequence": -1}, {"sequence": 3}, {"expert": 4, "sequence": 4}])
def test_axes_that_stay_have_to_divide_the_chips(sizes):
    config = config_of(rows=8)
    config.run.mesh.update(sizes)
    with pytest.raises(UserError, match=r"the search keeps expert \d and sequence .* the 8 chips"):
        search.search(config, HERE, "", 1)


def test_rows_that_no_mesh_divides():
    config = config_of(rows=3)
    config.run.mesh.expert = 2
    with pytest.raises(UserError, match="3 rows divide over no mesh of 8 chips"):
        search.search(config, HERE, "", 1)


def test_the_flags_run_the_recipe_in_the_candidates_way():
    words = ["--config=medcare:qwen1.5-1.8b", "--config.run.mesh.expert=2"]
    for one in list(candidates(load_config(words), HERE))[::7]:
        run = load_config([*words, *search.flags(one)]).run
        assert tuple(run.mesh[axis] for axis in search.AXES) == one.mesh
        assert (run.accumulation, run.remat) == (one.accumulation, one.remat)


def test_the_table_and_the_json_say_the_same():
    fits = Figures("train", True, 9.0, 1.0, 1.0, bound=bound(CHIP, 197e12, 0))
    not_ = Figures("train", False, 20.0, 1.0, 1.0)
    one = Candidate((1, 8, 1, 1, 1), 2, "dots")
    result = SearchResult(
        (Compiled(one, fits), Compiled(one._replace(remat="none"), not_)), 5, 6, 7
    )
    figures = search.as_json(result, 4000)
    assert figures["candidates"][0]["tokens_per_second_bound"] == pytest.approx(4000)
    assert figures["candidates"][1] == {
        "mesh": {"data": 1, "fsdp": 8, "expert": 1, "sequence": 1, "tensor": 1},
        "accumulation": 2, "remat": "none", "fits": False, "hbm_gib": 20.0,
        "flags": [
            "--config.run.mesh.data=1", "--config.run.mesh.fsdp=8", "--config.run.mesh.tensor=1",
            "--config.run.accumulation=2", "--config.run.remat=none",
        ],
    }  # fmt: skip
    assert figures["not_compiled"] == {"too_large": 5, "too_slow": 6, "left": 7}
    table = search.table(result, HERE, 4000)
    assert len(table.rows) == 2 and "5 too large" in table.caption
    with (console := Console(width=80)).capture() as shown:
        console.print(table)
    printed = shown.get()
    assert "fastest on here, by bound, in 15.75 GiB" in printed
    assert " fsdp 8 " in printed and " 1000.00 " in printed and "does not fit" in printed
    assert "…" not in printed
