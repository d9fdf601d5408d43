"""MING-MOE beside one LoRA on SmolLM2, as the tasks grow in number and as they conflict.

  python benchmarks/trials.py run mixture_12 --smollm2=MODEL
  medmoe train --config=configs/trial_mixture.py:12,runs/trials/mixture_12/seed0 --workdir=...

The argument is one of MIXTURES and the folder of the run, where the first command puts rows of the
public sets under $MEDMOE_DATA (default ../shared/data). All stages start from the base and read the
same rows in the same order:

- `experts`: the banks of configs/ming_moe.py;
- `lora`: one LoRA on every linear layer with as many trainable parameters: 26,864,640 beside
  26,819,280;
- `lora_active`: attention as in `experts`, and on the feed-forward sites the rank that a token
  passes there, two experts of sixteen: 7,925,760.

In `conflict` four tasks stand twice. Rows that begin with MIRRORED are answered by the label after
the right one in the task's list, so the same question has two answers.
"""

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, recipe, source, stage

FOUR = ("bc5cdr", "rqe", "mts_section", "meqsum")
TWELVE = (
    *FOUR,
    *("medmcqa", "pubmedqa", "frenchmedmcqa"),  # exams and evidence
    *("medquad", "medquad_type"),  # what a patient asks: the answer; what kind of question
    *("ncbi_disease", "bc5cdr_relations"),  # names in a text, and what causes what
    "mts_dialog",  # a section of a note
)
LABELS = ("rqe", "mts_section", "medquad_type", "medmcqa")  # one of a list
MIRRORED = "Mirrored. "
MIXTURES = {
    "1": FOUR[:1],
    "4": FOUR,
    "12": TWELVE,
    "conflict": (*LABELS, *(f"{name}_mirrored" for name in LABELS)),
}
ARMS = ("experts", "lora", "lora_active")


def get_config(arg: str = "12,runs/trials/mixture_12/seed0") -> ConfigDict:
    """The recipe; `arg` is the mixture and the folder of the run."""
    mixture, _, folder = arg.partition(",")
    if mixture not in MIXTURES or not folder:
        raise ValueError(f"'{arg}': give MIXTURE,FOLDER with MIXTURE one of {', '.join(MIXTURES)}")
    config = recipe()
    config.base.path = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    config.base.dtype = "bfloat16"
    config.data.template = "tokenizer"
    config.data.length = 256
    config.data.global_batch = 8
    for name in MIXTURES[mixture]:
        config.data.sources[name] = source(f"{folder}/rows/train/{name}.jsonl")

    def arm(**banks) -> ConfigDict:
        tasks = dict.fromkeys(MIXTURES[mixture], 1.0)
        return stage(banks=banks, mixture=tasks, steps=150, learning_rate=1e-3)

    attention = bank(sites=("attn.*",), rank=16, alpha=32.0, dropout=0.05)
    config.stages.order = ARMS
    config.stages.experts = arm(
        attention=attention,
        experts=bank(
            sites=("mlp.*",), experts=8, rank=16, alpha=32.0, gate="token", top_k=2, dropout=0.05
        ),
    )
    config.stages.lora = arm(lora=bank(sites=("*",), rank=88, alpha=176.0, dropout=0.05))
    config.stages.lora_active = arm(
        attention=attention, lora=bank(sites=("mlp.*",), rank=32, alpha=64.0, dropout=0.05)
    )
    return config
