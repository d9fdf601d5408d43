"""MedCare's two stages on public medical sets, with a 260,032-parameter pretrained decoder.

  medmoe train --config=configs/trial.py --workdir=runs/trial

The folder of the sets is $MEDMOE_DATA (default ../shared/data); the base is its
tiny_lm_stories260K, a story teller of 512 pieces and 512 positions. Chinese takes three byte
tokens a character, and cases longer than a row of 192 tokens are shortened. Stage `aggregate`
reads knowledge and alignment sets in English, Chinese, French, Russian and eleven African
languages, `align` the alignment sets only; both end with the dev splits, and the test splits of
exams in English and Japanese, of which nothing is trained on.

Named beforehand: CLEAR_OF_MAJORITY are the alignment sets that must end at least 5 points above
always giving the commonest answer. Two CPU cores, under 30 minutes; the table is in docs/trial.md.
"""

from ml_collections import ConfigDict

from medmoe_jax.data.medical import data_root
from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage

# Set -> weight in the mixture.
KNOWLEDGE = {
    "pubmedqa": 1.0,
    "mmlu_african": 0.5,
    "frenchmedmcqa": 1.0,
    "rumed_danet": 1.0,
    "rumed_top3": 1.0,
}
EXAMS = ("medmcqa", "mmlu", "jmmlu")  # evaluated only: the folder holds no training rows of them
ALIGNMENT = {
    "cmedtc": 4.0,
    "cmedic": 0.5,
    "cmedqq": 2.0,
    "rqe": 1.5,
    "mts_section": 1.0,
    "medquad_type": 2.0,
    "ncbi_disease": 1.0,
}
CLEAR_OF_MAJORITY = ("cmedtc", "medquad_type")
MLP = ("mlp.*",)


def get_config() -> ConfigDict:
    """The trial's recipe."""
    config = recipe()
    folder = data_root() / "tiny_lm_stories260K"
    config.base.path = str(folder / "stories260K.bin")
    config.base.tokenizer = str(folder / "tok512.model")
    config.data.template = "user_assistant"
    config.data.length = 192
    config.data.global_batch = 32
    config.data.shards = 8
    for name in (*KNOWLEDGE, *ALIGNMENT):
        config.data.sources[name] = source(reader=name)
    config.stages.order = ("aggregate", "align")
    config.stages.aggregate = stage(
        banks={
            "attention": bank(sites=("attn.*",), rank=16, alpha=32.0),
            "noise": bank(sites=MLP, experts=8, rank=4, alpha=8.0, gate="token", top_k=2),
            "knowledge": bank(sites=MLP, rank=32, alpha=64.0),
        },
        mixture={**KNOWLEDGE, **ALIGNMENT},
        steps=600,
        learning_rate=3e-3,
    )
    config.stages.align = stage(
        after="aggregate",
        merge=("attention",),
        drop=("noise",),
        states={"knowledge": "frozen"},
        banks={"alignment": bank(sites=MLP, rank=32, alpha=64.0)},
        losses={"orthogonality": orthogonality("alignment", "knowledge", weight=0.1)},
        mixture=ALIGNMENT,
        steps=900,
        learning_rate=3e-3,
    )
    config.run.remat = "full"
    config.run.save_every = 100
    config.run.score_batch = 64
    config.run.tasks = (*EXAMS, *KNOWLEDGE, *ALIGNMENT)
    config.run.task_limit = 300
    return config
