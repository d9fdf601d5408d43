"""Banks: E experts on each of some sites, over a range of layers.

Axes: N layers of the bank, D input width, E experts, r rank, O output width.
A bank's parameters are a plain tree `{site: {"lora_a": [N, D, E, r], "lora_b": [N, E, r, O],
"scale"?: [N, E, r], "router"?: {"kernel": [N, D, E], "bias"?: [N, E]}}}`, all float32; one with
mixing weights also holds `"mix": {"weight": [N or 1, E]}` beside its sites. Where the experts are
feed-forward networks, their one router is `"mlp": {"router": ...}`; whole ones have `"experts"`
`[N, E, D, O]` in the place of the low-rank factors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.base import trees
from medmoe_jax.base.config import GROUPS, DecoderConfig, site_shapes
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import fits
from medmoe_jax.ranges import COUNT, FINITE, NOT_NEGATIVE, Range
from medmoe_jax.routing.routers import check_top_k

GATES = ("always", "token", "language", "skill")
FORCING = ("off", "train", "always")
FORMS = ("lora", "ffn_lora", "ffn", "ffn_beside")
INITS = ("a", "b")
_FFN = (*GROUPS["mlp.in"], *GROUPS["mlp.out"])
# Fields that act in some banks only: which, and how such a bank is asked for. Ranks and alpha are
# left out: a recipe gives them to experts that may be whole or not.
_ACTING = (
    (
        ("rank_stabilised", "dropout", "learned_scale"),
        lambda spec: not spec.whole,
        "low-rank experts: form='lora' or 'ffn_lora'",
    ),
    (
        ("top_k", "renormalise", "router_bias"),
        lambda spec: spec.routed,
        "a router: gate='token' or 'language'",
    ),
    (("forcing",), lambda spec: spec.gate == "language", "gate='language'"),
    (("mix_per_layer", "mix_softmax"), lambda spec: spec.gate == "skill", "gate='skill'"),
)
# Gives the shardings of a tree of shapes.
ShardingsOf = Callable[[Any], Any]
# `{site: (D, O)}` of a model's linear layers.
Widths = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class BankSpec:
    """What a bank is; its weights are kept apart.

    Attributes:
      name: unique within a recipe.
      sites: the sites it sits on; `adapters.nnx_models` and `linen_models` fill them in.
      start, stop: its range of layers; in those models a site is one layer.
      form: what an expert is: `lora`, low-rank factors on one site, each site with its own gate;
        `ffn_lora`, the base's feed-forward network with low-rank factors on its sites, one router a
        network; `ffn`, a whole network of its own, at first a copy of the base's (upcycling), in
        whose place the mixture stands; `ffn_beside`, the same with the base's network beside the
        mixture (a shared expert), and the last product of the copies zero at first.
      experts, rank: E, how many a site or network has, and r, the rank of each.
      alpha, rank_stabilised: the bank's output is multiplied by `s = alpha / r`, or, if stabilised,
        by `alpha / sqrt(r)`.
      gate: `always` (weight 1), `token` (learned router, top-k), `language` (the same, with the
        expert of the token's language forced among the picks) or `skill` (mixing weights, the same
        for every token).
      top_k, renormalise, router_bias: how many experts a router picks, whether their weights sum to
        one, and whether it has a bias. The weight of a single pick that is renormalised is always
        one, from which a router learns nothing.
      router_noise: standard deviation of the noise on its logits in training.
      forcing: when a `language` gate forces: `off`, in `train`ing only, or `always` that ids are
        given.
      balance_loss, z_loss: weights of the losses on the router (`routing.routers`).
      mix_per_layer, mix_softmax: for a `skill` gate: whether every layer has its own mixing
        weights, and whether they pass through a softmax, without which only banks that become one
        by `stack` learn.
      dropout: probability, on the input of A only, in training.
      learned_scale: whether there is a Λ between A and B.
      init: which low-rank factor is drawn at first, `a` or `b`; the other is zero, so that the bank
        adds nothing yet, and is the one that the first step changes.
    """

    name: str
    sites: tuple[str, ...] = ()
    start: int = 0
    stop: int = 1
    form: str = "lora"
    experts: int = 1
    rank: int = 16
    alpha: float = 32.0
    rank_stabilised: bool = False
    gate: str = "always"
    top_k: int = 2
    renormalise: bool = True
    router_bias: bool = True
    router_noise: float = 0.0
    forcing: str = "train"
    balance_loss: float = 0.0
    z_loss: float = 0.0
    mix_per_layer: bool = False
    mix_softmax: bool = False
    dropout: float = 0.0
    learned_scale: bool = False
    init: str = "a"

    def __post_init__(self) -> None:
        where = f"bank '{self.name}'"
        if "/" in self.name:  # statistics are named `bank/site`
            raise UserError(f"{where}.name: has a '/'; take another sign")
        if self.gate not in GATES:
            raise UserError(f"{where}.gate: '{self.gate}' is none of {', '.join(GATES)}")
        for field in ("experts", "rank"):
            COUNT.check_whole(f"{where}.{field}", getattr(self, field))
        for field in ("router_noise", "balance_loss", "z_loss"):
            NOT_NEGATIVE.check(f"{where}.{field}", getattr(self, field))
        FINITE.check(f"{where}.alpha", self.alpha)
        if self.form not in FORMS:
            raise UserError(f"{where}.form: '{self.form}' is none of {', '.join(FORMS)}")
        if self.form != "lora" and not (self.routed and set(self.sites) == set(_FFN)):
            raise UserError(
                f"{where}.form: experts that are feed-forward networks need sites=('mlp.*',) and a "
                "router: gate='token' or 'language'"
            )
        Range(0, 1, below=True).check(f"{where}.dropout", self.dropout)
        if self.forcing not in FORCING:
            raise UserError(f"{where}.forcing: '{self.forcing}' is none of {', '.join(FORCING)}")
        if self.init not in INITS:
            raise UserError(f"{where}.init: '{self.init}' is none of {', '.join(INITS)}")
        if self.init == "b" and (self.learned_scale or self.whole):
            raise UserError(
                f"{where}.init: 'b' is for experts of two factors, one of which is zero at first; "
                "with learned_scale Λ is, and whole networks have none"
            )
        if not self.routed and max(self.router_noise, self.balance_loss, self.z_loss) > 0:
            raise UserError(
                f"{where}: router_noise, balance_loss and z_loss need a router: gate='token' or "
                "'language'"
            )
        if self.routed:
            check_top_k(where, self.top_k, self.experts)

    @property
    def routed(self) -> bool:
        """Whether a router decides for every token."""
        return self.gate in ("token", "language")

    @property
    def whole(self) -> bool:
        """Whether an expert is a whole network, not low-rank factors."""
        return self.form in ("ffn", "ffn_beside")

    @property
    def s(self) -> float:
        """The factor on the bank's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def layers(self) -> int:
        """Number of layers it sits on."""
        return self.stop - self.start

    def replace(self, **changes: Any) -> BankSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def check_acts(spec: BankSpec) -> None:
    """Raise UserError for a field that is set and changes nothing in such a bank.

    Only what is to be trained is asked: a bank that is there answers as it did.
    """
    for names, acts, needs in _ACTING:
        for name in names:
            value, default = getattr(spec, name), BankSpec.__dataclass_fields__[name].default
            if value != default and not acts(spec):
                raise UserError(
                    f"bank '{spec.name}'.{name}: {value!r} would change nothing, it needs {needs}; "
                    f"leave it at {default!r}"
                )


