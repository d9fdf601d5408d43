"""The base of the trials: stories260K with an embedding that tells bytes apart.

  python benchmarks/trials.py base

Scripts other than the Latin one reach the 512 pieces of tiny_lm_stories260K (under $MEDMOE_DATA,
default ../shared/data) as single bytes. It has seen almost none in its stories, so that their
embeddings are all but equal, and so are their logits: on such a base no adapter can read or write
Chinese. The only stage trains the embedding, which is the head as well, on the training rows of
configs/trial_families.py; the command exports the result to runs/trials/base. Two CPU cores, three
minutes.
"""

from ml_collections import ConfigDict

from medmoe_jax.data.medical import data_root
from medmoe_jax.training.config import recipe, source, stage

# The sources of configs/trial_families.py.
SOURCES = (
    *("tico_ar", "tico_bn", "tico_es", "tico_fa", "tico_fr", "tico_ha", "tico_hi", "tico_id"),
    *("tico_ne", "tico_ps", "tico_ru", "tico_so", "tico_sw", "tico_ta", "tico_tl", "tico_ur"),
    *("tico_zh", "tico_zu"),
    *("vihealth", "mmlu_african", "frenchmedmcqa", "rumed_top3", "cmedtc"),
)


def get_config(arg: str = "runs/trials/embedding") -> ConfigDict:
    """The recipe; `arg` is the folder that holds its rows."""
    config = recipe()
    folder = data_root() / "tiny_lm_stories260K"
    config.base.path = str(folder / "stories260K.bin")
    config.base.tokenizer = str(folder / "tok512.model")
    config.data.template = "user_assistant"
    config.data.length = 160
    config.data.global_batch = 16
    for name in SOURCES:
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    config.stages.order = ("embedding",)
    config.stages.embedding = stage(
        train_base=("embed",), mixture=dict.fromkeys(SOURCES, 1.0), steps=1000, learning_rate=3e-3
    )
    config.run.remat = "none"
    return config
