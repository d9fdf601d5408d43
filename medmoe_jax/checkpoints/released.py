"""Adapter directories made by other tools, and which bank of a stage each of their parts is.

Axes: N layers of a bank, D input width, E experts, r rank, O output width.
A directory holds groups of tensors. `adapter_model.safetensors` (or `.bin`) is one group, in PEFT's
names, and may hold leaves of the base too (`checkpoints.peft`). The groups in
`non_lora_trainables.bin` and `model.safetensors` are the entries of `LAYOUTS`: blocks beside the
linear layers of the MLP, each adding `s · B A x`, where `s = alpha / r` comes from
adapter_config.json whatever the block's own rank.

What is known of `LAYOUTS`. The names, the scaling, the routing (softmax over all experts, the k
largest renormalised, for each linear layer a router with bias) and the files that a second stage
may lie in are read in the authors' public code (arXiv 2404.09027, 2406.17484); a second stage's
`base` begins as the first one's `share_experts`. Ours is the matching: a group becomes the banks of
its gate that sit on its sites; where several groups share a site, the n-th of them, in the order
below, is the n-th such bank, in the order in which the stages add them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.checkpoints.fingerprint import file_fingerprint
from medmoe_jax.checkpoints.peft import Adapter, read_peft
from medmoe_jax.checkpoints.peft_names import CONFIG, PICKLED, WEIGHTS, linear_modules, site_of
from medmoe_jax.checkpoints.safetensors_files import open_safetensors
from medmoe_jax.checkpoints.torch_files import TorchTensor, open_torch
from medmoe_jax.errors import UserError

OTHERS, _TENSORS, MODEL = "non_lora_trainables.bin", "model.safetensors", "config.json"
TOP_K = "num_experts_per_token"  # a field of MODEL
TRAINED = ("train", "gate")  # states in which a stage changes a bank
_FILES = (CONFIG, WEIGHTS, PICKLED, OTHERS, _TENSORS, MODEL)


@dataclass(frozen=True)
class BlockLayout:
    """How a group of blocks is stored.

    Attributes:
      name: of the group.
      gate: of the banks that it can be.
      tensors: for each leaf of a bank the tensor's name after that of the linear layer; `{e}` is
        the expert's number.
    """

    name: str
    gate: str
    tensors: Mapping[str, str]


def _block(name: str, inside: str) -> BlockLayout:
    """One always-on expert in a module of its own."""
    return BlockLayout(
        name, "always", {f"lora_{x.lower()}": f"{inside}.lora_{x}.weight" for x in "AB"}
    )


LAYOUTS = (
    BlockLayout(
        "experts",
        "token",
        {
            "lora_a": "experts.{e}.lora_A_{e}.weight",
            "lora_b": "experts.{e}.lora_B_{e}.weight",
            "router.kernel": "switch.weight",
            "router.bias": "switch.bias",
        },
    ),
    _block("shared", "share_experts"),
    _block("base", "base"),
    _block("orth", "orth"),
)

# Where a stored tensor goes: layer i (and expert e) of a leaf, a view in the tensor's own axes.
VIEWS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "lora_a": lambda leaf_NxDxExr, i, e: leaf_NxDxExr[i, :, e].T,
    "lora_b": lambda leaf_NxExrxO, i, e: leaf_NxExrxO[i, e].T,
    "scale": lambda leaf_NxExr, i, e: leaf_NxExr[i, e],
    "router.kernel": lambda leaf_NxDxE, i, e: leaf_NxDxE[i].T,
    "router.bias": lambda leaf_NxE, i, e: leaf_NxE[i],
}


class _Key(NamedTuple):
    """Which leaf a tensor is part of; a router's tensors have expert 0."""

    site: str
    layer: int
    leaf: str
    expert: int

    def __str__(self) -> str:
        return f"{self.leaf} of {self.site}, layer {self.layer}, expert {self.expert}"


class _Piece(NamedTuple):
    """A tensor, or the rows of one that belong to a site; `name` is for messages."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class _Group:
    """Tensors that make up banks: their gate, scaling and, where it is known, the router's k."""

    name: str
    gate: str
    s: float
    top_k: int | None = None
    pieces: dict[_Key, _Piece] = field(default_factory=dict)

    @functools.cached_property
    def sites(self) -> set[str]:
        return {key.site for key in self.pieces}


