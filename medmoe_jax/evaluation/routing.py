"""Which experts the texts of each language use, by layer and site.

Axes: G languages, N layers of a router, E experts, B rows, T tokens.
Every batch is of one language, so that the sums that a router keeps anyway (`RouterStats`) are that
language's; they add up on the devices, and only `[N, E]` figures ever reach the host. No padding is
counted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.bank import BankSpec, mixing
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.attention import row_slots
from medmoe_jax.base.seam import Context, Params
from medmoe_jax.data.batches import Batch, epoch_batches
from medmoe_jax.data.conversation import Conversation, Rows
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.mesh_axes import SEQUENCE
from medmoe_jax.parallel.host import to_host
from medmoe_jax.parallel.mesh import batch_sharding, put, round_up_rows
from medmoe_jax.routing import telemetry
from medmoe_jax.routing.languages import Languages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """The texts of one language.

    Attributes:
      code: of the language, "" where it is unknown.
      rows: conversation rows.
    """

    code: str
    rows: Rows

    @property
    def name(self) -> str:
        """The code, or `unknown`."""
        return self.code or "unknown"


@dataclass(frozen=True)
class Gate:
    """What one gate did with the texts of each language.

    Attributes:
      name: "bank/site", or "bank/mix" for mixing weights.
      first_layer: where its layers begin.
      experts: their names.
      tokens_G: tokens of each language.
      use_GxNxE: tokens that picked the expert; of mixing weights, their size.
      entropy_GxN: mean entropy of a token's probabilities, in nats.
      own_G: the expert of each language, or -1.
    """

    name: str
    first_layer: int
    experts: tuple[str, ...]
    tokens_G: np.ndarray
    use_GxNxE: np.ndarray
    entropy_GxN: np.ndarray
    own_G: np.ndarray

    @property
    def share_GxNxE(self) -> np.ndarray:
        """Each expert's share of the picks."""
        return telemetry.shares(self.use_GxNxE)

    @property
    def effective_GxN(self) -> np.ndarray:
        """Effective number of experts: the exponential of the entropy of their shares."""
        return np.exp(telemetry.entropy(self.share_GxNxE))

    @property
    def divergence_N(self) -> np.ndarray:
        """How differently the languages use the experts, from 0 to 1."""
        return telemetry.divergence(self.share_GxNxE)

    @property
    def own_GxN(self) -> np.ndarray:
        """Share of a language's tokens that pick its own expert; NaN where it has none."""
        own_GxNx1 = np.maximum(self.own_G, 0)[:, None, None]
        picked_GxN = np.take_along_axis(self.use_GxNxE, own_GxNx1, axis=2)[..., 0]
        share_GxN = picked_GxN / np.maximum(self.tokens_G, 1.0)[:, None]
        return np.where(self.own_G[:, None] >= 0, share_GxN, np.nan)


def by_language(
    rows: Iterable[tuple[Conversation, str, str]],
    languages: Languages | None,
    limit: int | None = None,
) -> list[Texts]:
    """Rows with their languages, grouped: in the order of the experts, then of the codes.

    Args:
      rows: `(row, language code, place)`; the code takes the place of the row's own, and the
        place is the file and line or the like, for messages.
      languages: the recipe's table, if any.
      limit: rows kept of each language, the first ones.
    """
    groups: dict[str, list[tuple[Conversation, str]]] = {}
    for row, code, place in rows:
        group = groups.setdefault(code, [])
        if limit is None or len(group) < limit:
            group.append(({**row, "language": code}, place))
    experts = languages.ids if languages else {}
    order = sorted(groups, key=lambda code: (not code, experts.get(code, len(experts)), code))
    return [Texts(code, _rows(groups[code])) for code in order]


def _rows(group: Sequence[tuple[Conversation, str]]) -> Rows:
    return Rows([row for row, _ in group], [place for _, place in group].__getitem__)


def measure(
    model: AdaptedConfig,
    base: Params,
    banks: Mapping[str, Any],
    mesh: Mesh,
    texts: Sequence[Texts],
    encoder: Encoder,
    length: int,
    batch: int,
    languages: Languages | None = None,
) -> list[Gate]:
    """Run the texts through the model and read its gates.

    Args:
      model: decoder and active banks.
      base, banks: their parameters.
      mesh: where they live.
      texts: of each language.
      encoder: turns rows into ids; it knows the table's languages.
      length: tokens at which a row is cut.
      batch: rows run at once; rounded up to what the mesh needs. It does not change the figures.
      languages: the table, if any.

    Raises:
      UserError: no bank that takes part has a router or mixing weights, or there is no text.
    """
    gated = _gated(model)
    if not texts:
        raise UserError("there is no row to analyse")
    rows = round_up_rows(mesh, batch)
    encoded = [EncodedRows(one.name, one.rows, encoder, length) for one in texts]
    cut = sum(one.counts.truncated_rows for one in encoded)
    if cut:
        log.info("%d of %d rows were cut at %d tokens", cut, sum(map(len, encoded)), length)
    longest = max(len(row["tokens"]) for one in encoded for row in one)
    slots = row_slots(longest, mesh.shape[SEQUENCE], length)
    sums = [
        _total(model, base, banks, mesh, epoch_batches(one, rows, length=slots)) for one in encoded
    ]
    tokens, stats = zip(*jax.tree.map(to_host, sums), strict=True)
    return _gates(gated, banks, tokens, stats, [one.code for one in texts], languages)


