"""PEFT's adapter directories as banks and as leaves of the base.

Axes: N layers of a bank, D input width, E experts, r rank, O output width, V vocabulary.
A module is a linear layer of the Hugging Face model, fused ones included, its head or its
embedding; its weight is `W [O, D]`, of the last two `[V, D]`. With `s` from adapter_config.json:

    LoRA, AdaLoRA       W' = W + s B Λ A              A [r, D], B [O, r]
    of an embedding     W' = W + s (B A)ᵀ             A [r, V], B [D, r]
    DoRA                W' = m V / |V|, V = W + s B A    of rows; of an embedding, of columns
    modules_to_save, bias    W' and biases as they are
    trainable_token_indices  rows of W' as they are

Linear layers of the blocks become a bank; what a bank cannot be becomes leaves of the base, with
DoRA `(m / |V|) W`, beside a bank whose B has the factor too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import decoder, trees
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.folded import FoldedWeights
from medmoe_jax.checkpoints.peft_names import CONFIG, Contents, Key, open_contents, site_of
from medmoe_jax.checkpoints.peft_options import LEAVES, MAGNITUDE, TOKENS, Options, Scaling
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.host import to_host


class Adapter(NamedTuple):
    """An adapter as this project has it.

    Attributes:
      spec, params: a bank of one always-on expert, float32 numpy arrays as `adapters.bank.shapes`;
        None and empty where no linear layer of a block has an adapter.
      leaves: leaves of the base, whole and float32, in the place of its own.
      notes: what of the files has no effect, for people.
    """

    spec: BankSpec | None
    params: dict[str, Any]
    leaves: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Module:
    """A module's adapter, in float32: the tensors of the equations, and its weight's place."""

    weight: families.Tensor
    scaling: Scaling
    a_rxD: np.ndarray
    b_Oxr: np.ndarray
    scale_r: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer of a block."""
        return families.transposed(self.weight.parts[0].path)

    @property
    def layer(self) -> int:
        """The number of its block; 0 for an end, which lies in none."""
        return self.weight.parts[0].layer or 0

    @property
    def is_embedding(self) -> bool:
        """Whether it looks rows up instead of multiplying with them."""
        return self.weight.parts[0].path == "embed"

    @property
    def delta_OxD(self) -> np.ndarray:
        """What LoRA adds to the weight."""
        b_Oxr = self.b_Oxr if self.scale_r is None else self.b_Oxr * self.scale_r
        return np.float32(self.scaling.s) * (b_Oxr @ self.a_rxD)


class _Given(NamedTuple):
    """What an adapter's files hold.

    Attributes:
      modules: adapters by module.
      own: new values by parameter of the base.
      rows: numbers and new values of rows, by parameter of the base.
    """

    modules: dict[str, _Module]
    own: dict[str, np.ndarray]
    rows: dict[str, tuple[list[int], np.ndarray]]


def read_peft(
    folder: str | Path,
    config: DecoderConfig,
    family: str,
    name: str,
    base: Callable[[], Params],
) -> Adapter:
    """A PEFT LoRA, AdaLoRA or DoRA adapter with all that was trained beside it.

    In the bank modules of unequal rank are padded with zeros to the largest, and modules that the
    adapter leaves out are zero; where scalings differ, each module's is moved into its B. A fused
    module becomes several sites with the same A.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors, or adapter_model.bin.
      config, family: the base it was trained on; the family is a key of `families.FAMILIES`.
      name: of the bank.
      base: gives the base's parameters; called where the adapter changes leaves of it.

    Raises:
      UserError: a file is missing or damaged, the adapter does what neither a bank nor a leaf can,
        or it belongs to another base; one message lists everything.
    """
    folder = Path(folder)
    options = Options.read(folder)
    problems = options.problems()
    given, modules, leaves = _Given({}, {}, {}), {}, {}
    if not problems:
        try:
            with open_contents(folder, config, family) as contents:
                given, problems = _read(contents, options, config.tied)
                if not problems:
                    changed = _change_base(contents.parameters, options, given, config, base)
                    modules, leaves, problems = changed
        except UserError as error:
            problems = [str(error)]
    if problems:
        raise UserError(
            f"{folder}: not an adapter that fits this base ({family}, {config.n_layers} layers, "
            f"width {config.d_model}); {len(problems)} problems\n  " + "\n  ".join(problems)
        )
    notes = tuple(options.notes())
    if options.bias == "lora_only" and not any(n.endswith(".bias") for n in given.own):
        notes += ("bias is 'lora_only', but PEFT wrote no bias into the file: the base's stay",)
    linear = {module: found for module, found in modules.items() if found.is_linear}
    if not linear:
        return Adapter(None, {}, leaves, notes)
    return Adapter(*_bank(name, options, config, linear), leaves, notes)


