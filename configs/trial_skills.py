"""Twelve medical skills by AdaLoRA, then a router over them on tasks that none of them has seen.

  python benchmarks/trials.py base
  python benchmarks/trials.py rows skills --seeds 0
  medmoe train --config=configs/trial_skills.py --workdir=runs/trials/skills/seed0

The argument is the folder of the run, where the second command puts rows of the public sets under
$MEDMOE_DATA (default ../shared/data). The base, of 260,032 parameters, is that of
configs/trial_base.py, two folders above. SKILLS says which set stands for which skill. A stage
trains one skill with the others off. For each of TASKS and each number of its rows there are two
more stages:

- `route_TASK_ROWS`: the skills become one frozen bank, and twelve mixing weights are fitted;
- `lora_TASK_ROWS`: a plain LoRA on the base, from the same rows.

Two CPU cores, about ten minutes; `python benchmarks/trials.py run skills` runs all with three
seeds, compares the skills one by one as well, and scores held-out rows. The table is in
docs/trials.md.
"""

import itertools
from pathlib import Path

from ml_collections import ConfigDict

from medmoe_jax.training.config import (
    allocator,
    bank,
    orthonormality,
    recipe,
    source,
    sparsity,
    stacked,
    stage,
)

# Skill -> the set that stands for it.
SKILLS = {
    "question_answering": "medquad",
    "multiple_choice": "medmcqa",
    "conversation": "mts_dialog",
    "document_classification": "cmedtc",  # one label of 44: no set here has several
    "reading_comprehension": "pubmedqa",
    "inference": "rqe",
    "summarisation": "meqsum",
    "entity_recognition": "bc5cdr",
    "relation_extraction": "bc5cdr_relations",
    "entity_attribute": "medquad_type",  # which attribute of its topic a question asks for
    "entity_synonymy": "cmedqq",  # of whole questions: do they mean the same?
    "entity_relation": "rumed_top3",  # complaints -> code of the disease
}
# Task that no skill has seen -> what it asks.
TASKS = {
    "ncbi_disease": "diseases named in a sentence; near `entity_recognition`",
    "cmedic": "strength of the intent to seek care, in Chinese; near no skill",
}
# Rows of the task -> steps of plain LoRA; it overfits few rows sooner.
ROWS = {"16": 25, "64": 50, "all": 100}


def skill(name: str, before: str) -> ConfigDict:
    """A stage that trains one skill, with those before it off."""
    return stage(
        after=before,
        states={before: "off"} if before else {},
        banks={name: bank(sites=("*",), rank=8, alpha=16.0, learned_scale=True)},
        losses={"orthonormality": orthonormality(name)},
        allocators={"ranks": allocator(name, target_rank=4, t_init=10, t_final=20, every=2)},
        mixture={name: 1.0},
        steps=60,
        learning_rate=1e-2,
    )


def route(rows: str) -> ConfigDict:
    """A stage that fits the mixing weights of all skills, which are frozen."""
    return stage(
        after=list(SKILLS)[-1],
        stack={"skills": stacked(tuple(SKILLS))},
        losses={"sparsity": sparsity("skills", weight=0.01)},
        mixture={rows: 1.0},
        steps=60,
        learning_rate=5e-2,
    )


def lora(rows: str, steps: int) -> ConfigDict:
    """A stage that trains a plain LoRA on the base."""
    return stage(
        banks={"lora": bank(sites=("*",), rank=8, alpha=16.0)},
        mixture={rows: 1.0},
        steps=steps,
        learning_rate=3e-3,
    )


def get_config(arg: str = "runs/trials/skills/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = str(Path(arg).parents[1] / "base")
    config.data.template = "user_assistant"
    config.data.length = 160
    config.data.global_batch = 8
    few = {f"{task}_{rows}": steps for task in TASKS for rows, steps in ROWS.items()}
    for name in (*SKILLS, *few):
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    for before, name in itertools.pairwise(("", *SKILLS)):
        config.stages[name] = skill(name, before)
    config.stages.order = tuple(SKILLS)
    for name, steps in few.items():
        config.stages[f"route_{name}"] = route(name)
        config.stages[f"lora_{name}"] = lora(name, steps)
        config.stages.order += (f"route_{name}", f"lora_{name}")
    config.run.remat = "none"
    return config