def check_gate_learns(spec: BankSpec, fresh: bool) -> None:
    """Raise UserError for a bank that trains and whose gate would have gradient 0 for ever.

    Args:
      spec: the bank.
      fresh: whether its values are those of `init`, not those of trained banks.
    """
    where = f"bank '{spec.name}'"
    if fresh and spec.gate == "skill" and not spec.mix_softmax:
        raise UserError(
            f"{where}.mix_softmax: mixing weights begin with zero, and so does what they weigh, so "
            "that neither ever learns; set mix_softmax=True, or `stack` banks that are trained"
        )
    constant = spec.routed and spec.experts > 1 and spec.top_k == 1 and spec.renormalise
    taught = spec.balance_loss > 0 or spec.z_loss > 0
    told = spec.gate == "language" and spec.forcing == "always"
    if constant and not (taught or told):
        raise UserError(
            f"{where}.top_k: the weight of the only pick is always 1 with renormalise=True, so "
            "that its router never learns; pick more, or set renormalise=False or a balance_loss"
        )


def match_sites(name: str, patterns: tuple[str, ...], config: DecoderConfig) -> tuple[str, ...]:
    """Sites that match any of the globs, in the decoder's order.

    Raises:
      UserError: a pattern matches no site.
    """
    known = site_shapes(config)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UserError(
                f"bank '{name}'.sites: pattern '{pattern}' matches none of {', '.join(known)}"
            )
    if not patterns:
        raise UserError(f"bank '{name}'.sites is empty; name sites such as 'attn.*' or 'mlp.up'")
    return tuple(s for s in known if any(fnmatch.fnmatch(s, p) for p in patterns))


