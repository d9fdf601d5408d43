"""The sections of a recipe's configuration, with every field and its default.

A file in configs/ builds a recipe from these: `recipe()` gives the sections `base`, `data`,
`stages` (together the recipe, fingerprinted by content) and `run` (free to change between
restarts); the other functions give the parts. A part that stands for a dataclass of another room
has that class's fields and defaults, and is described there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from medmoe_jax.adapters.adalora import Allocator
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.orthogonality import Orthogonality
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.adapters.sparsity import Sparsity

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _filled(known: dict[str, Any], fields: dict[str, Any]) -> ConfigDict:
    """The defaults with some fields given. Raises ValueError for an unknown one."""
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"no field {', '.join(unknown)}; known: {', '.join(known)}")
    return ConfigDict({**known, **fields})


def defaults(kind: type[DataclassInstance]) -> dict[str, Any]:
    """The fields of a dataclass that have a default."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def recipe() -> ConfigDict:
    """A recipe with no stage."""
    return ConfigDict(
        {
            # The frozen decoder.
            "base": {
                "path": "",  # directory or file of weights; empty = random weights
                "preset": "",  # name in base/presets.py of an architecture, where `path` gives none
                "decoder": {},  # fields of base.config.DecoderConfig laid over the preset
                "tokenizer": "",  # file or directory; empty = the one inside `path`
                "dtype": "float32",  # of frozen weights and activations: float32 or bfloat16
                "quantise": "",  # kernels of the frozen base: int8, nf4, or empty = `dtype`
                "seed": 0,  # of random weights
            },
            # How rows become batches.
            "data": {
                "sources": {},  # {name: source(...)}
                "ignore": (),  # keys of rows that are left out and counted; "*_id" is a pattern
                "template": "chatml",  # built-in, `tokenizer` (the base's own), or a .jinja file
                "template_options": {},  # variables of a Jinja template, such as enable_thinking
                "mask": "completion",  # what is learned: completion, answer, qwen_legacy
                "languages": "",  # table of language experts: a published one's name, or a file
                # Rows that name no language get the detected one, if it is at least this probable;
                # 0 = none is detected.
                "detect_language": 0.5,
                "length": 1024,  # tokens a row of a batch
                "global_batch": 8,  # rows a step
                "shards": 8,  # virtual shards; divides global_batch
                "pack": True,  # whether several rows of the sources share a row of a batch
                "seed": 0,  # of the order of the rows
            },
            # Training phases: `order` lists them, the rest are stage(...) by name.
            "stages": {"order": ()},
            # How it is run; none of this changes the result beyond rounding. Of micro-batches each
            # draws its own dropout and router noise, and balances its own tokens (balance_loss).
            "run": {
                # Rows over data, fsdp and expert, their tokens over sequence; one of all may be -1.
                "mesh": {"data": 1, "fsdp": -1, "expert": 1, "sequence": 1, "tensor": 1},
                "accumulation": 1,  # micro-batches a step
                # What the backward pass recomputes: none, all but products and attention (dots),
                # layers (full); auto = dots if that fits into memory, else full.
                "remat": "auto",
                "unroll": 1,  # layers an iteration of the loop over them holds
                "attention": "auto",  # splash (TPU), cudnn (NVIDIA GPU), xla, or the fitting one
                # Of routing, experts and decoding: pallas (TPU), xla, or the fitting one.
                "kernels": "auto",
                "dispatch": "auto",  # of experts: stacked, grouped, all_to_all, or the fitting one
                "compilation_cache": "",  # directory; empty = JAX's own, or one in the workdir
                "log_every": 10,  # steps from a line for the terminal and TensorBoard to the next
                "save_every": 200,  # steps from a checkpoint to the next
                "keep": 2,  # newest checkpoints of a stage that stay
                "trackers": (),  # told the metrics beside TensorBoard: wandb, trackio, mlflow
                "profile": (),  # (first step, steps) of each stage to trace for XProf; () = none
                "tasks": (),  # tasks (docs/tasks.md) scored at the end of every stage
                "task_limit": 0,  # items of each of them; 0 = all
                "score_batch": 16,  # rows of scoring and generation
            },
        }
    )


def evaluation(**fields: Any) -> ConfigDict:
    """What is scored while a stage trains. Raises ValueError for an unknown field."""
    return _filled(
        {
            "every": 0,  # steps from one evaluation to the next, and after the last; 0 = none
            "tasks": (),  # names, suites and files, as `medmoe eval` takes them
            "limit": 0,  # items a task; 0 = all
            "sources": (),  # of data.sources, trained on by no weight: the loss on all their rows
            # The score by which one evaluation is better than another, and whose best checkpoint
            # is kept: a task's name, mean (over the tasks), or loss (on the sources); "" = none.
            "best": "",
            "patience": 0,  # evaluations in a row without a better one that end the stage; 0 = none
            "final": "last",  # the step that the stage ends with: last, or best
        },
        fields,
    )


