"""What the published recipes take on TPU slices: `medmoe plan` over sizes, slices and experts.

  python benchmarks/scaling.py                       # what benchmarks/results/scaling.json lacks
  python benchmarks/scaling.py --only=weak --seconds=500
  python benchmarks/scaling.py --seconds=0           # nothing compiled: shapes only, and the tables

A case takes a minute or two on one core. Nothing is measured here: every figure is counted in a
program compiled for a slice that is not there. Of a case that is not compiled yet the tables show
what its shapes say: arguments, the memory and the time that it needs at least. They are written
into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

from benchmarks import pages
from medmoe_jax.cli.configs import load_config
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.topology import describe
from medmoe_jax.planning.figures import GIB
from medmoe_jax.planning.programs import bytes_of, open_abstract, start, training
from medmoe_jax.planning.search import estimate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
CHIPS = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16, "v5e:8x8": 64}
CHIPS |= {"v5e:16x16": 256, "v5p:4x4x4": 64, "v6e:16x16": 256, "2xv5e:4x4": 32}
# 64 divides the widths of all these models, 256 those of some.
LARGE = {"v5p:4x4x4": (), "v6e:16x16": ("run.mesh.data=4", "run.mesh.fsdp=64")}
EXPERTS = (8, 64, 512, 4096)
MEDCARE = ("14b", "1.8b", "4b", "7b")
APOLLO = ("0.5b", "1.5b", "7b")


class Case(NamedTuple):
    """One run of `medmoe plan`.

    Attributes:
      section: the table it belongs to.
      config: file and argument, under configs/.
      topology: the slice.
      fields: of the configuration, set.
      everything: the frozen step, scoring and generation are compiled beside it.
    """

    section: str
    config: str
    topology: str
    fields: tuple[str, ...] = ()
    everything: bool = False

    @property
    def key(self) -> str:
        """Its name in the results."""
        return " ".join((self.config, self.topology, *self.fields))

    def configuration(self) -> list[str]:
        """The configuration's arguments: a row of 2,048 tokens a chip, and the fields."""
        fields = {"data.length": "2048", "data.global_batch": str(CHIPS[self.topology])}
        fields |= {"run.accumulation": "1"} | dict(f.split("=", 1) for f in self.fields)
        fields |= {"data.shards": fields["data.global_batch"]}
        config = [f"--config.{name}={value}" for name, value in fields.items()]
        return [f"--config={ROOT / 'configs' / self.config}", *config]


def _medcare(size: str, topology: str, *fields: str, section: str = "medcare") -> Case:
    return Case(section, f"medcare.py:qwen1.5-{size}", topology, fields)


def _experts(number: int) -> Case:
    fields = (f"stages.mixture.banks.experts.experts={number}", "run.dispatch=all_to_all")
    mesh = ("run.mesh.fsdp=2", "run.mesh.expert=8")
    return Case("experts", "ming_moe.py:qwen1.5-1.8b", "v5e:4x4", (*fields, *mesh))


def _long(size: str, length: int, rows: int, fsdp: int, sequence: int) -> Case:
    mesh = (f"run.mesh.fsdp={fsdp}", f"run.mesh.sequence={sequence}")
    fields = (f"data.length={length}", f"data.global_batch={rows}", *mesh)
    return _medcare(size, "v5e:4x4", *fields, section="long")


CASES = (
    _medcare("14b", "v5e:4x4"),
    Case("small", "medcare.py:qwen1.5-7b", "v5e:2x4", everything=True),
    _medcare("1.8b", "v5e:1x1", section="small"),
    _medcare("7b", "v5e:1x1", "base.quantise=int8", section="small"),
    *(_medcare(size, "v5e:4x4") for size in MEDCARE[1:]),
    *(Case("apollo", f"apollo_moe.py:qwen2-{size}", "v5e:4x4") for size in APOLLO),
    *(_experts(number) for number in EXPERTS),
    *(_medcare("1.8b", t, section="weak") for t in ("v5e:2x2", "v5e:8x8", "v5e:16x16")),
    _medcare("1.8b", "2xv5e:4x4", "run.mesh.data=2", section="weak"),
    *(_medcare(size, t, *mesh) for t, mesh in LARGE.items() for size in MEDCARE),
    *(
        Case("apollo", f"apollo_moe.py:qwen2-{size}", t, mesh)
        for t, mesh in LARGE.items()
        for size in APOLLO
    ),
    _medcare("14b", "v6e:16x16", section="undivided"),
    _long("1.8b", 8192, rows=4, fsdp=4, sequence=4),
    _long("1.8b", 32768, rows=1, fsdp=1, sequence=16),
    _long("1.8b", 32768, rows=16, fsdp=16, sequence=1),
    _long("14b", 32768, rows=1, fsdp=1, sequence=16),
    _long("14b", 32768, rows=4, fsdp=4, sequence=4),
)


