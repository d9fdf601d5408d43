"""Language-family experts beside dense LoRA of as many trainable parameters, in 30 languages.

  python benchmarks/trials.py base
  python benchmarks/trials.py rows families --seeds 0
  medmoe train --config=configs/trial_families.py --workdir=runs/trials/families/seed0

The argument is the folder of the run, where the second command puts its rows: TICO-19's sentences
from English into eighteen languages, and five sets in further ones, under $MEDMOE_DATA (default
../shared/data). HELD_OUT, Portuguese, is in no training row. The base, of 260,032 parameters, is
that of configs/trial_base.py, two folders above; its 512 pieces spell other scripts in bytes.

Four stages, each from the frozen base, on the same rows in the same order:

- `last`: configs/apollo_moe.py's low-rank experts, one a family, in the feed-forward networks of
  the last two layers; in training the family's expert is among the picks, in scoring the router
  chooses alone. 114,304 parameters;
- `everywhere`: the same in all five layers: 115,840;
- `dense`: one LoRA on every linear layer: 115,600;
- `dense_last`: one LoRA on the layers and sites of `last`: 113,280.

The families are those of trial_families.csv beside this file. Two CPU cores, a few minutes a stage;
`python benchmarks/trials.py run families` runs all with three seeds. The table is in
docs/trials.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, recipe, source, stage

TICO = (
    *("ar", "bn", "es", "fa", "fr", "ha", "hi", "id", "ne", "pt"),
    *("ps", "ru", "so", "sw", "ta", "tl", "ur", "zh", "zu"),
)
HELD_OUT = "pt"
# Vietnamese and eleven African languages besides; three more tasks in French, Russian and Chinese.
SETS = ("vihealth", "mmlu_african", "frenchmedmcqa", "rumed_top3", "cmedtc")
TABLE = Path(__file__).with_name("trial_families.csv")
FAMILIES = 8
MLP = ("mlp.*",)


def arm(sources: tuple[str, ...], **banks) -> ConfigDict:
    """A stage that trains banks on all languages, each source weighing the same."""
    return stage(banks=banks, mixture=dict.fromkeys(sources, 1.0), steps=150, learning_rate=3e-3)


def families(layers: tuple, rank: int) -> ConfigDict:
    """Low-rank experts, one a family."""
    return bank(
        sites=MLP, layers=layers, form="ffn_lora", experts=FAMILIES, rank=rank, alpha=2.0 * rank,
        gate="language", top_k=2, renormalise=True, router_bias=False, forcing="train",
    )  # fmt: skip


def get_config(arg: str = "runs/trials/families/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = str(Path(arg).parents[1] / "base")
    config.data.template = "user_assistant"
    config.data.languages = str(TABLE)
    config.data.length = 160
    config.data.global_batch = 16
    sources = (*(f"tico_{code}" for code in TICO if code != HELD_OUT), *SETS)
    for name in sources:
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    config.stages.order = ("last", "everywhere", "dense", "dense_last")
    config.stages.last = arm(sources, experts=families((-2, None), 10))
    config.stages.everywhere = arm(sources, experts=families((None, None), 4))
    config.stages.dense = arm(sources, lora=bank(sites=("*",), rank=20, alpha=40.0))
    config.stages.dense_last = arm(
        sources, lora=bank(sites=MLP, layers=(-2, None), rank=80, alpha=160.0)
    )
    config.run.remat = "none"
    return config