def spoke(
    model: AdaptedConfig,
    base: Params,
    banks: Mapping[str, Any],
    mesh: Mesh,
    prompt: Sequence[int],
    answer: Sequence[int],
    language: int = -1,
    languages: Languages | None = None,
) -> list[Gate]:
    """What the gates did where an answer was said: at the tokens from which its own were drawn.

    Args:
      model: decoder and active banks.
      base, banks: their parameters.
      mesh: where they live.
      prompt, answer: their ids, one of each at least.
      language: the expert of the prompt's language, or -1.
      languages: the table, if any.

    Raises:
      UserError: no bank that takes part has a router or mixing weights.
    """
    gated = _gated(model)
    ids = [*prompt, *answer[:-1]]
    rows = round_up_rows(mesh, 1)
    slots = row_slots(1 << (len(ids) - 1).bit_length(), mesh.shape[SEQUENCE], None)
    sums = []
    # What is read before is the same in both, as no token sees a later one.
    for read in (len(ids), len(prompt) - 1):
        batch = {
            name: np.zeros((rows, slots), np.int32)
            for name in ("tokens", "segment_ids", "positions", "language_ids")
        }
        batch["tokens"][0, :read] = ids[:read]
        batch["segment_ids"][0, :read] = 1
        batch["positions"][0, :read] = np.arange(read)
        batch["language_ids"][:] = -1
        batch["language_ids"][0, :read] = language
        sums.append(_total(model, base, banks, mesh, [batch]))
    tokens, stats = jax.tree.map(
        lambda whole, before: whole - before, *(jax.tree.map(to_host, one) for one in sums)
    )
    return _gates(gated, banks, [tokens], [stats], [""], languages)


def _gated(model: AdaptedConfig) -> list[BankSpec]:
    """The banks with a router or mixing weights. Raises UserError where there is none."""
    gated = [bank for bank in model.banks if bank.gate != "always"]
    if not gated:
        names = ", ".join(bank.name for bank in model.banks) or "none"
        raise UserError(
            "no bank that takes part has a router or mixing weights, so there is no routing to "
            f"analyse (banks: {names}); another stage may have one, or a bank that was left out"
        )
    return gated


def _gates(
    gated: Sequence[BankSpec],
    banks: Mapping[str, Any],
    tokens: Sequence[Any],
    stats: Sequence[Mapping[str, RouterStats]],
    codes: Sequence[str],
    languages: Languages | None,
) -> list[Gate]:
    """What the gates of banks did, from the sums of each group of tokens."""
    out = []
    for bank in gated:
        named = languages if bank.gate == "language" and _fits(bank, languages) else None
        own = [named.ids.get(code, -1) if named else -1 for code in codes]
        experts = named.experts if named else tuple(str(e) for e in range(bank.experts))
        common = {"first_layer": bank.start, "experts": experts, "own_G": np.asarray(own)}
        common["tokens_G"] = np.asarray(tokens, np.float64)
        if bank.routed:
            names = [f"{bank.name}/{site}" for site in (*bank.sites, "mlp")]
            found = [name for name in names if name in stats[0]]
            out += [_routed(name, [s[name] for s in stats], common) for name in found]
        else:
            out.append(_mixed(bank, banks[bank.name], len(codes), common))
    return out


def _fits(bank: BankSpec, languages: Languages | None) -> bool:
    return languages is not None and len(languages.experts) == bank.experts


@functools.partial(jax.jit, static_argnums=0)
def _stats(config: AdaptedConfig, base, banks, batch) -> tuple[Any, dict[str, RouterStats]]:
    known = Context(language_ids_BxT=batch.get("language_ids"))
    ids = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    _, _, aux = adapted.hidden(config, base, banks, *ids, context=known)
    return jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32), telemetry.collect(aux)


def _total(config: AdaptedConfig, base, banks, mesh: Mesh, batches: Iterable[Batch]):
    """`(tokens, {"bank/site": RouterStats})` over all batches, on the devices."""
    sharding, total = batch_sharding(mesh), None
    for batch in batches:
        arrays = {name: put(array, sharding) for name, array in batch.items()}
        found = _stats(config, base, banks, arrays)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def _routed(name: str, stats: Sequence[RouterStats], common: Mapping[str, Any]) -> Gate:
    tokens_GxN = np.stack([np.asarray(one.tokens, np.float64) for one in stats])
    entropy_GxN = np.stack([np.asarray(one.entropy, np.float64) for one in stats])
    return Gate(
        name,
        use_GxNxE=np.stack([np.asarray(one.use_E, np.float64) for one in stats]),
        entropy_GxN=entropy_GxN / np.maximum(tokens_GxN, 1.0),
        **common,
    )


def _mixed(bank: BankSpec, params, groups: int, common: Mapping[str, Any]) -> Gate:
    """Mixing weights, the same for every text."""
    weight_NxE = np.abs(np.asarray(mixing(bank, params["mix"]["weight"]), np.float64))
    use_GxNxE = np.broadcast_to(weight_NxE[None], (groups, bank.layers, bank.experts))
    entropy_GxN = telemetry.entropy(telemetry.shares(use_GxNxE))
    return Gate(f"{bank.name}/mix", use_GxNxE=use_GxNxE, entropy_GxN=entropy_GxN, **common)