def compile_case(case: Case, limit: float) -> dict | None:
    """The figures of a case, or what the command said; None if it took too long."""
    out = RESULTS.with_suffix(f".{os.getpid()}.json")
    command = [sys.executable, "-m", "medmoe_jax.cli.main", "plan", f"--json={out}"]
    command += [f"--topology={case.topology}", *case.configuration()]
    command += ["--all"] if case.everything else []
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    figures = json.loads(out.read_text())
    out.unlink()
    return figures


def compile_missing(sections: set[str], seconds: float) -> None:
    """Compile the cases of some sections that are not in the results, while there is time."""
    end = time.monotonic() + seconds
    for case in CASES:
        results = load()
        if case.section not in sections or case.key in results or time.monotonic() >= end:
            continue
        print(case.key, flush=True)
        figures = compile_case(case, end - time.monotonic() + 60)
        if figures is None:
            print("  stopped: no time left", flush=True)
            continue
        print(
            "  " + json.dumps({k: figures.get(k) for k in ("fits", "hbm_gib", "error")}), flush=True
        )
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({**load(), case.key: figures}, indent=1) + "\n")


def by_shapes(case: Case) -> dict | None:
    """What a case needs at least, from its shapes; None if its recipe refuses the mesh."""
    topology = describe(case.topology)
    try:
        setup = open_abstract(load_config(case.configuration()), topology)
    except UserError:
        return None
    at = start(setup)
    known = estimate(setup, at, topology)
    return {
        "arguments_gib": bytes_of(training(setup, at).arguments) / GIB,
        "hbm_gib": known.gib,
        "step_seconds_bound": known.least,
    }


def load() -> dict[str, dict]:
    """The results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


HEADINGS = ("recipe", "slice", "recomputes", "GiB a chip", "arguments", "TFLOPs", "over the floor")
HEADINGS += ("HBM GB", "ICI GB", "DCN GB", "bound, ms", "set by", "MFU bound", "tokens/s")


def table(section: str) -> str:
    """Markdown of a section."""
    results = load()
    rows = []
    for case in CASES:
        if case.section == section:
            known = results.get(case.key)
            cells = _cells(known) if known else _least(by_shapes(case))
            rows.append([_name(case), case.topology, *cells])
    return pages.markdown(HEADINGS, rows)


def _name(case: Case) -> str:
    """The base, and what of the recipe or of the batch is set."""
    base = case.config.rpartition(":")[2].capitalize()
    fields = dict(f.split("=", 1) for f in case.fields)
    shown = {
        "base.quantise": "{}",
        "stages.mixture.banks.experts.experts": "{} experts",
        "data.global_batch": "rows {}",
        "data.length": "tokens {}",
        "run.mesh.sequence": "sequence {}",
    }
    told = [text.format(fields[name]) for name, text in shown.items() if name in fields]
    return ", ".join([base, *told])


def _least(figures: dict | None) -> list[str]:
    if figures is None:
        return ["", "refused", *[""] * 10]
    cells = ["", f"≥ {figures['hbm_gib']:.2f}", f"{figures['arguments_gib']:.2f}"]
    return [*cells, *[""] * 5, f"≥ {1e3 * figures['step_seconds_bound']:.1f}", "", "", ""]


def _cells(figures: dict) -> list[str]:
    if "error" in figures:
        return ["", figures["error"], *[""] * 10]
    cells = [f"{figures['hbm_gib']:.2f}", f"{figures['arguments_gib']:.2f}"]
    if not figures["fits"]:
        return [figures["remat"], f"**{cells[0]}**: too large", cells[1]] + [""] * 9
    links = figures["collectives"].values()
    return [
        figures["remat"],
        *cells,
        f"{figures['flops_per_chip'] / 1e12:.2f}",
        f"{figures['flops_over_floor']:.3f}",
        f"{figures['bytes_per_chip'] / 1e9:.1f}",
        f"{sum(c['ici_bytes'] for c in links) / 1e9:.2f}",
        f"{sum(c['dcn_bytes'] for c in links) / 1e9:.2f}",
        f"{1e3 * figures['step_seconds_bound']:.1f}",
        figures["bound_by"],
        f"{100 * figures['mfu_bound']:.0f}%",
        f"{figures['tokens_per_second_bound']:,.0f}",
    ]


def main() -> None:
    """Compile what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = sorted({case.section for case in CASES})
    parser.add_argument("--only", default=",".join(sections), help="sections, by comma")
    parser.add_argument("--seconds", type=float, default=7200, help="start no case after these")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(sections)
    if unknown:
        parser.error(f"--only: no section {', '.join(unknown)}; known: {', '.join(sections)}")
    compile_missing(set(args.only.split(",")), args.seconds)
    for section in sections:
        pages.put(PAGE, section, table(section))


if __name__ == "__main__":
    main()
