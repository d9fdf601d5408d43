"""What happens to banks between stages, as pure functions.

Axes: N layers, D input width, E experts, r rank, O output width.
`roster` is `{bank: (BankSpec, state)}` in order, `banks` is `{bank: parameters}`. States:
`train`, `gate` (only its routers or mixing weights train), `frozen`, `off` (kept, absent from the
forward), `merged` (inside the base's weights; kept so that a load can replay the merge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec, ShardingsOf
from medmoe_jax.base import quantised, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.quantised import Quantised
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError

Roster = Mapping[str, tuple[BankSpec, str]]
STATES = ("train", "gate", "frozen", "off", "merged")
ACTIVE = ("train", "gate", "frozen")


def active_banks(roster: Roster) -> tuple[BankSpec, ...]:
    """The banks that take part in the forward pass, in order."""
    return tuple(spec for spec, state in roster.values() if state in ACTIVE)


def split(roster: Roster, banks: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(frozen, trained)` banks; one may lie in both, its gate in the second.

    `base.trees.overlay` puts them together again.
    """
    frozen, trained = {}, {}
    for name, params in banks.items():
        _, state = find(roster, name)
        gate, rest = bank_lib.split_gate(params) if state == "gate" else ({}, params)
        (trained if state == "train" else frozen)[name] = rest
        if gate:
            trained[name] = gate
    return frozen, trained


def add(
    roster: Roster,
    banks: Mapping[str, Any],
    spec: BankSpec,
    config: DecoderConfig,
    key: jax.Array,
    base: Params | None = None,
    shardings_of: ShardingsOf | None = None,
) -> tuple[Roster, dict[str, Any]]:
    """The roster and banks with one more bank, in state `train`.

    Its output is zero at first; whole feed-forward experts start as copies of `base`'s. `base` and
    `shardings_of` are those of `bank.init`.

    Raises:
      UserError: a bank of that name is there already.
    """
    if spec.name in roster:
        raise UserError(f"bank '{spec.name}' is added twice; names are unique within a recipe")
    params = bank_lib.init(spec, config, key, base, shardings_of)
    return {**roster, spec.name: (spec, "train")}, {**banks, spec.name: params}


def set_state(roster: Roster, name: str, state: str) -> Roster:
    """The roster with a bank in another state (`freeze` is `set_state(..., "frozen")`).

    Raises:
      UserError: no such bank, no such state, or the bank is merged already.
    """
    spec, old = find(roster, name)
    if state not in STATES:
        raise UserError(f"bank '{name}': state '{state}' is none of {', '.join(STATES)}")
    if old == "merged":
        raise UserError(f"bank '{name}' is merged into the base; it cannot become '{state}'")
    return {**roster, name: (spec, state)}


def freeze(roster: Roster, name: str) -> Roster:
    """The roster with a bank that stays in the forward but is not trained."""
    return set_state(roster, name, "frozen")


def drop(roster: Roster, banks: Mapping[str, Any], name: str) -> tuple[Roster, dict[str, Any]]:
    """The roster and banks without a bank and its routers."""
    _, state = find(roster, name)
    if state == "merged":
        raise UserError(f"bank '{name}' is merged into the base; it cannot be dropped")
    return {k: v for k, v in roster.items() if k != name}, {
        k: v for k, v in banks.items() if k != name
    }


def merge(
    roster: Roster, banks: Mapping[str, Any], base: Params, name: str, *, donate: bool = False
) -> tuple[Roster, Params]:
    """`W += s Σ_e A_e Λ_e B_e` on the bank's sites: `(roster, base)`, the bank marked `merged`.

    A quantised W would round the sum away: there the bank stays beside it, frozen and, as inside W,
    without dropout, until an export or `fold` adds it to the float values.
    `donate` gives up the old base's touched kernels, so that none is held twice.

    Raises:
      UserError: the bank's gate depends on the token.
    """
    spec, state = find(roster, name)
    if state == "merged":
        raise UserError(f"bank '{name}' is merged already")
    check_mergeable(spec)
    kernels = [trees.get(base, f"layers.{site}.kernel") for site in spec.sites]
    quantised = any(isinstance(kernel, Quantised) for kernel in kernels)
    if not quantised:
        base = merge_into(base, [(spec, banks[name])], donate=donate)
    return {**roster, name: merged(spec, quantised)}, base