# Reading --------------------------------------------------------------------------------------


def _read(contents: Contents, options: Options, tied: bool) -> tuple[_Given, list[str]]:
    """What the file holds of what adapter_config.json names, and what is wrong."""
    modules, own, rows = found = _Given({}, {}, {})
    problems, left = list(contents.problems), dict(contents.tensors)
    targets = _targets(contents, options, tied)
    for parameter, weight in contents.parameters.items():
        module, _, leaf = parameter.rpartition(".")
        if (given := left.pop(Key(module, leaf), None)) is not None:
            own[parameter] = given[1].read().astype(np.float32)
            more = _other_vocabulary(own[parameter].shape, weight)
            problems += _wrong(given[0], own[parameter], weight.shape, more)
        elif options.saves(parameter) or (options.bias == "all" and leaf == "bias"):
            problems.append(f"{parameter}: missing, but {CONFIG} says that it was trained")
        if parameter in targets:
            adapter, wrong = _read_module(module, weight, options, left)
            problems += wrong
            modules |= {module: adapter} if adapter else {}
        path = weight.parts[0].path
        if path in ("embed", "head") and Key(module, TOKENS) in left:
            name, tensor = left.pop(Key(module, TOKENS))
            numbers, values = options.token_rows(module, path == "embed"), tensor.read()
            rows[parameter] = numbers, values.astype(np.float32)
            problems += _wrong(name, values, (len(numbers), weight.shape[1]))
            problems += _wrong_rows(numbers, weight.shape[0])
    for (module, _), (name, _) in sorted(left.items()):
        problems.append(f"{name}: '{module}' is left out by {CONFIG}")
    if not any(found) and not problems:
        problems.append(f"{CONFIG}: target_modules matches no linear layer of this base")
    return found, problems


def _other_vocabulary(shape: tuple[int, ...], weight: families.Tensor) -> str:
    """What to do where an embedding or a head has other tokens than the base's."""
    if weight.parts[0].path not in ("embed", "head") or shape[1:] != weight.shape[1:]:
        return ""
    count = shape[0]
    return f" (for a base of {count} tokens: save yours after resize_token_embeddings({count}))"


def _wrong_rows(numbers: list[int], rows: int) -> Iterator[str]:
    if not all(type(number) is int and 0 <= number < rows for number in numbers):
        yield f"{CONFIG}: trainable_token_indices: {numbers} are no numbers of {rows} tokens"


def _targets(contents: Contents, options: Options, tied: bool) -> set[str]:
    """The parameters on which there is an adapter."""
    out, ends = set(), set()
    for parameter, weight in contents.parameters.items():
        module, _, leaf = parameter.rpartition(".")
        path = weight.parts[0].path
        if path in ("embed", "head"):
            ends.add(parameter)
        elif leaf != "weight" or not families.transposed(path):
            continue
        if _has_adapter(module, contents, options, families.transposed(path)):
            out.add(parameter)
    # PEFT then puts one on the other end too, and names it nowhere.
    return out | ends if options.tied and tied and ends & out else out


def _has_adapter(module: str, contents: Contents, options: Options, in_block: bool) -> bool:
    if options.tells_targets:
        return options.targets(module, in_block)
    return any(Key(module, leaf) in contents.tensors for leaf in ("lora_A", "lora_embedding_A"))


