"""MING-MOE beside one LoRA of as many trainable parameters, on twelve tasks at once.

  python benchmarks/trials.py base
  python benchmarks/trials.py rows mixture --seeds 0
  medmoe train --config=configs/trial_mixture.py --workdir=runs/trials/mixture/seed0

The argument is the folder of the run, where the second command puts rows of the public sets under
$MEDMOE_DATA (default ../shared/data). The base, of 260,032 parameters, is that of
configs/trial_base.py, two folders above. Both stages start from the base and read the same rows in
the same order:

- `experts`: configs/ming_moe.py's banks, at rank 4 an expert for a base of width 64: 161,240
  parameters, routers included;
- `lora`: one bank of rank 28 on every linear layer: 161,840.

Two CPU cores, a few minutes; `python benchmarks/trials.py run mixture` runs both stages with three
seeds and scores them on held-out rows. The table is in docs/trials.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, recipe, source, stage

# Four kinds of task in four languages; all weigh the same in the mixture.
SETS = (
    *("cmedtc", "cmedic", "medquad_type", "mts_section", "rumed_top3"),  # one label of many
    *("cmedqq", "rqe"),  # do two questions ask the same?
    *("medmcqa", "frenchmedmcqa"),  # the letters of the right options
    *("ncbi_disease", "bc5cdr", "meqsum"),  # free text: names, names by type, a summary
)


def arm(**banks) -> ConfigDict:
    """A stage that trains banks on the whole mixture."""
    return stage(banks=banks, mixture=dict.fromkeys(SETS, 1.0), steps=250, learning_rate=3e-3)


def get_config(arg: str = "runs/trials/mixture/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = str(Path(arg).parents[1] / "base")
    config.data.template = "user_assistant"
    config.data.length = 160
    config.data.global_batch = 16
    for name in SETS:
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    config.stages.order = ("experts", "lora")
    config.stages.experts = arm(
        attention=bank(sites=("attn.*",), rank=16, alpha=32.0),
        experts=bank(sites=("mlp.*",), experts=8, rank=4, alpha=8.0, gate="token", top_k=2),
    )
    config.stages.lora = arm(lora=bank(sites=("*",), rank=28, alpha=56.0))
    config.run.remat = "none"
    return config
