"""The sections of a recipe's configuration, with every field and its default.

A file in configs/ builds a recipe from these: `recipe()` gives the sections `base`, `data`,
`stages` (together the recipe, fingerprinted by content) and `run` (free to change between
restarts); the other functions give the parts.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def _filled(defaults: dict[str, Any], fields: dict[str, Any]) -> ConfigDict:
    unknown = sorted(set(fields) - set(defaults))
    if unknown:
        raise ValueError(f"no field {', '.join(unknown)}; known: {', '.join(defaults)}")
    return ConfigDict({**defaults, **fields})


def recipe() -> ConfigDict:
    """A recipe with no stage."""
    return ConfigDict(
        {
            # The frozen decoder.
            "base": {
                "path": "",  # directory or file of weights; empty = random weights
                "preset": "",  # architecture, where `path` does not give it
                "decoder": {},  # fields of base.DecoderConfig laid over the preset
                "tokenizer": "",  # file or directory; empty = the one inside `path`
                "dtype": "float32",  # of the frozen weights and the activations
                "quantise": "",  # kernels of the frozen base: int8, nf4, or empty = `dtype`
                "seed": 0,  # of random weights
            },
            # How rows become batches.
            "data": {
                "sources": {},  # {name: source(...)}
                "template": "chatml",
                "mask": "completion",
                "languages": "",  # table of language experts: a published one's name, or a file
                # Rows that name no language get the detected one, if it is at least this probable;
                # 0 = none is detected.
                "detect_language": 0.5,
                "length": 1024,  # tokens a row of a batch
                "global_batch": 8,  # rows a step
                "shards": 8,  # virtual shards; divides global_batch
                "pack": True,
                "seed": 0,
            },
            # Training phases: `order` lists them, the rest are stage(...) by name.
            "stages": {"order": ()},
            # How it is run; none of this changes the result beyond rounding (and, with dropout,
            # which masks the micro-batches draw).
            "run": {
                # Rows over data, fsdp and expert, their tokens over sequence; one of all may be -1.
                "mesh": {"data": 1, "fsdp": -1, "expert": 1, "sequence": 1, "tensor": 1},
                "accumulation": 1,  # micro-batches a step
                "remat": "full",
                "unroll": 1,
                "attention": "auto",
                "kernels": "auto",  # of routing and experts: pallas (TPU), xla, or the fitting one
                "dispatch": "auto",
                "compilation_cache": "",  # directory; empty = JAX's own, or one in the workdir
                "log_every": 10,  # steps
                "save_every": 200,  # steps
                "keep": 2,  # checkpoints of a stage
                "tasks": (),  # evaluated at the end of every stage
                "task_limit": 0,  # items a task; 0 = all
                "score_batch": 16,  # rows of scoring and generation
            },
        }
    )


def stage(**fields: Any) -> ConfigDict:
    """One training phase; unknown fields raise.

    `banks`, `mixture` and `states` are mappings. Times are in steps, `warmup` in shares of them.
    """
    return _filled(
        {
            "after": "",  # stage whose result it starts from; empty = the base
            "merge": (),  # banks merged into the base first
            "drop": (),  # banks dropped first
            "stack": ConfigDict(),  # {new bank: stacked(...)}: banks that become one
            "banks": ConfigDict(),  # {name: bank(...)} added, in state `train`
            "states": ConfigDict(),  # {name: train | gate | frozen | off} of banks that are there
            "train_base": (),  # globs of base leaves trained in this stage
            "losses": ConfigDict(),  # {name: orthogonality(...) or another term}
            "allocators": ConfigDict(),  # {name: allocator(...)}
            "mixture": ConfigDict(),  # {source: weight}
            "steps": 0,  # 0 = by epochs
            "epochs": 1.0,
            "learning_rate": 2e-4,
            "warmup": 0.03,
            "final_learning_rate": 0.0,  # share of learning_rate at the end of the cosine
            "weight_decay": 0.0,
            "clip": 1.0,  # global gradient norm
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "seed": 0,
        },
        fields,
    )


def bank(**fields: Any) -> ConfigDict:
    """A bank of low-rank experts (see `adapters.bank.BankSpec`); `sites` are globs."""
    return _filled(
        {
            "sites": (),
            "layers": (None, None),  # a slice of the layers
            "form": "lora",
            "experts": 1,
            "rank": 16,
            "alpha": 32.0,
            "rank_stabilised": False,
            "gate": "always",
            "top_k": 2,
            "renormalise": True,
            "router_bias": True,
            "router_noise": 0.0,
            "forcing": "train",
            "balance_loss": 0.0,
            "z_loss": 0.0,
            "mix_per_layer": False,
            "mix_softmax": False,
            "dropout": 0.0,
            "learned_scale": False,
        },
        fields,
    )


def stacked(of: tuple[str, ...], gate: str = "skill", **fields: Any) -> ConfigDict:
    """Banks of one expert that become one bank with a gate; it enters in state `gate`.

    The fields are those of the gate in `bank`.
    """
    gates = ("top_k", "renormalise", "router_bias", "router_noise", "balance_loss", "z_loss")
    gates += ("mix_per_layer", "mix_softmax")
    defaults = {key: value for key, value in bank().items() if key in gates}
    return _filled({"of": of, "gate": gate, **defaults}, fields)


def source(
    path: str = "", reader: str = "rows", split: str = "train", prompt: str = "{text}"
) -> ConfigDict:
    """Rows of conversations: a built data set, a JSON/JSONL file, or a named reader's split.

    `prompt` is what the first user turn of every row is put into, at `{text}`.
    """
    return ConfigDict({"path": path, "reader": reader, "split": split, "prompt": prompt})


def orthogonality(of: str, against: str, **fields: Any) -> ConfigDict:
    """The term of `adapters.orthogonality` between two banks."""
    return _filled(
        {
            "kind": "orthogonality",
            "of": of,
            "against": against,
            "weight": 1.0,
            "reduction": "mean",
            "stop_gradient": True,
        },
        fields,
    )


def orthonormality(bank: str, **fields: Any) -> ConfigDict:
    """The term of `adapters.orthonormality` on one bank."""
    return _filled(
        {"kind": "orthonormality", "bank": bank, "weight": 0.5, "squared": False}, fields
    )


def allocator(bank: str, target_rank: int, **fields: Any) -> ConfigDict:
    """Shrinks a bank's ranks while it trains (see `adapters.adalora.Allocator`)."""
    return _filled(
        {
            "bank": bank,
            "target_rank": target_rank,  # a matrix, on average
            "t_init": 0,  # steps before the budget shrinks
            "t_final": 0,  # steps after the ranks are final
            "every": 1,  # steps between two allocations
            "beta1": 0.85,
            "beta2": 0.85,
        },
        fields,
    )


def sparsity(bank: str, **fields: Any) -> ConfigDict:
    """The term of `adapters.sparsity` on one bank's mixing weights."""
    return _filled({"kind": "sparsity", "bank": bank, "weight": 0.05}, fields)