@dataclass(frozen=True)
class Imported:
    """What a directory gives to a stage.

    Attributes:
      banks: `{bank: parameters}`, float32 numpy arrays as `adapters.bank.shapes`.
      groups: `{group: {"banks": names, "s"?: its scaling}}`. Where that is not the bank's own s,
        the quotient has been multiplied into B (in float32: exact where it is a power of two).
      files: `{file: fingerprint}` of all that was read.
      notes: what became of it, line by line.
      base: base leaves, where the directory holds a whole model.
    """

    banks: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    files: dict[str, str]
    notes: tuple[str, ...]
    base: dict[str, Any] = field(default_factory=dict)


def check_fit(folder: Path, problems: list[str]) -> None:
    """Raise UserError with all the problems, if there are any."""
    if problems:
        lines = "\n  ".join(dict.fromkeys(problems))
        raise UserError(f"{folder}: does not fit this stage; nothing was imported\n  {lines}")


def read_adapter(
    folder: str | Path,
    config: DecoderConfig,
    family: str,
    roster: Roster,
    trained: Collection[str],
    base_before: Callable[[], Params],
) -> Imported:
    """An adapter directory as the banks and the base leaves of a stage.

    Banks and leaves that the stage trains must all be in it, whole; a bank in another state may be
    left out.

    Args:
      folder: what PEFT, or one of the tools above, has written.
      config, family: the base; the family is a key of `families.FAMILIES`.
      roster: the stage's banks with their states.
      trained: paths of the base leaves that the stage trains.
      base_before: gives the base's parameters before the stage; called where the directory changes
        leaves of it.

    Raises:
      UserError: the directory does not fit the base and the banks; one message lists everything.
    """
    folder = Path(folder)
    files = [name for name in _FILES if (folder / name).is_file()]
    if WEIGHTS in files and PICKLED in files:
        files.remove(PICKLED)  # the same again, as PEFT has it
    known = (WEIGHTS, PICKLED, OTHERS, _TENSORS)
    if not set(known).intersection(files):
        raise UserError(f"{folder}: holds none of {', '.join(known)}")
    banks: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        groups, adapter, problems = _open(folder, files, config, family, roster, base_before, stack)
        places, unplaced = _assign(groups, roster)
        # What a damaged file would have given is not missed as well.
        problems = problems or [*_misplaced(adapter.leaves, trained), *unplaced]
        for name, at in places.items():
            banks[name], wrong = _fill(roster[name][0], at, config)
            problems += wrong
    check_fit(folder, problems)
    taken = {
        group.name: {
            "banks": [name for name, at in places.items() if group in at.values()],
            "s": group.s,
        }
        for group in groups
    }
    fingerprints = {name: file_fingerprint(folder / name) for name in files}
    notes = [*_notes(taken, roster), *_left_out(banks, roster), *adapter.notes]
    if adapter.leaves:
        paths = ", ".join(path for path, _ in trees.flatten(adapter.leaves))
        notes.append(f"leaves of the base: {paths}")
    return Imported(banks, taken, fingerprints, tuple(notes), adapter.leaves)


def _misplaced(leaves: Params, trained: Collection[str]) -> Iterator[str]:
    """Leaves that the stage does not train, and leaves that it trains and that are not there."""
    given = {path for path, _ in trees.flatten(leaves)}
    if surplus := sorted(given - set(trained)):
        yield (
            f"the adapter has its own {', '.join(surplus)}, which the stage does not train: name "
            f"them in its train_base"
        )
    if absent := sorted(set(trained) - given):
        yield f"train_base: the adapter has no {', '.join(absent)} of its own; do not name it there"


def _notes(groups: Mapping[str, Mapping[str, Any]], roster: Roster) -> Iterator[str]:
    for group, entry in groups.items():
        for bank in entry["banks"]:
            spec = roster[bank][0]
            line = f"group '{group}' is bank '{bank}': {' '.join(spec.sites)}, "
            line += f"{spec.experts} x {spec.rank}, s {entry['s']:g}"
            if entry["s"] != spec.s:
                line += f"; the bank's s is {spec.s:g}, so B is multiplied by their quotient"
            yield line


def _left_out(banks: Mapping[str, Any], roster: Roster) -> Iterator[str]:
    """Layers in which a bank is nothing, and stays so: a product of two zeros has no gradient."""
    for bank, params in banks.items():
        for site, leaves in params.items():
            zeros = np.flatnonzero(~leaves["lora_a"].any(axis=(1, 2, 3))) + roster[bank][0].start
            if zeros.size:
                numbers = ", ".join(map(str, zeros))
                yield f"bank '{bank}': the adapter leaves out {site} of layers {numbers}: zeros"