def merged(spec: BankSpec, quantised: bool) -> tuple[BankSpec, str]:
    """What a bank and its state become where it is merged into kernels, quantised or not."""
    return (spec.replace(dropout=0.0), "frozen") if quantised else (spec, "merged")


def fold(roster: Roster, banks: Mapping[str, Any], base: Params, *, donate: bool = False) -> Params:
    """The base with every bank that takes part in the forward merged into it, in one rounding.

    Quantised kernels come back in float32. `donate` as in `merge`.

    Raises:
      UserError: a bank's gate depends on the token.
    """
    active = [(s, banks[name]) for name, (s, state) in roster.items() if state in ACTIVE]
    return merge_into(quantised.dequantise(base, jnp.float32), active, donate=donate)


def stacked_spec(name: str, specs: Sequence[BankSpec], **gate: Any) -> BankSpec:
    """The bank that `stack` makes of these; `gate` are fields of its gate, by default `always`.

    Raises:
      UserError: they differ in sites, layers or dropout, or are gated or not single.
    """
    first = specs[0]
    for spec in specs:
        if spec.experts != 1 or spec.gate != "always":
            raise UserError(f"stack '{name}': bank '{spec.name}' is not one always-on expert")
        same = (spec.sites, spec.start, spec.stop, spec.dropout)
        if same != (first.sites, first.start, first.stop, first.dropout):
            raise UserError(
                f"stack '{name}': '{spec.name}' differs from '{first.name}' in sites, layers or "
                "dropout"
            )
    rank = max(spec.rank for spec in specs)
    return first.replace(
        name=name,
        experts=len(specs),
        rank=rank,
        alpha=float(rank),
        rank_stabilised=False,
        learned_scale=True,
        init="a",  # nothing is drawn: its factors are the members'
        **gate,
    )


def stack(name: str, members: Sequence[tuple[BankSpec, Any]]) -> tuple[BankSpec, Any]:
    """E banks of one `always` expert as one bank of E experts, computing the same sum.

    Ranks are padded with zeros to the largest; each member's s goes into Λ, so that the stacked
    bank has s = 1.

    Raises:
      UserError: see `stacked_spec`.
    """
    spec = stacked_spec(name, [member for member, _ in members])

    def widen(leaf, r_axis: int):
        pad = [(0, 0)] * leaf.ndim
        pad[r_axis] = (0, spec.rank - leaf.shape[r_axis])
        return jnp.pad(leaf, pad)

    params = {}
    for site in spec.sites:
        parts = [(member, p[site]) for member, p in members]
        scales = [
            s.s * (p["scale"] if "scale" in p else jnp.ones((s.layers, 1, s.rank)))
            for s, p in parts
        ]
        params[site] = {
            "lora_a": jnp.concatenate([widen(p["lora_a"], 3) for _, p in parts], axis=2),
            "lora_b": jnp.concatenate([widen(p["lora_b"], 2) for _, p in parts], axis=1),
            "scale": jnp.concatenate([widen(x, 2) for x in scales], axis=1),
        }
    return spec, params


def factors(spec: BankSpec, site_params_i: Params) -> tuple[jax.Array, jax.Array]:
    """A `[D, E·r]` and B `[E·r, O]`, float32, of one layer of one site: its delta is A B.

    s and Λ are inside B. `site_params_i` is one layer's slice of `bank.site_params`: mixing weights
    are inside Λ.
    """
    a_DxExr, b_ExrxO = site_params_i["lora_a"], site_params_i["lora_b"]
    if "scale" in site_params_i:
        b_ExrxO = b_ExrxO * site_params_i["scale"][..., None]
    D, E, r = a_DxExr.shape
    return a_DxExr.reshape(D, E * r), spec.s * b_ExrxO.reshape(E * r, -1)