def match_layers(
    name: str, layers: tuple[int | None, int | None], n_layers: int
) -> tuple[int, int]:
    """`(start, stop)` of a slice over the layers; UserError when it is none, or empty."""
    where = f"bank '{name}'.layers: {layers!r}"
    if len(layers) != 2 or not all(n is None or fits(n, int) for n in layers):
        raise UserError(f"{where} is no pair (start, stop), such as (-2, None) for the last two")
    start, stop, _ = slice(*layers).indices(n_layers)
    if start >= stop:
        raise UserError(f"{where} holds none of the {n_layers} layers")
    return start, stop


def shapes(spec: BankSpec, config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """The tree of shapes of a bank's parameters."""
    return _shapes(spec, site_shapes(config))


def _shapes(spec: BankSpec, widths: Widths) -> dict[str, dict[str, Any]]:
    N, E, r = spec.layers, spec.experts, spec.rank
    out: dict[str, dict[str, Any]] = {}
    for site in spec.sites:
        D, O = widths[site]
        if spec.whole:
            out[site] = {"experts": (N, E, D, O)}
            continue
        out[site] = {"lora_a": (N, D, E, r), "lora_b": (N, E, r, O)}
        if spec.learned_scale:
            out[site]["scale"] = (N, E, r)
        if spec.routed and spec.form == "lora":
            out[site]["router"] = _router_shapes(spec, D)
    if spec.form != "lora":
        out["mlp"] = {"router": _router_shapes(spec, widths["mlp.gate"][0])}
    if spec.gate == "skill":
        out["mix"] = {"weight": (N if spec.mix_per_layer else 1, E)}
    return out


def _router_shapes(spec: BankSpec, D: int) -> dict[str, tuple[int, ...]]:
    kernel = {"kernel": (spec.layers, D, spec.experts)}
    return {**kernel, "bias": (spec.layers, spec.experts)} if spec.router_bias else kernel


def mixing(spec: BankSpec, weight: jax.Array) -> jax.Array:
    """The mixing weights of a `skill` gate from their parameter, `[..., E]`."""
    return jax.nn.softmax(weight, axis=-1) if spec.mix_softmax else weight


def site_params(spec: BankSpec, params: Params, site: str) -> dict[str, Any]:
    """A site's parameters with the mixing weights, if any, inside Λ.

    Works on a bank's stacked parameters and on one layer's slice of them alike.
    """
    leaves = dict(params[site])
    if spec.gate == "skill":
        mix = mixing(spec, params["mix"]["weight"])[..., None]
        if "scale" in leaves:
            leaves["scale"] = leaves["scale"] * mix
        else:
            shape = (*leaves["lora_b"].shape[:-1],)
            leaves["scale"] = jnp.broadcast_to(mix, shape)
    return leaves


def abstract(spec: BankSpec, config: DecoderConfig) -> dict[str, Any]:
    """The bank's parameters as `ShapeDtypeStruct`s."""
    return _abstract(spec, site_shapes(config))


def _abstract(spec: BankSpec, widths: Widths) -> dict[str, Any]:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        _shapes(spec, widths),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def init(
    spec: BankSpec,
    config: DecoderConfig,
    key: jax.Array,
    base: Params | None = None,
    shardings_of: ShardingsOf | None = None,
) -> dict[str, Any]:
    """Fresh parameters: A and router U(±1/sqrt(D)), B, Λ and mixing weights zero.

    Without a learned scale B = 0 (LoRA) or, with `init="b"`, A = 0 and B U(±1/sqrt(r)); with one,
    Λ = 0 and A, B ~ N(0, 0.02) (AdaLoRA). Whole feed-forward experts are copies of `base`'s, as
    their form says. The bank's name enters every draw: two banks made from one key look in
    different directions.

    Args:
      spec, config: the bank, and the decoder that it sits on.
      key: draws the values.
      base: the decoder's weights; needed by whole feed-forward experts only.
      shardings_of: how the parameters are spread, in which they are made; None: one device.
    """
    # Under its name, as in every tree that holds it: the rules read whole paths.
    shardings = None
    if shardings_of is not None:
        shardings = shardings_of({spec.name: abstract(spec, config)})[spec.name]
    leaves, treedef = jax.tree.flatten(shardings)
    given = base if spec.whole else None
    return _init(spec, config, treedef, tuple(leaves), key, given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init(spec: BankSpec, config: DecoderConfig, treedef, shardings, key: jax.Array, base):
    params = init_on(spec, site_shapes(config), key, base)
    wanted = jax.tree.unflatten(treedef, shardings)
    return params if wanted is None else jax.lax.with_sharding_constraint(params, wanted)


def init_on(spec: BankSpec, widths: Widths, key: jax.Array, base: Any = None) -> dict[str, Any]:
    """`init` for a bank on the linear layers of any model, value by value.

    Args:
      spec: the bank.
      widths: of its sites at least.
      key, base: see `init`.
    """

    def leaf(path, struct):
        name = jax.tree_util.keystr(path)
        k = jax.random.fold_in(key, zlib.crc32(f"{spec.name}{name}".encode()))
        if spec.form == "ffn_beside" and path[0].key == "mlp.down":
            return jnp.zeros(struct.shape, struct.dtype)
        if path[-1].key == "experts":
            kernel_LxDxO = trees.get(base, f"layers.{path[0].key}.kernel")
            own = slice(spec.start, spec.stop)
            kernel_NxDxO = jax.tree.map(lambda x: x[own], kernel_LxDxO).astype(struct.dtype)
            return jnp.broadcast_to(kernel_NxDxO[:, None], struct.shape)
        other = {"a": "lora_b", "b": "lora_a"}[spec.init]
        zero = {"weight", "scale"} | (set() if spec.learned_scale else {other})
        if path[-1].key in zero:
            return jnp.zeros(struct.shape, struct.dtype)
        if spec.learned_scale and "lora" in name:
            return 0.02 * jax.random.normal(k, struct.shape, struct.dtype)
        # The one router of feed-forward experts reads what their first products read.
        D = widths[path[0].key if path[0].key in widths else "mlp.gate"][0]
        bound = (spec.rank if path[-1].key == "lora_b" else D) ** -0.5
        return jax.random.uniform(k, struct.shape, struct.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(leaf, _abstract(spec, widths))


def split_gate(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(gate, rest)` of a bank's parameters: its routers and mixing weights, and all else."""
    gate = {key: value for key, value in params.items() if key == "mix"}
    rest = {}
    for site, leaves in params.items():
        if site == "mix":
            continue
        if "router" in leaves:
            gate[site] = {"router": leaves["router"]}
        others = {key: value for key, value in leaves.items() if key != "router"}
        if others:
            rest[site] = others
    return gate, rest


def count(params: Params) -> int:
    """Number of parameters in a nested dict; a quantised kernel counts its weights."""
    return sum(math.prod(leaf.shape) for _, leaf in trees.flatten(params))