def _read_module(
    module: str, weight: families.Tensor, options: Options, left: dict[Key, tuple[str, Any]]
) -> tuple[_Module | None, list[str]]:
    """A module's adapter, whose tensors are taken out of `left`."""
    scaling, embedding = options.scaling(module), weight.parts[0].path == "embed"
    leaves = [*LEAVES[options.kind], *([MAGNITUDE] if options.decomposed else [])]
    if embedding:
        leaves = [leaf.replace("lora_A", "lora_embedding_A") for leaf in leaves]
        leaves = [leaf.replace("lora_B", "lora_embedding_B") for leaf in leaves]
    keys = [Key(module, leaf) for leaf in leaves]
    missing = [f"{module}.{key.leaf}: missing" for key in keys if key not in left]
    given = [left.pop(key) for key in keys if key in left]
    if missing:
        return None, missing
    names = [name for name, _ in given]
    arrays = [tensor.read().astype(np.float32) for _, tensor in given]
    O, D = weight.shape
    # Only AdaLoRA prunes ranks.
    rank = arrays[2].size if options.kind == "ADALORA" else scaling.rank
    shapes: list[tuple[int, ...]] = [(rank, O), (D, rank)] if embedding else [(rank, D), (O, rank)]
    shapes += [(rank, 1)] if options.kind == "ADALORA" else []
    shapes += [(D if embedding else O,)] if options.decomposed else []
    problems = []
    for name, array, shape in zip(names, arrays, shapes, strict=True):
        problems += _wrong(name, array, shape, f" (rank {scaling.rank})")
    if rank > scaling.rank:
        problems.append(f"{names[0]}: rank {rank}, {CONFIG} says {scaling.rank}")
    if problems:
        return None, problems
    a, b = (arrays[1].T, arrays[0].T) if embedding else arrays[:2]
    return _Module(
        weight,
        scaling,
        a,
        b,
        arrays[2][:, 0] if options.kind == "ADALORA" else None,
        arrays[-1] if options.decomposed else None,
    ), []


def _wrong(name: str, array: np.ndarray, shape: tuple[int, ...], more: str = "") -> Iterator[str]:
    if array.shape != shape:
        yield f"{name}: shape {array.shape}, expected {shape}{more}"
    elif not np.isfinite(array).all():
        yield f"{name}: NaN or infinity"


# Leaves of the base ---------------------------------------------------------------------------


def _change_base(
    plan: Mapping[str, families.Tensor],
    options: Options,
    given: _Given,
    config: DecoderConfig,
    base: Callable[[], Params],
) -> tuple[dict[str, _Module], dict[str, Any], list[str]]:
    """`(the modules as a bank takes them, leaves of the base that are changed, problems)`."""
    modules, own, rows = given
    folded = {m: f for m, f in modules.items() if f.magnitude is not None or not f.is_linear}
    if not (own or rows or folded):
        return modules, {}, []
    params = base()
    # A head that is tied begins as the embedding.
    before = FoldedWeights({**params, "head": decoder.head(params)}, (), np.float32)
    changed = dict(own)
    for name, (numbers, values) in rows.items():
        changed[name] = np.array(changed[name] if name in changed else before.tensor(plan[name]))
        changed[name][numbers] = values
    for module, found in folded.items():
        name = found.weight.name
        w_OxD = changed[name] if name in changed else before.tensor(found.weight)
        new_OxD = w_OxD + found.delta_OxD
        if found.magnitude is not None:
            axis = 0 if found.is_embedding else 1
            factor = found.magnitude / np.linalg.norm(new_OxD, axis=axis)
            factor = np.expand_dims(factor, axis)
            if not np.isfinite(factor).all():
                return modules, {}, [f"{module}: has a row of length 0, which no magnitude scales"]
            new_OxD = factor * (w_OxD if found.is_linear else new_OxD)
            if found.is_linear:
                modules = {**modules, module: replace(found, b_Oxr=factor * found.b_Oxr)}
        changed[name] = new_OxD
    changed = {
        name: value
        for name, value in changed.items()
        if not np.array_equal(value, before.tensor(plan[name]))
    }
    if config.tied:
        # PEFT trains the rows of both ends as one.
        ends = [f for f in folded.values() if f.weight.parts[0].layer is None]
        advice = "train the adapter with ensure_weight_tying"
        if any(found.magnitude is not None for found in ends):
            advice = "DoRA scales each by itself; train the adapter with both out of target_modules"
        changed, problems = _tie(changed, plan, before, options.tied or bool(rows), advice)
        if problems:
            return modules, {}, problems
    return modules, _leaves(changed, plan, params), []