# Reading --------------------------------------------------------------------------------------


def _open(
    folder: Path, files, config, family, roster: Roster, base_before, stack
) -> tuple[list[_Group], Adapter, list[str]]:
    """The directory's groups, in the order of their meaning, PEFT's adapter, and what is wrong."""
    groups, adapter, problems, tensors = [], Adapter(None, {}, {}), [], {}
    if {WEIGHTS, PICKLED}.intersection(files):
        try:
            adapter = read_peft(folder, config, family, "lora", base_before)
            if adapter.spec:
                groups.append(_peft_group(adapter.spec, adapter.params, roster))
        except UserError as error:
            problems.append(str(error))
    for name, opened in ((OTHERS, open_torch), (_TENSORS, open_safetensors)):
        if name in files:
            try:
                tensors |= stack.enter_context(opened(folder / name))
            except UserError as error:
                problems.append(str(error))
    if tensors:
        more, wrong = _block_groups(folder, tensors, linear_modules(config, family))
        groups += more
        problems += wrong
    return groups, adapter, problems


def _peft_group(spec: BankSpec, params: Params, roster: Roster) -> _Group:
    """PEFT's adapter, its zero padding cut where it goes beyond the rank of the banks there.

    Layers that it leaves out between others are zeros, as they add nothing there.
    """
    group = _Group(spec.name, spec.gate, spec.s)
    for site in spec.sites:
        banks = [b for b, _ in roster.values() if site in b.sites and b.gate == spec.gate]
        wanted = max((b.rank for b in banks), default=spec.rank)
        padding = not params[site]["lora_a"][..., wanted:].any()
        rank = min(wanted, spec.rank) if padding else spec.rank
        given = np.flatnonzero(params[site]["lora_a"].any(axis=(1, 2, 3))).tolist()
        layers = range(given[0], given[-1] + 1) if given else ()
        for i, (leaf, array) in itertools.product(layers, params[site].items()):
            view = VIEWS[leaf](array, i, 0)
            view = view[:, :rank] if leaf == "lora_b" else view[:rank]
            key = _Key(site, spec.start + i, leaf, 0)
            group.pieces[key] = _Piece(str(key), view.shape, functools.partial(np.asarray, view))
    return group


def _block_groups(
    folder: Path, tensors: Mapping[str, TorchTensor], modules: Mapping[str, families.Tensor]
) -> tuple[list[_Group], list[str]]:
    """The groups of `LAYOUTS` that are there, and the tensors that belong to none."""
    options = _fields(folder / CONFIG)
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; give two numbers")
    s = alpha / (rank**0.5 if options.get("use_rslora") else rank)
    model = _fields(folder / MODEL) if (folder / MODEL).is_file() else {}
    top_k = model.get(TOP_K)
    groups = {x.name: _Group(x.name, x.gate, s, top_k) for x in LAYOUTS}
    problems = []
    for name, tensor in tensors.items():
        parsed = _parse(name, modules)
        if parsed is None:
            problems.append(f"{name}: is no block beside a linear layer of this base")
            continue
        module, layout, leaf, expert = parsed
        if leaf == "lora_a" and tensor.shape and tensor.shape[0] % rank:
            problems.append(f"{name}: shape {tensor.shape} does not fit r = {rank} of {CONFIG}")
        for part in module.parts:
            key = _Key(site_of(part), part.layer, leaf, expert)
            groups[layout.name].pieces[key] = _piece(name, tensor, module, part, leaf)
    return [group for group in groups.values() if group.pieces], problems


def _fields(path: Path) -> dict[str, Any]:
    return read_json(path)


def _parse(name: str, modules: Mapping[str, families.Tensor]):
    """`(linear layer, layout, leaf, expert)` of a tensor's name, or None if it is no block's.

    The names begin with what wrapped the model when it was saved.
    """
    plain = name.removeprefix("base_model.")
    plain = plain.removeprefix("model.") if plain.startswith("model.model.") else plain
    parts = plain.split(".")
    module = modules.get(".".join(parts[:5]))
    # The authors can put such blocks on attention too, with another scaling: not read here.
    if module is None or not site_of(module.parts[0]).startswith("mlp."):
        return None
    for layout, leaf, pattern in _PATTERNS:
        if match := pattern.fullmatch(".".join(parts[5:])):
            return module, layout, leaf, int(match.groupdict().get("e", 0))
    return None


