"""Language-family experts beside dense LoRA of as many trainable parameters, on Gemma 3 270M.

  python benchmarks/trials.py run families --gemma=MODEL
  medmoe train --config=configs/trial_families.py --workdir=runs/trials/families/seed0

The argument is the folder of the run, where the first command puts its rows: TICO-19's sentences
from English into eighteen languages, and five sets in further ones, under $MEDMOE_DATA (default
../shared/data). HELD_OUT, Portuguese, is in no training row.

Five stages, each from the frozen base, on the same rows in the same order:

- `last`: configs/apollo_moe.py's low-rank experts, one a family, in the feed-forward networks of
  the last two layers; in training the family's expert is among the picks, in scoring the router
  chooses alone. 2,332,672 parameters;
- `everywhere`: the same in all eighteen layers: 2,414,592;
- `unforced`: `everywhere`, with picks of the router's own in training too;
- `dense`: one LoRA on every linear layer: 2,373,120;
- `dense_last`: one LoRA on the layers and sites of `last`: 2,322,432.

The families are those of trial_families.csv beside this file.
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
LAST, EVERY = (-2, None), (None, None)
ARMS = ("last", "everywhere", "unforced", "dense", "dense_last")


def families(layers: tuple, rank: int, forcing: str = "train") -> ConfigDict:
    """Low-rank experts, one a family."""
    return bank(
        sites=MLP, layers=layers, form="ffn_lora", experts=FAMILIES, rank=rank, alpha=2.0 * rank,
        gate="language", top_k=2, renormalise=True, router_bias=False, forcing=forcing,
    )  # fmt: skip


def get_config(arg: str = "runs/trials/families/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = "hf://google/gemma-3-270m"
    config.base.dtype = "bfloat16"
    config.data.template = "user_assistant"
    config.data.languages = str(TABLE)
    config.data.length = 128
    config.data.global_batch = 16
    sources = (*(f"tico_{code}" for code in TICO if code != HELD_OUT), *SETS)
    for name in sources:
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")

    def arm(**banks) -> ConfigDict:
        all_alike = dict.fromkeys(sources, 1.0)
        return stage(banks=banks, mixture=all_alike, steps=150, learning_rate=1e-3)

    config.stages.order = ARMS
    config.stages.last = arm(experts=families(LAST, 18))
    config.stages.everywhere = arm(experts=families(EVERY, 2))
    config.stages.unforced = arm(experts=families(EVERY, 2, forcing="off"))
    config.stages.dense = arm(lora=bank(sites=("*",), rank=10, alpha=20.0))
    config.stages.dense_last = arm(lora=bank(sites=MLP, layers=LAST, rank=144, alpha=288.0))
    return config
