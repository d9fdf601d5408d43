"""Upcycled checkpoints: whole models in which some feed-forward networks are mixtures of experts.

Axes: N layers of the bank, D model, E experts, F feed-forward.
Such a directory is a Hugging Face model (`checkpoints.huggingface`) except in the layers that
config.json leaves out of `mlp_only_layers`. There each tensor `mlp.X` of the dense network is E
tensors `mlp.experts.{e}.X`, and `mlp.gate.weight` `[E, D]` is a router without bias. A token's
weights are the `num_experts_per_tok` largest of a softmax over all experts, made to sum to one if
`norm_topk_prob`. All this is read in the authors' public code (arXiv 2410.10626).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import decoder, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families, hf_config, huggingface
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.checkpoints.fingerprint import file_fingerprint
from medmoe_jax.checkpoints.placing import fill
from medmoe_jax.checkpoints.released import TRAINED, Imported, check_fit
from medmoe_jax.checkpoints.safetensors_files import INDEX, listed, open_files
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.rules import path_name

# config.json's fields that a bank must agree with.
_FIELDS = {
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
    "norm_topk_prob": "renormalise",
}
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.")
_NETWORK = "layers.mlp."  # what the leaves of a dense network begin with
_ROUTER = "layers.mlp.router.kernel"  # `[N, D, E]`: like a kernel, the other way round on disk

# `(tensor, whether it is the bank's, its place on the leading axes of a leaf)`.
_Entry = tuple[families.Tensor, bool, tuple]


def holds_experts(folder: str | Path) -> bool:
    """Whether a directory has tensors of whole feed-forward experts."""
    folder = Path(folder)
    if (folder / INDEX).is_file() and (names := listed(folder)[0]):
        return any(_EXPERT.match(name) for name in names)
    for path in folder.glob("*.safetensors"):
        # A damaged file tells nothing here; whoever reads the directory names it.
        with contextlib.suppress(SafetensorError), safe_open(path, framework="np") as file:
            if any(_EXPERT.match(name) for name in file.keys()):  # noqa: SIM118
                return True
    return False


def read_upcycled(
    folder: str | Path,
    config: DecoderConfig,
    family: str,
    roster: Roster,
    trained: Collection[str],
    base_before: Callable[[], Mapping[str, Any]],
    shardings: Callable[[Any], Any],
) -> Imported:
    """An upcycled checkpoint as the bank of experts and the base leaves of a stage.

    Tensors stream from the files into their shards, one layer of one expert at a time.

    Args:
      folder: see the module.
      config, family: the dense base; the family is a key of `families.FAMILIES`.
      roster: the stage's banks with their states.
      trained: paths of the base leaves that the stage trains.
      base_before: gives the base's parameters before the stage, for the dense networks in whose
        place the experts stand: the checkpoint has none, and they take no part in the forward pass.
      shardings: gives the shardings of a tree of arrays.

    Returns:
      With `banks` and `base` as float32 arrays on the devices.

    Raises:
      UserError: the directory does not fit the base and the stage. The fields in which they
        disagree come in one message; where there are none, all that is wrong with tensors does.
    """
    folder = Path(folder)
    bank = _check_stage(folder, config, family, roster, trained)
    plan = list(_plan(bank, config, family))
    with contextlib.ExitStack() as stack:
        opened = open_files(folder, stack)
        tied = families.FAMILIES[family].spellings[0].ends if config.tied else None
        opened.check([tensor for tensor, *_ in plan], tied)
        pieces: dict[bool, dict[str, list]] = {True: {}, False: {}}
        for tensor, in_bank, index in plan:
            for part in tensor.parts:
                read = functools.partial(opened.tensors[tensor.name].rows, part)
                pieces[in_bank].setdefault(part.path, []).append((index, read))
        params = _place_bank(bank, config, pieces[True], shardings)
        base = _place_base(config, trained, pieces[False], base_before(), shardings)
    read = (*listed(folder)[1], huggingface.CONFIG, INDEX)
    note = f"layers {bank.start} to {bank.stop - 1} are bank '{bank.name}': {bank.experts} whole "
    note += f"experts, top {bank.top_k}; all else is {len(pieces[False])} leaves of the base"
    return Imported(
        banks={bank.name: params},
        groups={"experts": {"banks": [bank.name]}},
        files={name: file_fingerprint(folder / name) for name in read if (folder / name).is_file()},
        notes=(note,),
        base=base,
    )


# Fitting --------------------------------------------------------------------------------------


def _check_stage(folder: Path, config, family, roster: Roster, trained) -> BankSpec:
    """The bank that the experts become; UserError with all that disagrees."""
    banks = [spec for spec, _ in roster.values() if spec.form == "ffn"]
    problems = [
        f"bank '{name}': the stage trains it, but nothing in the directory is it"
        for name, (spec, state) in roster.items()
        if spec.form != "ffn" and state in TRAINED
    ]
    if len(banks) != 1:
        problems.append(
            "the experts are whole feed-forward networks: one bank with form='ffn' takes them, and "
            f"the stage has {len(banks)}"
        )
    check_fit(folder, problems)
    (bank,) = banks
    hf = read_json(folder / huggingface.CONFIG)
    problems += _architecture(folder, hf, config, family)
    problems += _routing(hf, bank, config)
    paths = {part.path for tensor, in_bank, _ in _plan(bank, config, family) if not in_bank
             for part in tensor.parts}  # fmt: skip
    if frozen := sorted(paths - set(trained)):
        problems.append(
            f"the checkpoint has its own {', '.join(frozen)}, which the stage does not train: set "
            "its train_base=('*',)"
        )
    check_fit(folder, problems)
    return bank


def _architecture(folder: Path, hf, config: DecoderConfig, family: str) -> Iterator[str]:
    """How the checkpoint's dense parts differ from the base."""
    try:
        theirs = hf_config.config_from_hf({**hf, "model_type": family})
    except UserError as error:
        raise UserError(f"{folder / huggingface.CONFIG}: {error}") from None
    # How long a text may be is no part of the function.
    theirs = theirs.replace(max_positions=config.max_positions)
    for name, got, want in hf_config.differences(theirs, config):
        yield f"{huggingface.CONFIG}: {name} is {got!r}, the base's is {want!r}"