def _pattern(template: str) -> re.Pattern:
    """The template as a regular expression whose group `e` is the expert's number."""
    number, escaped = r"(?P<e>0|[1-9][0-9]{0,3})", re.escape(template)
    return re.compile(escaped.replace(r"\{e\}", number, 1).replace(r"\{e\}", "(?P=e)"))


_PATTERNS = [
    (layout, leaf, _pattern(template))
    for layout in LAYOUTS
    for leaf, template in layout.tensors.items()
]


def _piece(name, tensor: TorchTensor, module: families.Tensor, part, leaf: str) -> _Piece:
    """A tensor, of a fused layer's B only the rows of one of its sites."""
    rows = module.shape[0]
    if leaf != "lora_b" or len(module.parts) == 1 or tensor.shape[:1] != (rows,):
        return _Piece(name, tensor.shape, tensor.read)
    shape = (part.stop - part.start, *tensor.shape[1:])
    return _Piece(name, shape, lambda: tensor.read()[part.start : part.stop])


# Matching -------------------------------------------------------------------------------------


def _assign(groups: list[_Group], roster: Roster) -> tuple[dict[str, dict[str, _Group]], list[str]]:
    """`{bank: {site: group}}`, and the groups and banks that are left alone.

    Where there are fewer groups than banks, the banks that the stage does not train are passed
    over: the stage before has them.
    """
    places: dict[str, dict[str, _Group]] = {}
    problems = []
    pairs = dict.fromkeys((group.gate, site) for group in groups for site in sorted(group.sites))
    for gate, site in pairs:
        here = [g for g in groups if g.gate == gate and site in g.sites]
        fits = [
            (name, state)
            for name, (spec, state) in roster.items()
            if spec.gate == gate and spec.form == "lora" and site in spec.sites
            if state != "merged"
        ]
        if len(here) < len(fits):
            fits = [(name, state) for name, state in fits if state in TRAINED]
        for (name, _), group in zip(fits, here, strict=False):
            places.setdefault(name, {})[site] = group
        for group in here[len(fits) :]:
            problems.append(f"group '{group.name}': no bank of the stage takes it on {site}")
    for name, (spec, state) in roster.items():
        absent = [site for site in spec.sites if site not in places.get(name, {})]
        if absent and (name in places or state in TRAINED):
            problems.append(f"bank '{name}': nothing in the directory for {', '.join(absent)}")
    return places, problems


def _fill(
    bank: BankSpec, at: Mapping[str, _Group], config: DecoderConfig
) -> tuple[dict[str, Any], list[str]]:
    """A bank's parameters from the groups on its sites, and what does not fit."""
    shapes = bank_lib.shapes(bank, config)
    params, problems = {}, []
    for site, group in at.items():
        problems += _misrouted(bank, group)
        left = {key: piece for key, piece in group.pieces.items() if key.site == site}
        leaves = {}
        for leaf, shape in trees.flatten(shapes[site]):
            array = np.zeros(shape, np.float32)
            experts = 1 if leaf.startswith("router") else bank.experts
            for i, e in itertools.product(range(bank.layers), range(experts)):
                key = _Key(site, bank.start + i, leaf, e)
                piece, view = left.pop(key, None), VIEWS[leaf](array, i, e)
                if piece is None:
                    problems.append(f"bank '{bank.name}': {key} is missing")
                elif piece.shape != view.shape:
                    problems.append(
                        f"{piece.name}: shape {piece.shape}, bank '{bank.name}' (rank {bank.rank}, "
                        f"{bank.experts} experts) asks for {view.shape}"
                    )
                else:
                    view[...] = piece.read()
            leaves[leaf] = array
        if group.s != bank.s:
            leaves["lora_b"] *= np.float32(group.s / bank.s)
        params[site] = trees.unflatten(leaves.items())
        problems += [f"{p.name}: bank '{bank.name}' has no place for it" for p in left.values()]
    return params, problems


def _misrouted(bank: BankSpec, group: _Group) -> Iterator[str]:
    """Settings of a router that are not in its tensors."""
    if group.gate == "token" and not bank.renormalise:
        yield f"bank '{bank.name}': renormalise is False, but the adapter's gates add up to 1"
    if group.gate == "token" and group.top_k not in (None, bank.top_k):
        yield f"bank '{bank.name}': top_k is {bank.top_k}, but the adapter's is {group.top_k}"
