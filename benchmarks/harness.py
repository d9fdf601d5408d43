"""lm-evaluation-harness's published medical tasks, item by item through us and through its `hf`.

  python benchmarks/harness.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf [--items=20] [--shots=0]

The model is exported as a Hugging Face folder, which both read in float32. The items are those of
the sets below $MEDMOE_DATA (docs/tasks.md), in the fields that the tasks read. Prints the largest
differences and writes benchmarks/results/harness.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import lm_eval
from lm_eval.tasks import TaskManager

from benchmarks.routing import PACKAGES, ROOT, console, show
from benchmarks.timing import machine
from medmoe_jax.data import medical
from medmoe_jax.evaluation import published
from medmoe_jax.evaluation.harness import Harness
from medmoe_jax.storage.places import local

FOLDERS = ("medqa", "medmcqa", "pubmedqa", "mmlu/default")  # of lm_eval/tasks
SHOTS = 5  # rows to make examples of, where a set has none for that


def published_tasks() -> TaskManager:
    """The published tasks; to look through all thousands of files takes half a minute."""
    tasks = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[tasks / f for f in FOLDERS], include_defaults=False)


def _question(row: medical.Row) -> str:
    return row.prompt[slice(*row.body)]


def _medqa(row: medical.Row) -> dict[str, Any]:
    endings = {f"ending{n}": text for n, text in enumerate(row.texts)}
    return {"sent1": _question(row), **endings, "label": row.choices.index(row.response)}


def _medmcqa(row: medical.Row) -> dict[str, Any]:
    options = dict(zip(("opa", "opb", "opc", "opd"), row.texts, strict=True))
    return {"question": _question(row), **options, "cop": row.choices.index(row.response)}


def _mmlu(row: medical.Row) -> dict[str, Any]:
    answer = row.choices.index(row.response)
    return {"question": _question(row), "choices": list(row.texts), "answer": answer}


def write_sets(folder: Path, items: int, root: Path | None = None) -> list[str]:
    """Lay out the first items of each set as the hub has it, and return the tasks that read them.

    Args:
      folder: to write into.
      items: so many of each task.
      root: where the sets are, by default $MEDMOE_DATA.
    """
    medqa = [_medqa(row) for row in _first("medqa", "test", items + SHOTS, root)]
    _write(folder / "GBaker/MedQA-USMLE-4-options-hf", test=medqa[SHOTS:], train=medqa[:SHOTS])
    medmcqa = [_medmcqa(row) for row in _first("medmcqa", "dev", items + SHOTS, root)]
    _write(folder / "openlifescienceai/medmcqa", validation=medmcqa[SHOTS:], train=medmcqa[:SHOTS])
    # From the file itself: rows of ours have the parts of an abstract in one.
    (path,) = (Path(medical.data_root(root)) / "pubmedqa_en").glob("ori_pqal*.json")
    fields = ("CONTEXTS", "QUESTION", "final_decision")
    records = itertools.islice(json.loads(path.read_text()).values(), items + SHOTS)
    pubmedqa = [{field: record[field] for field in fields} for record in records]
    _write(
        folder / "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source",
        test=pubmedqa[SHOTS:],
        train=pubmedqa[:SHOTS],
    )
    test, dev = (_by_part(medical.rows("mmlu", split, root)) for split in ("test", "train"))
    for subject, rows in test.items():
        questions = map(_mmlu, rows[:items])
        _write(folder / "cais/mmlu" / subject, test=questions, dev=map(_mmlu, dev[subject]))
    return ["medqa_4options", "medmcqa", "pubmedqa", *(f"mmlu_{subject}" for subject in test)]


def _by_part(rows: Iterable[medical.Row]) -> dict[str, list[medical.Row]]:
    out = defaultdict(list)
    for row in rows:
        out[row.part].append(row)
    return out


def _first(name: str, split: str, count: int, root: Path | None) -> list[medical.Row]:
    return list(itertools.islice(medical.rows(name, split, root), count))


def _write(folder: Path, **splits: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))


def samples(model: Any, tasks: Sequence[str], data: Path, **options: Any) -> tuple[dict, dict]:
    """Every item with what the model says of it, and the scores, by task."""
    with published.from_folder(data):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=published_tasks(),
            bootstrap_iters=0,
            **options,
        )
    return found["samples"], found["results"]


def compared(ours: Mapping[str, list], theirs: Mapping[str, list]) -> dict[str, dict[str, float]]:
    """How two models' answers to the same requests differ, by task.

    Raises:
      AssertionError: the requests are not the same.
    """
    out = {}
    for task, items in theirs.items():
        pairs = list(zip(ours[task], items, strict=True))
        assert all(a["arguments"] == b["arguments"] for a, b in pairs)
        # (log probability, whether it is greedy) of every option.
        both = [
            (float(mine), float(right), mine_greedy == right_greedy)
            for a, b in pairs
            for ((mine, mine_greedy),), ((right, right_greedy),) in zip(
                a["resps"], b["resps"], strict=True
            )
        ]
        out[task] = {
            "items": len(pairs),
            "requests": len(both),
            "largest absolute difference": max(abs(a - b) for a, b, _ in both),
            "largest relative difference": max(abs(a - b) / abs(b) for a, b, _ in both),
            "other greedy flags": sum(not same for *_, same in both),
            "other scores": sum(a["acc"] != b["acc"] for a, b in pairs),
        }
    return out


def export(gguf: Path, folder: Path) -> None:
    """Write a model as a Hugging Face folder, in float32."""
    from medmoe_jax.cli.main import main as medmoe

    model = [f"--config.base.path={gguf}", "--config.data.template=tokenizer", "--stage=base"]
    wanted = ["--format=hf", "--dtype=float32", f"--output={folder}"]
    status = medmoe(["export", "--config=base_only", *model, *wanted])
    assert status == 0


def opened(folder: Path, rows: int) -> tuple[Harness, Any]:
    """The model of a folder, ours and theirs."""
    from lm_eval.models.huggingface import HFLM

    from medmoe_jax.api.opening import open_model
    from medmoe_jax.training.config import recipe
    from medmoe_jax.training.run import Run
    from medmoe_jax.training.setup import open_setup

    config = recipe()
    config.base.path, config.data.template = str(folder), "tokenizer"
    config.run.score_batch = rows
    ours = Harness(open_model(Run(open_setup(config), ""), "base"))
    length = ours.max_length
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=rows, max_length=length)
    return ours, theirs


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the model")
    parser.add_argument("--items", type=int, default=20, help="of each task (%(default)s)")
    parser.add_argument("--shots", type=int, default=0, help="examples before each (%(default)s)")
    parser.add_argument("--output", type=local, default=ROOT / "benchmarks/results/harness.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        data, folder = Path(work) / "data", Path(work) / "model"
        tasks = write_sets(data, args.items)
        export(args.gguf, folder)
        both = opened(folder, 8)
        (ours, scores), (theirs, _) = (
            samples(model, tasks, data, num_fewshot=args.shots) for model in both
        )
    found = compared(ours, theirs)
    rows = [
        [task, *(f"{v:.2g}" if isinstance(v, float) else str(v) for v in row.values())]
        for task, row in found.items()
    ]
    show(f"{args.gguf.stem}, ours beside hf", ["task", *next(iter(found.values()))], rows)
    results = {
        "machine": machine(PACKAGES),
        "model": args.gguf.name,
        "shots": args.shots,
        "differences": found,
        "scores": {task: scores[task]["acc,none"] for task in tasks},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
