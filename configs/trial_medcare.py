"""MedCare's two stages on SmolLM2: does dropping the noise bank pay, and does orthogonality?

  python benchmarks/trials.py run medcare --smollm2=MODEL
  medmoe train --config=configs/trial_medcare.py --workdir=runs/trials/medcare/seed0

The argument is the folder of the run, where the first command puts its rows: the demonstration's
180 facts and public sets under $MEDMOE_DATA (default ../shared/data). Stage `aggregate` reads all
of KNOWLEDGE and ALIGNMENT. The others start from it and read ALIGNMENT:

- `orthogonal`: the second stage of configs/medcare.py; WEIGHTS have other weights λ of its term;
- `frozen`: without the term; the knowledge bank is frozen, as in all others but `free`;
- `free`: without the term, and the knowledge bank goes on training;
- `replay`: `frozen`, and a tenth of the rows are knowledge again;
- `kept`: `orthogonal`, but the noise bank stays where it is, frozen.
"""

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage

KNOWLEDGE = {"facts": 2.0, "pubmedqa": 1.0, "medmcqa": 1.0, "medquad": 1.0}
ALIGNMENT = dict.fromkeys(
    ("rqe", "mts_section", "ncbi_disease", "bc5cdr", "meqsum", "mts_dialog"), 1.0
)
TENTH = sum(ALIGNMENT.values()) / 9 / sum(KNOWLEDGE.values())  # of the rows are knowledge
WEIGHTS = {"orthogonal_weak": 0.1, "orthogonal": 1.0, "orthogonal_strong": 10.0}
ALIGNED = (*WEIGHTS, "frozen", "free", "replay", "kept")
MLP = ("mlp.*",)


def align(weight: float = 0.0, knowledge: str = "frozen", **fields) -> ConfigDict:
    """A second stage; a weight of 0 leaves the orthogonality term out."""
    term = {"orthogonality": orthogonality("alignment", "knowledge", weight=weight)}
    ours = {
        "after": "aggregate",
        "merge": ("attention",),
        "drop": ("noise",),
        "states": {"knowledge": knowledge},
        "banks": {"alignment": bank(sites=MLP, rank=32, alpha=64.0, dropout=0.05)},
        "losses": term if weight else {},
        "mixture": ALIGNMENT,
        "steps": 80,
        "learning_rate": 1e-3,
    }
    return stage(**{**ours, **fields})


def get_config(arg: str = "runs/trials/medcare/seed0") -> ConfigDict:
    """The recipe; `arg` is the folder of the run."""
    config = recipe()
    config.base.path = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    config.base.dtype = "bfloat16"
    config.data.template = "tokenizer"
    config.data.length = 256
    config.data.global_batch = 8
    for name in (*KNOWLEDGE, *ALIGNMENT):
        config.data.sources[name] = source(f"{arg}/rows/train/{name}.jsonl")
    config.stages.order = ("aggregate", *ALIGNED)
    config.stages.aggregate = stage(
        banks={
            "attention": bank(sites=("attn.*",), rank=16, alpha=32.0, dropout=0.05),
            "noise": bank(
                sites=MLP, experts=8, rank=16, alpha=32.0, gate="token", top_k=2, dropout=0.05
            ),
            "knowledge": bank(sites=MLP, rank=32, alpha=64.0, dropout=0.05),
        },
        mixture={**KNOWLEDGE, **ALIGNMENT},
        steps=150,
        learning_rate=1e-3,
    )
    for name, weight in WEIGHTS.items():
        config.stages[name] = align(weight)
    config.stages.frozen = align()
    config.stages.free = align(knowledge="train")
    again = {name: TENTH * weight for name, weight in KNOWLEDGE.items()}
    config.stages.replay = align(mixture={**ALIGNMENT, **again})
    config.stages.kept = align(1.0, drop=(), states={"knowledge": "frozen", "noise": "frozen"})
    config.run.score_batch = 64
    return config
