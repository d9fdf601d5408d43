"""Whether exports answer in vLLM, and in transformers and PEFT, as `medmoe generate` does.

  make vllm                                         # installs vLLM for CPU beside, and runs this
  python benchmarks/vllm_texts.py                   # transformers and PEFT only
  python benchmarks/vllm_texts.py --vllm=PYTHON     # vLLM too, in the environment of that Python

A real model gets a small LoRA (benchmarks/vllm_recipe.py) and is exported in float32: with the LoRA
folded into the weights (hf), and beside the bare base as an adapter (peft). Every reader gives the
greedy answers to the same questions, from the chat template inside the export. Prints a table,
writes results/vllm_texts.json, and ends with status 1 where a text is another one: a tie of two
tokens would show as a `gap` of next to nothing where they part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import processor
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.main import main as medmoe
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.terminal import console

HERE = Path(__file__).parent
RESULT = HERE / "results" / "vllm_texts.json"
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 48  # of an answer, at most
PROMPTS = (
    "What is scurvy and what causes it?",
    "Name three symptoms of diabetes.",
    "A patient has a fever and a stiff neck. What should be done first?",
    "Explain in one sentence what an antibiotic does.",
    "What does ibuprofen treat?",
    "Wie wirkt Aspirin?",
    "发烧时应该怎么办?",
    "List the chambers of the heart.",
    "Write two sentences about sleep and health.",
)
# By export: the folder of weights, and that of an adapter over them.
EXPORTS = {"hf": ("merged", ""), "peft": ("base", "adapter")}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="of the base (%(default)s)")
    parser.add_argument("--vllm", default="", help="the Python that vLLM is installed for")
    parser.add_argument("--folder", help="where runs and exports are kept (default: nowhere)")
    arguments = parser.parse_args()
    pythons = {"transformers": sys.executable}
    pythons |= {"vllm": arguments.vllm} if arguments.vllm else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        result = measure(f"--config={HERE / 'vllm_recipe.py'}:{arguments.model}", folder, pythons)
    result = {"processor": processor(), "model": Path(arguments.model).name, **result}
    if arguments.vllm:
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(table(result))
    sys.exit(any(row["different"] for row in result["readers"]))


def measure(config: str, folder: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """Train, export, and ask everybody.

    Args:
      config: of the recipe, as the command line takes it.
      folder: where everything is kept.
      pythons: by reader of `served_texts`, the Python that runs it.
    """
    setup = open_setup(load_config([config]))
    run("train", config, folder)
    run("export", config, folder, "--format=hf", f"--output={folder / 'merged'}")
    run("export", config, folder, "--format=hf", f"--output={folder / 'base'}", "--stage=base")
    run("export", config, folder, "--format=peft", f"--output={folder / 'adapter'}")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    texts, bare = generated(config, folder), generated(config, folder, "--stage=base")
    ours = [
        {
            "prompt": setup.encoder.prompt([{"role": "user", "content": prompt}]),
            "text": text,
            "ids": setup.tokenizer.encode(text),
        }
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    readers, versions = [], {}
    for (reader, python), (kind, (weights, adapter)) in itertools.product(
        pythons.items(), EXPORTS.items()
    ):
        output = folder / f"{reader}_{kind}.json"
        command = [python, str(HERE / "served_texts.py"), reader, str(folder / weights)]
        command += [str(folder / "prompts.json"), str(TOKENS), str(output)]
        subprocess.run([*command, *([str(folder / adapter)] if adapter else [])], check=True)
        read = json.loads(output.read_text())
        versions[reader] = read["versions"]
        readers.append({"reader": reader, "export": kind, **compare(ours, read["answers"])})
    return {
        "tokens": TOKENS,
        "questions": len(PROMPTS),
        "answers_changed_by_the_adapter": sum(a != b for a, b in zip(texts, bare, strict=True)),
        "versions": versions,
        "readers": readers,
        "answers": dict(zip(PROMPTS, texts, strict=True)),
    }


def run(command: str, config: str, folder: Path, *options: str) -> None:
    """A command of medmoe in the work directory; raises where it fails."""
    if medmoe([command, config, f"--workdir={folder / 'run'}", *options]):
        raise RuntimeError(f"medmoe {command} failed")


def generated(config: str, folder: Path, *options: str) -> list[str]:
    """The greedy answers of `medmoe generate`."""
    output = folder / "answers.jsonl"
    files = (f"--input={folder / 'rows.jsonl'}", f"--output={output}")
    run("generate", config, folder, *files, f"--max-tokens={TOKENS}", *options)
    return [json.loads(line)["response"] for line in output.read_text().splitlines()]


def compare(ours: Sequence[dict], theirs: Sequence[dict]) -> dict[str, Any]:
    """How many prompts and answers are alike, and where the others part.

    Args:
      ours: the `prompt` ids, the `text` and its `ids` of every answer.
      theirs: those of `served_texts`.
    """
    different = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a["text"] != b["text"] or a["prompt"] != b["prompt"]:
            pairs = zip(a["ids"], b["ids"], strict=False)
            alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            gap = b["gap"][alike] if alike < len(b["gap"]) else None
            different.append({"question": number, "token": alike, "gap": gap, "theirs": b["text"]})
    return {
        "same_prompts": sum(a["prompt"] == b["prompt"] for a, b in zip(ours, theirs, strict=True)),
        "same_texts": sum(a["text"] == b["text"] for a, b in zip(ours, theirs, strict=True)),
        "tokens": sum(len(b["ids"]) for b in theirs),
        "least_gap": min(gap for b in theirs for gap in b["gap"]),
        "different": different,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    out = Table(title=f"{result['model']}: greedy answers equal to those of medmoe generate")
    for column in ("reader", "export", "same prompts", "same texts", "tokens", "least gap"):
        out.add_column(column)
    for row in result["readers"]:
        counts = (f"{row[key]} of {result['questions']}" for key in ("same_prompts", "same_texts"))
        gap = f"{row['least_gap']:.4f}"
        out.add_row(row["reader"], row["export"], *counts, str(row["tokens"]), gap)
    return out


if __name__ == "__main__":
    main()
