"""MedCare's two stages on SmolLM2, with the training rows of every public set that is there.

  medmoe train --config=configs/trial.py --config.base.path=MODEL --workdir=runs/trial

The folder of the sets is $MEDMOE_DATA (default ../shared/data), MODEL a folder or file of
SmolLM2-135M-Instruct, such as `make models` fetches (default: from the hub). Stage `aggregate`
reads all sets, `align` those of ALIGNMENT only. Exams of which only test rows are there are never
trained on. Cases longer than a row are shortened in their body. docs/trial.md has what it takes,
and the table of every task before and after.
"""

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage

# Set -> weight in the mixture.
KNOWLEDGE = {
    "medquad": 2.0,
    "pubmedqa": 1.0,
    "frenchmedmcqa": 1.0,
    "rumed_danet": 1.0,
    "rumed_top3": 1.0,
    "rumed_symptom": 1.0,
    "mmlu_african": 0.5,
}
ALIGNMENT = {
    "cmedtc": 2.0,
    "cmedic": 1.0,
    "cmedqq": 1.0,
    "cmedqaner": 1.0,
    "rqe": 1.0,
    "mts_section": 1.0,
    "mts_dialog": 1.0,
    "aci_bench": 0.25,
    "meqsum": 1.0,
    "medquad_type": 1.0,
    "ncbi_disease": 1.0,
    "bc5cdr": 1.0,
    "bc5cdr_relations": 1.0,
    "rumed_ner": 1.0,
    "tico19": 1.0,
}
MLP = ("mlp.*",)


def get_config() -> ConfigDict:
    """The trial's recipe."""
    config = recipe()
    config.base.path = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.template = "tokenizer"
    config.data.length = 512
    config.data.global_batch = 4
    config.data.shards = 4
    for name in (*KNOWLEDGE, *ALIGNMENT):
        config.data.sources[name] = source(reader=name)
    config.stages.order = ("aggregate", "align")
    config.stages.aggregate = stage(
        banks={
            "attention": bank(sites=("attn.*",), rank=16, alpha=32.0),
            "noise": bank(sites=MLP, experts=8, rank=16, alpha=32.0, gate="token", top_k=2),
            "knowledge": bank(sites=MLP, rank=32, alpha=64.0),
        },
        mixture={**KNOWLEDGE, **ALIGNMENT},
        steps=120,
        learning_rate=1e-3,
    )
    config.stages.align = stage(
        after="aggregate",
        merge=("attention",),
        drop=("noise",),
        states={"knowledge": "frozen"},
        banks={"alignment": bank(sites=MLP, rank=32, alpha=64.0)},
        losses={"orthogonality": orthogonality("alignment", "knowledge", weight=1.0)},
        mixture=ALIGNMENT,
        steps=60,
        learning_rate=5e-4,
    )
    return config