def delta(spec: BankSpec, site_params_i: Params) -> jax.Array:
    """`s Σ_e A_e Λ_e B_e` of one layer of one site, float32 `[D, O]`; see `factors`."""
    a_DxR, b_RxO = factors(spec, site_params_i)
    return jnp.matmul(a_DxR, b_RxO, precision=jax.lax.Precision.HIGHEST)


def members_at(
    members: Sequence[tuple[BankSpec, Any]], site: str
) -> tuple[tuple[BankSpec, ...], list[dict[str, Any]]]:
    """`(specs, site parameters)` of those members that sit on a site."""
    here = [(spec, bank_lib.site_params(spec, p, site)) for spec, p in members if site in p]
    return tuple(spec for spec, _ in here), [p for _, p in here]


def kernel_with(
    specs: tuple[BankSpec, ...],
    kernel_LxDxO: jax.Array | Quantised,
    params: Sequence[Params],
    i: jax.Array | int,
) -> jax.Array:
    """Layer i of one site's stacked kernel plus the banks' deltas, float32 `[D, O]`."""
    w_DxO = jax.tree.map(lambda leaf: leaf[i], kernel_LxDxO).astype(jnp.float32)
    for spec, p in zip(specs, params, strict=True):
        j = jnp.clip(i - spec.start, 0, spec.layers - 1)
        here = (i >= spec.start) & (i < spec.stop)
        p_i = jax.tree.map(lambda leaf, j=j: leaf[j], p)
        w_DxO = w_DxO + jnp.where(here, delta(spec, p_i), 0.0)
    return w_DxO


def _add_deltas(specs: tuple[BankSpec, ...], kernel_LxDxO, params):
    """One site's stacked kernel plus the banks' deltas, layer by layer, rounded once."""

    def layer(i, kernel_LxDxO):
        w_DxO = kernel_with(specs, kernel_LxDxO, params, i)
        return kernel_LxDxO.at[i].set(w_DxO.astype(kernel_LxDxO.dtype))

    return jax.lax.fori_loop(0, kernel_LxDxO.shape[0], layer, kernel_LxDxO)


_ADD = {
    donate: jax.jit(_add_deltas, static_argnums=0, donate_argnums=(1,) if donate else ())
    for donate in (False, True)
}


def check_mergeable(spec: BankSpec) -> None:
    """Raise UserError for a bank whose gate depends on the token."""
    if spec.routed:
        raise UserError(
            f"bank '{spec.name}' has gate '{spec.gate}': its weights depend on the token, so it "
            "cannot be merged into the base; drop it or keep the model unmerged"
        )


def merge_into(
    base: Params, members: Sequence[tuple[BankSpec, Any]], *, donate: bool = False
) -> Params:
    """The base with the members' deltas added; only the touched kernels are new arrays.

    Raises:
      UserError: a member's gate depends on the token.
    """
    for spec, _ in members:
        check_mergeable(spec)
    out = base
    for site in dict.fromkeys(site for spec, _ in members for site in spec.sites):
        specs, params = members_at(members, site)
        kernel = trees.get(base, f"layers.{site}.kernel")
        kernel = _ADD[donate](specs, kernel, params)
        out = trees.overlay(out, trees.unflatten([(f"layers.{site}.kernel", kernel)]))
    return out


def find(roster: Roster, name: str) -> tuple[BankSpec, str]:
    """A bank's specification and state; UserError names the known banks."""
    if name not in roster:
        raise UserError(f"there is no bank '{name}'; known: {', '.join(roster) or 'none'}")
    return roster[name]