def stage(**fields: Any) -> ConfigDict:
    """One training phase. Raises ValueError for an unknown field."""
    return _filled(
        {
            "after": "",  # stage whose result it starts from; empty = the base
            "merge": (),  # banks merged into the base first
            "drop": (),  # banks dropped first
            "stack": ConfigDict(),  # {new bank: stacked(...)}: banks that become one
            "banks": ConfigDict(),  # {name: bank(...)} added, in state `train`
            "states": ConfigDict(),  # {name: train | gate | frozen | off} of banks that are there
            "train_base": (),  # globs of base leaves trained in this stage
            "losses": ConfigDict(),  # {name: orthogonality(...) or another loss}
            "allocators": ConfigDict(),  # {name: allocator(...)}
            "mixture": ConfigDict(),  # {source: weight}: how many of its rows for one of another's
            "evaluation": evaluation(),  # what is scored while it trains
            "steps": 0,  # updates of the weights; 0 = as many as `epochs` take
            "epochs": 1.0,  # 1 = as many rows as the sources of the mixture hold together
            "learning_rate": 2e-4,  # after the warm-up; then a cosine
            "warmup": 0.03,  # share of the steps
            "final_learning_rate": 0.0,  # share of learning_rate at the end of the cosine
            "weight_decay": 0.0,  # of AdamW, times the learning rate
            "clip": 1.0,  # longest norm of the whole gradient; 0 = not clipped
            "b1": 0.9,  # decay of AdamW's mean of gradients
            "b2": 0.999,  # decay of its mean of their squares
            "eps": 1e-8,  # added to the root of that mean
            "seed": 0,  # of the banks' first values, dropout and noise
        },
        fields,
    )


def bank(**fields: Any) -> ConfigDict:
    """A bank of experts: the fields of `adapters.bank.BankSpec`, and where it sits."""
    own = defaults(BankSpec)
    for place in ("sites", "start", "stop"):
        del own[place]
    return _filled(
        {
            "sites": (),  # globs of the linear layers it sits on, such as "attn.*" and "mlp.up"
            "layers": (None, None),  # slice of the decoder's layers: (-2, None) = the last two
            **own,
        },
        fields,
    )


# The fields of a bank that say how its gate works.
_GATE = ("top_k", "renormalise", "router_bias", "router_noise", "balance_loss", "z_loss")
_GATE += ("mix_per_layer", "mix_softmax")


def stacked(of: tuple[str, ...], gate: str = "skill", **fields: Any) -> ConfigDict:
    """Banks of one expert that become one bank with a gate; it enters in state `gate`.

    The fields are those of the gate in `bank`.
    """
    own = {key: value for key, value in defaults(BankSpec).items() if key in _GATE}
    return _filled({"of": of, "gate": gate, **own}, fields)


def source(
    path: str | os.PathLike[str] = "",
    reader: str = "rows",
    split: str = "train",
    prompt: str = "{text}",
    columns: Mapping[str, str] | None = None,
    window: int = 0,
) -> ConfigDict:
    """Rows of conversations: a file or built data set (docs/data.md), or a named reader's split.

    Args:
      path: the file, folder, built data set, or address on a hub or on object storage.
      reader: `rows`, the forms of docs/data.md, or the name of a known set (docs/tasks.md), which
        needs no path.
      split: which part of the rows, where there are several.
      prompt: what the first user turn of every row is put into, at `{text}`.
      columns: by key of a form of rows, the name that these rows give it: `{"prompt": "Question"}`.
      window: rows; with one, JSON lines and Parquet files of any size are streamed and shuffled in
        a window of so many. 0 = all rows are read, checked and counted before the first step.
    """
    fields = {"reader": reader, "split": split, "prompt": prompt, "window": window}
    return ConfigDict({"path": os.fspath(path), **fields, "columns": dict(columns or {})})


def orthogonality(of: str, against: str, **fields: Any) -> ConfigDict:
    """The loss between two banks of `adapters.orthogonality.Orthogonality`."""
    own = {"kind": "orthogonality", "of": of, "against": against}
    return _filled({**own, **defaults(Orthogonality)}, fields)


def orthonormality(bank: str, **fields: Any) -> ConfigDict:
    """The loss on one bank of `adapters.orthonormality.Orthonormality`."""
    return _filled({"kind": "orthonormality", "bank": bank, **defaults(Orthonormality)}, fields)


def sparsity(bank: str, **fields: Any) -> ConfigDict:
    """The loss on one bank's mixing weights of `adapters.sparsity.Sparsity`."""
    return _filled({"kind": "sparsity", "bank": bank, **defaults(Sparsity)}, fields)


def allocator(bank: str, target_rank: int, **fields: Any) -> ConfigDict:
    """Shrinks a bank's ranks while it trains: the fields of `adapters.adalora.Allocator`."""
    own = {"bank": bank, "target_rank": target_rank}
    return _filled({**own, **defaults(Allocator)}, fields)
