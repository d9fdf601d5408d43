"""This project beside PEFT, tunix and the published methods written plainly: time and memory.

  python benchmarks/peers.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf [--quick] [--device=gpu]
  python benchmarks/peers.py --table      # the page's tables again, from the last figures

Whole training steps on a base from disk. Every contender is a process of its own, one after
another; of several rounds every other goes backwards. `--quick` times one step of each, none as
installed. What is not installed is left out and named. Writes benchmarks/results/peers.json, where
the figures of another device stay, and the tables of docs/comparison.md; benchmarks/README.md says
how to read them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import children, pages, peer_tables
from benchmarks.peer_step import SIDES
from benchmarks.peer_task import DTYPES, LORA, MEDCARE, MING, OURS, ROWS, TARGETS, TOKENS
from benchmarks.timing import machine
from medmoe_jax import __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "comparison.md"
CONTENDERS = {
    LORA: (OURS, "peft", "tunix"),
    MING: (OURS, "naive"),
    MEDCARE: (OURS, "naive"),
}
HOWS = {"cpu": ("installed", "heap", "tuned"), "gpu": ("installed",)}
# Timed steps of a process.
STEPS = {"cpu": 2, "gpu": 20}
# By how much first losses may differ, relatively: all start from the base.
SAME = {"cpu": 1e-4, "gpu": 2e-2}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "peft", "google-tunix", "qwix")


def run(gguf: Path, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """All figures of a device."""
    steps = 1 if quick else STEPS[device]
    hows = HOWS[device]
    if quick and len(hows) > 1:
        hows = hows[1:]  # none as installed
    with tempfile.TemporaryDirectory() as cache:
        # Steps are compiled once: what a first step takes is told by the first round alone.
        env = {"JAX_COMPILATION_CACHE_DIR": cache, "TQDM_DISABLE": "1"}
        env["JAX_PLATFORMS"] = "cpu" if device == "cpu" else ""
        contest = Contest(gguf.resolve(), device, hows, rounds, steps, env)
        found = {name: compare(name, contest) for name in CONTENDERS}
    names = {f["device"] for sides in found.values() for f in sides.values() if "device" in f}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": ", ".join(sorted(names - {""})),
        "dtype": DTYPES[device],
        "rows": ROWS,
        "tokens": TOKENS,
        "targets": TARGETS,
        "version": __version__,
        "rounds": rounds,
        "steps": steps,
        "machine": machine(PACKAGES),
        "recipes": found,
    }


class Contest(NamedTuple):
    """How contenders are run: in which ways, how many rounds and timed steps, and where."""

    gguf: Path
    device: str
    hows: Sequence[str]
    rounds: int
    steps: int
    env: dict[str, str]


def compare(recipe: str, contest: Contest) -> dict[str, dict[str, Any]]:
    """The figures of a recipe's contenders, or why there are none."""
    order = [(who, how) for who in CONTENDERS[recipe] for how in contest.hows]
    out: dict[str, dict[str, Any]] = {who: {} for who in CONTENDERS[recipe]}
    for number in range(contest.rounds):
        for who, how in order[:: -1 if number % 2 else 1]:
            if "missing" in out[who]:
                continue
            arguments = [who, recipe, str(contest.gguf), contest.device, str(contest.steps)]
            torch = SIDES[who].torch
            new = children.measured("peer_step", arguments, how, torch, contest.env)
            print(recipe, who, how, json.dumps(new), flush=True)
            if "missing" in new:
                out[who] = {"missing": new["missing"]}
            else:
                add(out[who], how, new)
    check(recipe, out, SAME[contest.device])
    return out


def add(found: dict[str, Any], how: str, new: dict[str, Any]) -> None:
    """Put a process's figures to those of a contender: more seconds; the rest is the first's."""
    found.setdefault("device", new["device"])
    found.setdefault("parameters", new["parameters"])
    found.setdefault("loss", new["losses"][0])
    kept = {name: new[name] for name in ("tuning", "first", "peak_gib")}
    found.setdefault(how, {"seconds": [], **kept})["seconds"] += new["seconds"]


def check(recipe: str, found: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Leave unless all contenders train as many parameters from the same loss."""
    there = {who: one for who, one in found.items() if "missing" not in one}
    if OURS not in there:
        raise SystemExit(f"{OURS}: {found[OURS]['missing']}")
    own = there[OURS]
    for who, one in there.items():
        if one["parameters"] != own["parameters"]:
            raise SystemExit(
                f"{recipe}: {who} trains {one['parameters']} parameters, not {own['parameters']}"
            )
        if abs(one["loss"] / own["loss"] - 1) > tolerance:
            raise SystemExit(f"{recipe}: {who} starts from {one['loss']}, not {own['loss']}")


def show(results: dict[str, Any]) -> None:
    """Print the tables, and put them into the page."""
    text = peer_tables.tables(results)
    print(text)
    pages.put(PAGE, peer_tables.PART, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write figures and tables; `arguments` are the process's own if not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct, or another of its kind")
    parser.add_argument("--device", choices=HOWS, default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one step of each, none as installed")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.table and not results:
        parser.error(f"--table: there are no figures in {RESULTS}")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} measures nothing")
    if not args.table:
        if args.gguf is None or not args.gguf.is_file():
            parser.error("--gguf: name the file of the base (`make models` fetches it)")
        found = run(args.gguf, args.device, args.rounds, args.quick)
        results[args.device] = {"base": args.gguf.name, **found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
