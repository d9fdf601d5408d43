"""Twelve medical skills on SmolLM2 by AdaLoRA, then a router over them on tasks none has seen.

  python benchmarks/trials.py run skills --smollm2=MODEL
  medmoe train --config=configs/trial_skills.py --workdir=runs/trials/skills/seed0

The argument is the folder of the run, where the first command puts rows of the public sets under
$MEDMOE_DATA (default ../shared/data) and of the demonstration. SKILLS says which set stands for
which skill. A stage trains one skill with the others off. For each of TASKS and each number of its
rows there are three more stages:

- `route_TASK_ROWS`: the skills become one frozen bank, and twelve mixing weights are fitted;
- `lora_TASK_ROWS`: a plain LoRA on the base, from the same rows;
- `started_TASK_ROWS`: the same LoRA on the base with the mixed skills of `route_TASK_ROWS`.
"""

import itertools

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
    "document_classification": "mts_section",  # one label of 20: no set here has several
    "reading_comprehension": "pubmedqa",
    "inference": "rqe",
    "summarisation": "meqsum",
    "entity_recognition": "bc5cdr",
    "relation_extraction": "bc5cdr_relations",
    "entity_attribute": "medquad_type",  # which attribute of its topic a question asks for
    "entity_synonymy": "cmedqq",  # of whole questions in Chinese: do they mean the same?
    "entity_relation": "facts",  # of the demonstration: disease -> germ, drug -> class and so on
}
# Task that no skill has seen -> what it asks.
TASKS = {
    "ncbi_disease": "diseases named in a sentence; near `entity_recognition`",
    "formats": "the demonstration's clinical formats; near no skill",
}
# Rows of the task -> steps; few rows are soon learnt by heart.
ROWS = {"16": 12, "64": 24, "all": 48}
# Rows of the task -> how many of them pick the best single skill.
PICK = {"16": 16, "64": 48, "all": 48}


def skill(name: str, before: str) -> ConfigDict:
    """A stage that trains one skill, with those before it off."""
    return stage(
        after=before,
        states={before: "off"} if before else {},
        banks={name: bank(sites=("*",), rank=8, alpha=16.0, learned_scale=True)},
        losses={"orthonormality": orthonormality(name)},
        allocators={"ranks": allocator(name, target_rank=4, t_init=4, t_final=8, every=2)},
        mixture={name: 1.0},
        steps=24,
        learning_rate=3e-3,
    )


def route(rows: str) -> ConfigDict:
    """A stage that fits the mixing weights of all skills, which are frozen."""
    return stage(
        after=list(SKILLS)[-1],
        stack={"skills": stacked(tuple(SKILLS))},
        losses={"sparsity": sparsity("skills", weight=0.01)},
        mixture={rows: 1.0},
        steps=20,
        learning_rate=5e-2,
    )


def lora(rows: str, steps: int, **fields) -> ConfigDict:
    """A stage that trains a plain LoRA."""
    return stage(
        banks={"lora": bank(sites=("*",), rank=8, alpha=16.0)},
        mixture={rows: 1.0},
        steps=steps,
        learning_rate=1e-3,
        **fields,
    )


def get_config(arg: str = "runs/trials/skills/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    config.base.dtype = "float32"  # on a CPU a third faster than bfloat16
    config.data.template = "tokenizer"
    config.data.length = 128
    config.data.global_batch = 4
    config.data.shards = 4
    few = {f"{task}_{rows}": steps for task in TASKS for rows, steps in ROWS.items()}
    for name in (*SKILLS, *few):
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    for before, name in itertools.pairwise(("", *SKILLS)):
        config.stages[name] = skill(name, before)
    config.stages.order = tuple(SKILLS)
    for name, steps in few.items():
        config.stages[f"route_{name}"] = route(name)
        config.stages[f"lora_{name}"] = lora(name, steps)
        config.stages[f"started_{name}"] = lora(
            name, steps, after=f"route_{name}", states={"skills": "frozen"}
        )
        config.stages.order += (f"route_{name}", f"lora_{name}", f"started_{name}")
    return config