def _tie(
    changed: Mapping[str, np.ndarray],
    plan: Mapping[str, families.Tensor],
    before: FoldedWeights,
    together: bool,
    advice: str,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The changes of a base whose head is its embedding: one of the two, and problems."""
    embed, head = (
        next(name for name, tensor in plan.items() if tensor.parts[0].path == path)
        for path in ("embed", "head")
    )
    rest = {name: value for name, value in changed.items() if name not in (embed, head)}
    if not {embed, head}.intersection(changed):
        return rest, []
    old = before.tensor(plan[embed])
    if together:
        old = changed[embed] if embed in changed else changed[head]
    values = [changed.get(name, old) for name in (embed, head)]
    if np.abs(values[0] - values[1]).max() > 1e-6 * np.abs(values[0]).max():
        return rest, [
            f"{embed} and {head} become different, but this base ties them "
            f"(tie_word_embeddings): {advice}"
        ]
    return {embed: values[0], **rest}, []


def _leaves(
    changed: dict[str, np.ndarray], plan: Mapping[str, families.Tensor], params: Params
) -> dict[str, Any]:
    """The base's leaves, float32, with the changed tensors in them.

    Leaf by leaf, and `changed` is empty afterwards: together they may be the model twice.
    """
    leaves: dict[str, np.ndarray] = {}
    for name in sorted(changed, key=lambda name: plan[name].parts[0].path):
        value = changed.pop(name)
        for part in plan[name].parts:
            rows = value[part.start : part.stop]
            if part.layer is None:
                leaves[part.path] = rows
                continue
            if part.path not in leaves:
                leaf = trees.get(params, part.path).astype(jnp.float32)
                leaves[part.path] = np.array(to_host(leaf))
            leaves[part.path][part.layer] = rows.T if families.transposed(part.path) else rows
    return trees.unflatten(leaves.items())


# The bank -------------------------------------------------------------------------------------


def _bank(
    name: str, options: Options, config: DecoderConfig, modules: Mapping[str, _Module]
) -> tuple[BankSpec, dict[str, Any]]:
    layers = [found.layer for found in modules.values()]
    present = {site_of(part) for found in modules.values() for part in found.weight.parts}
    rank = max(found.scaling.rank for found in modules.values())
    equal = len({found.scaling for found in modules.values()}) == 1
    first = next(iter(modules.values())).scaling
    spec = BankSpec(
        name=name,
        sites=tuple(site for site in site_shapes(config) if site in present),
        start=min(layers),
        stop=max(layers) + 1,
        rank=rank,
        alpha=first.alpha if equal else float(rank),
        rank_stabilised=first.root and equal,
        dropout=options.dropout,
        learned_scale=options.kind == "ADALORA",
    )
    params: dict[str, Any] = {}
    for site in spec.sites:
        D, O = site_shapes(config)[site]
        params[site] = {
            "lora_a": np.zeros((spec.layers, D, 1, rank), np.float32),
            "lora_b": np.zeros((spec.layers, 1, rank, O), np.float32),
        }
        if spec.learned_scale:
            params[site]["scale"] = np.zeros((spec.layers, 1, rank), np.float32)
    for found in modules.values():
        r, i = found.a_rxD.shape[0], found.layer - spec.start
        for part in found.weight.parts:
            leaves = params[site_of(part)]
            leaves["lora_a"][i, :, 0, :r] = found.a_rxD.T
            b_rxO = found.b_Oxr[part.start : part.stop].T
            leaves["lora_b"][i, 0, :r] = b_rxO if equal else found.scaling.s * b_rxO
            if found.scale_r is not None:
                leaves["scale"][i, 0, :r] = found.scale_r
    return spec, params