def _routing(hf, bank: BankSpec, config: DecoderConfig) -> Iterator[str]:
    """How the checkpoint's mixtures differ from the bank's."""
    for theirs, ours in _FIELDS.items():
        got, want = hf.get(theirs), getattr(bank, ours)
        if got != want:
            at = f"bank '{bank.name}'.{ours}"
            yield f"{huggingface.CONFIG}: {theirs} is {got!r}, {at} is {want!r}"
    dense = [i for i in range(config.n_layers) if not bank.start <= i < bank.stop]
    if (hf.get("mlp_only_layers") or []) != dense:
        yield (
            f"{huggingface.CONFIG}: mlp_only_layers is {hf.get('mlp_only_layers')!r}, but bank "
            f"'{bank.name}' sits on layers {bank.start} to {bank.stop - 1} and leaves {dense}"
        )
    if bank.router_bias:
        yield f"bank '{bank.name}'.router_bias is True, but the checkpoint's routers have no bias"


# Reading --------------------------------------------------------------------------------------


def _plan(bank: BankSpec, config: DecoderConfig, family: str) -> Iterator[_Entry]:
    """Every tensor of the checkpoint."""
    for tensor in families.tensors(config, family):
        path, layer = tensor.parts[0].path, tensor.parts[0].layer
        if path.startswith(_NETWORK) and layer is not None and bank.start <= layer < bank.stop:
            for e in range(bank.experts):
                name = tensor.name.replace(".mlp.", f".mlp.experts.{e}.")
                yield dataclasses.replace(tensor, name=name), True, (layer - bank.start, e)
        else:
            yield tensor, False, (layer,)
    for layer in range(bank.start, bank.stop):
        shape = (bank.experts, config.d_model)
        part = families.Part(_ROUTER, layer, 0, bank.experts)
        router = families.Tensor(f"model.layers.{layer}.mlp.gate.weight", shape, (part,))
        yield router, True, (layer - bank.start,)


def _place_bank(bank: BankSpec, config, pieces: Mapping[str, list], shardings):
    """The bank's parameters: `[N, E, D, F]`, `[N, E, F, D]` and routers `[N, D, E]`."""
    abstract = bank_lib.abstract(bank, config)

    def leaf(path, struct, sharding):
        source = f"layers.{path_name(path).replace('.experts', '.kernel')}"
        return fill(source, struct, sharding, pieces[source])

    return jax.tree_util.tree_map_with_path(leaf, abstract, shardings(abstract))


def _place_base(config, trained, pieces: Mapping[str, list], before, shardings):
    """The base leaves that the stage trains, `before`'s where the checkpoint has nothing."""
    leaves = trees.flatten(decoder.abstract(config, jnp.float32))
    tree = trees.unflatten((path, leaf) for path, leaf in leaves if path in trained)
    where = shardings(tree)

    def placed(path, leaf):
        readers = pieces.get(path, [])
        whole = not path.startswith("layers.") or len(readers) == config.n_layers
        start = None if whole else trees.get(before, path)
        return fill(path, leaf, trees.get(where, path), readers, start=start)

    return trees.unflatten((path, placed(path, leaf)) for path, leaf in trees.flatten(tree))
