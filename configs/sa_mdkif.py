"""SA-MDKIF (arXiv 2402.00474): twelve medical skills, each learned alone, then mixed for a task.

  medmoe train --config=configs/sa_mdkif.py:qwen1.5-1.8b --workdir=runs/sa_mdkif \\
      --config.data.sources.downstream.path=downstream.jsonl

The argument is BASE, BASE,GATE or BASE,GATE,TASK,TASK... BASE is a key of HUB in
medmoe_jax/base/presets.py. GATE says how the skills are weighted: a key of GATES below, by default
`global`, or `none` to stop after the skills; `token`, a router that looks at the token, is this
project's extension. Each TASK, by default one named `downstream`, becomes a stage and a source.

The skills are the table SKILLS. Each is a bank trained by AdaLoRA while the others are off, on its
own sources; the prompt beside them gives the rows of a skill one form, wherever they come from.
Then the twelve become one bank, and a task's stage trains nothing but their weights. With few rows
a task they are better fitted than trained, by gradient or by CMA-ES, for several tasks at once:

  medmoe train --config=configs/sa_mdkif.py:qwen1.5-1.8b,none --workdir=runs/sa_mdkif
  medmoe route --config=configs/sa_mdkif.py:qwen1.5-1.8b,global,triage,coding --method=cma \\
      --workdir=runs/sa_mdkif --data=triage=triage.jsonl --data=coding=coding.jsonl

Afterwards `--stage=triage` names the skills as mixed for triage. Fixed weights fold into a plain
dense checkpoint; those of `token` do not.

The paper's abstract names neither ranks nor the form of the router: the figures here are this
project's reconstruction. Hardware: meant for TPU slices (FSDP over all chips); the 1.8B base in
bfloat16 with 32 rows of 2048 tokens asks for a v5e-8 or larger. The expected result is a loss below
the base's and any single skill's on a task's held-out rows; measured figures of this project are in
docs/.
"""

from ml_collections import ConfigDict

from medmoe_jax.base.presets import CHAT, HUB
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

# Skill: its files of rows, and the form of its prompts ({text} is a row's own).
SKILLS = {
    "question_answering": (
        ("question_answering.jsonl",),
        "Task: medical question answering. Answer the question.\n\n{text}",
    ),
    "multiple_choice": (
        ("multiple_choice.jsonl",),
        "Task: multiple-choice question. Give the letter of the right option.\n\n{text}",
    ),
    "conversation": (
        ("conversation.jsonl",),
        "Task: medical conversation. Reply to the patient as a doctor would.\n\n{text}",
    ),
    "document_classification": (
        ("document_classification.jsonl",),
        "Task: document classification. List every label that fits the document.\n\n{text}",
    ),
    "reading_comprehension": (
        ("reading_comprehension.jsonl",),
        "Task: reading comprehension. Answer from the passage alone.\n\n{text}",
    ),
    "inference": (
        ("inference.jsonl",),
        "Task: natural language inference. Say whether the premise entails, contradicts or leaves "
        "open the hypothesis.\n\n{text}",
    ),
    "summarisation": (
        ("summarisation.jsonl",),
        "Task: summarisation. Summarise the text.\n\n{text}",
    ),
    "entity_recognition": (
        ("entity_recognition.jsonl",),
        "Task: named entity recognition. List the medical entities by type.\n\n{text}",
    ),
    "relation_extraction": (
        ("relation_extraction.jsonl",),
        "Task: relation extraction. List each head entity, relation and tail entity.\n\n{text}",
    ),
    "entity_attribute": (
        ("entity_attribute.jsonl",),
        "Task: entity attribute. Give the value of the attribute asked for.\n\n{text}",
    ),
    "entity_synonymy": (
        ("entity_synonymy.jsonl",),
        "Task: entity synonymy. Give the terms that mean the same.\n\n{text}",
    ),
    "entity_relation": (
        ("entity_relation.jsonl",),
        "Task: relation of two entities. Name the relation that holds between them.\n\n{text}",
    ),
}
# Fields of the gate over the stacked skills.
GATES = {
    "global": {},
    "softmax": {"mix_softmax": True},
    "per_layer": {"mix_per_layer": True},
    "per_layer_softmax": {"mix_per_layer": True, "mix_softmax": True},
    "token": {"gate": "token", "top_k": 2},
}
STEPS = 600  # of a skill


def add_skills(config: ConfigDict, skills: dict[str, tuple[tuple[str, ...], str]]) -> None:
    """A stage and the sources of each skill, behind the stages that are there."""
    for skill, (paths, prompt) in skills.items():
        if not paths:
            raise ValueError(f"skill '{skill}' has no data: name a file in its entry of SKILLS")
        names = [skill if i == 0 else f"{skill}_{i + 1}" for i in range(len(paths))]
        for name, path in zip(names, paths, strict=True):
            config.data.sources[name] = source(path, prompt=prompt)
        before = config.stages.order[-1] if config.stages.order else ""
        config.stages[skill] = learn(skill, before, mixture=dict.fromkeys(names, 1.0))
        config.stages.order = (*config.stages.order, skill)


def learn(skill: str, before: str, steps: int = STEPS, **fields) -> ConfigDict:
    """One skill alone, of 12 ranks a matrix at first and 8 on average in the end."""
    every = max(1, steps // 60)
    ranks = allocator(skill, 8, t_init=steps // 10, t_final=3 * steps // 10, every=every)
    return stage(
        after=before,
        states={before: "off"} if before else {},
        banks={skill: bank(sites=("attn.*", "mlp.*"), rank=12, alpha=24.0, learned_scale=True)},
        losses={"orthonormality": orthonormality(skill)},
        allocators={"ranks": ranks},
        steps=steps,
        learning_rate=1e-3,
        **fields,
    )


def route(skills: tuple[str, ...], gate: dict, **fields) -> ConfigDict:
    """The skills as one bank of which only the gate trains, from the last skill's end."""
    bank_of = stacked(skills, **gate)
    # The weights of a softmax always sum to one: nothing to keep small.
    sparse = bank_of.gate == "skill" and not bank_of.mix_softmax
    return stage(
        after=skills[-1],
        stack={"skills": bank_of},
        losses={"sparsity": sparsity("skills")} if sparse else {},
        steps=200,
        learning_rate=2e-2,
        **fields,
    )


def get_config(arg: str = "qwen1.5-1.8b") -> ConfigDict:
    """The recipe for a base, a gate and downstream tasks."""
    base, *rest = arg.split(",")
    gate, *tasks = rest or ["global"]
    if base not in HUB or gate not in (*GATES, "none") or (tasks and gate == "none"):
        raise ValueError(
            f"'{arg}': give BASE, BASE,GATE or BASE,GATE,TASK,... with BASE one of "
            f"{', '.join(HUB)} and GATE one of {', '.join(GATES)} or, without a task, none"
        )
    config = recipe()
    config.base.path = HUB[base]
    config.base.dtype = "bfloat16"
    config.data.template = CHAT.get(base, "chatml")
    config.data.length = 2048
    config.data.global_batch = 32
    config.data.shards = 8
    add_skills(config, SKILLS)
    for task in () if gate == "none" else tasks or ["downstream"]:
        config.data.sources[task] = source(f"{task}.jsonl")
        config.stages[task] = route(tuple(SKILLS), GATES[gate], mixture={task: 1.0})
        config.stages.order = (*config.stages.order, task)
    return config
