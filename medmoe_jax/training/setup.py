"""From a configuration to the parts that every command needs: mesh, base, tokenizer, template."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.decoder import flash_attention
from medmoe_jax.base.execution import REMAT, Execution
from medmoe_jax.base.presets import HUB
from medmoe_jax.checkpoints.bases import Base, open_base, open_tokenizer
from medmoe_jax.checkpoints.fingerprint import json_fingerprint, tree_fingerprint
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.pieces import Template
from medmoe_jax.data.templates import load_template
from medmoe_jax.data.tokenizers import within_rows
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import ParameterError, UserError, field_names
from medmoe_jax.mesh_axes import EXPERT, SEQUENCE
from medmoe_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    check_divides,
    make_mesh,
)
from medmoe_jax.parallel.rules import BASE_RULES, Rule, rules_for, shardings
from medmoe_jax.routing.dispatch import strategy
from medmoe_jax.routing.languages import Languages, read_languages
from medmoe_jax.training.hooks.trackers import check_names
from medmoe_jax.training.limits import check_numbers
from medmoe_jax.training.recipe import parse
from medmoe_jax.training.shape import check_shape
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.transitions import roster_of

AUTO = "auto"  # of `run.remat`: the least recomputation that fits
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What a configuration stands for on this machine.

    Attributes:
      config: the configuration.
      mesh: its devices.
      base: the frozen decoder, not loaded yet.
      stages: the recipe.
      text: tokenizer and template; None where the configuration is opened to be planned.
      languages: which expert a language belongs to, where the recipe has a table.
    """

    config: ConfigDict
    mesh: Mesh
    base: Base
    stages: tuple[Stage, ...]
    text: tuple[Tokenizer, Template] | None
    languages: Languages | None = None
    _spare: list = field(default_factory=list, repr=False, compare=False)

    def roster(self, stage: str) -> Roster:
        """The banks of the stage of that name and their states; "" has no bank."""
        return roster_of(self.stages, stage, bool(self.base.quantise))

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of the frozen weights and the activations."""
        return _DTYPES[self.config.base.dtype]

    @property
    def tokenizer(self) -> Tokenizer:
        """How text becomes ids; a RuntimeError where no text is read."""
        return self._read_text()[0]

    @property
    def template(self) -> Template:
        """How turns become text; a RuntimeError where no text is read."""
        return self._read_text()[1]

    def _read_text(self) -> tuple[Tokenizer, Template]:
        if self.text is None:
            raise RuntimeError("this configuration was opened to be planned, not to read text")
        return self.text

    @property
    def rules(self) -> tuple[Rule, ...]:
        """How parameters and optimiser states are spread over the mesh."""
        return rules_for(self.config.run.dispatch)

    def shardings(self, tree: Any) -> Any:
        """How a tree of parameters, or of their shapes, is spread over the mesh."""
        return shardings(tree, self.mesh, self.rules)

    def load_base(self) -> dict[str, Any]:
        """The base's parameters, each straight into its shards; the caller may give them up."""
        return self._spare.pop() if self._spare else self._load()

    def _load(self) -> dict[str, Any]:
        tree = self.base.abstract(self.dtype)
        return self.base.load(self.dtype, shardings(tree, self.mesh, BASE_RULES))

    @functools.cached_property
    def weights_fingerprint(self) -> str:
        """Content hash of the base as loaded; what was read for it is kept for one `load_base`."""
        base = self._load()
        self._spare.append(base)
        return tree_fingerprint(base)

    @property
    def base_fingerprint(self) -> str:
        """What tells a base from others: its weights, and all that `identity` names."""
        return json_fingerprint([self.weights_fingerprint, self.identity])

    def identify(self, base: Any) -> str:
        """`base_fingerprint`, where the base's parameters are at hand."""
        return json_fingerprint([tree_fingerprint(base), self.identity])

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All beside its weights that makes a base the function it is, by content, JSON-able."""
        config, tokenizer, stops = self.config, self.tokenizer, self.encoder.stops
        template = self.template
        return {
            "base": {
                "dtype": config.base.dtype,
                "quantise": config.base.quantise,
                "architecture": self.base.config.to_json(),
                "special_tokens": {
                    "named": tokenizer.names,
                    "ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
                    "ends": [list(stops.ids), list(stops.texts)],
                },
            },
            "data": {
                "tokenizer": tokenizer.digest,
                "template": _told(template, config.data.template),
                "template_options": config.data.template_options.to_dict(),
            },
        }

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What encodes the rows of this run."""
        ids = self.languages.ids if self.languages else None
        with field_names("data."):
            return Encoder(self.tokenizer, self.template, self.config.data.mask, ids)

    def language_expert(self, code: str) -> int:
        """The number of a language's expert.

        Raises:
          ParameterError: the recipe has no table of languages, or the language is not in it.
        """
        if self.languages is None:
            raise ParameterError("language: the recipe has no table of languages (data.languages)")
        if code not in self.languages.ids:
            known = ", ".join(self.languages.ids)
            raise ParameterError(f"language: '{code}' is not in the table; known: {known}")
        return self.languages.ids[code]

    def check_batch(self) -> None:
        """Raise UserError unless a step's rows divide over its parts and attention runs them."""
        rows, accumulation = self.config.data.global_batch, self.config.run.accumulation
        if rows % (batch_shards(self.mesh) * accumulation):
            raise UserError(
                f"data.global_batch: {rows} rows do not divide over {batch_shards(self.mesh)} "
                f"devices x run.accumulation {accumulation}"
            )
        execution = self.model(()).execution
        with field_names("run."):
            flash_attention(self.base.config, execution, self.config.data.length)

    @property
    def remats(self) -> tuple[str, ...]:
        """What a training step may recompute, the least first.

        `auto` does not keep everything: `dots` makes no product again, and takes half the memory
        of `none`. So it writes and reads less, and takes no more time. Only where tokens travel
        to experts on other devices they would do so again, which takes longer.
        """
        asked = self.config.run.remat
        if asked != AUTO:
            return (asked,)
        return REMAT if self.mesh.shape[EXPERT] > 1 else REMAT[REMAT.index("dots") :]

    def model(self, banks: tuple[BankSpec, ...]) -> AdaptedConfig:
        """The decoder with these banks active, run as `config.run` says.

        With `run.remat=auto` it recomputes the most until `training.recomputation` chooses less.

        Raises:
          UserError: the mesh does not divide the rows' tokens, heads or experts.
        """
        run, length = self.config.run, self.config.data.length
        with field_names("run."):
            check_divides(self.mesh, SEQUENCE, length, "tokens of a row (data.length)")
            execution = Execution(
                dtype=self.dtype,
                remat=self.remats[-1],
                unroll=run.unroll,
                attention=run.attention,
                kernels=run.kernels,
                activations=batch_sharding(self.mesh, 3),
            )
            return AdaptedConfig(self.base.config, banks, execution, run.dispatch)


def open_setup(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Everything a configuration names, checked; no weights are loaded yet.

    Args:
      config: the configuration.
      devices: to be planned on, of which some may not be there: then no text will be read, so that
        neither tokenizer nor template is opened, and the shapes of a published base are those of
        its preset. None = those of this machine, to be run on.

    Raises:
      UserError: naming the field that does not fit.
    """
    check_shape(config)
    _check_settings(config)
    with field_names("run."):
        mesh = make_mesh(config.run.mesh.to_dict(), devices)
    base = base_of(config.base, planned=devices is not None)
    if config.data.length > base.config.max_positions:
        raise UserError(
            f"data.length: {config.data.length} exceeds the base's context of "
            f"{base.config.max_positions} positions"
        )
    text = None
    if devices is None:
        tokenizer = _open_tokenizer(config.base.tokenizer or base.tokenizer, base)
        # Rows of the embedding beyond the tokenizer's ids are padding: never sampled, no target.
        used = min(tokenizer.vocab_size, base.config.vocab_size)
        base = dataclasses.replace(base, config=base.config.replace(vocab_used=used))
        options = config.data.template_options.to_dict()
        text = (tokenizer, load_template(config.data.template, tokenizer, options))
    with field_names("data."):
        languages = read_languages(config.data.languages) if config.data.languages else None
    stages = parse(config, base.config)
    setup = Setup(config, mesh, base, stages, text, languages)
    _check_models(setup)
    if text:
        _ = setup.encoder  # checks that an answer has an end
    return setup


def base_of(section: ConfigDict, planned: bool) -> Base:
    """The base of a configuration's section, not loaded yet.

    Args:
      section: `base`.
      planned: whether only its shapes will be asked for; a published one then needs no files.

    Raises:
      UserError: see `checkpoints.bases.open_base`.
    """
    presets = {path: name for name, path in HUB.items()} if planned else {}
    overrides = section.decoder.to_dict()
    path, name = section.path, section.preset
    if path in presets and not (name or overrides):
        path, name = "", presets[path]
    with field_names("base."):
        return open_base(path, name, overrides, section.seed, section.quantise)


def _check_settings(config: ConfigDict) -> None:
    """Raise UserError for a number, a dtype, a tracker or a strategy that there cannot be."""
    check_numbers(config)
    check_names(config.run.trackers)
    if config.base.dtype not in _DTYPES:
        raise UserError(f"base.dtype: '{config.base.dtype}' is none of {', '.join(_DTYPES)}")
    remats = (AUTO, *REMAT)
    if config.run.remat not in remats:
        raise UserError(f"run.remat: '{config.run.remat}' is none of {', '.join(remats)}")
    with field_names("run."):
        strategy(config.run.dispatch)


def _told(template: Template, name: str) -> str:
    """What tells a template from others: the text of one in Jinja, else its name."""
    if isinstance(template, Jinja):
        return json_fingerprint(template.source)
    return name if template == TEMPLATES[name] else f"{name} without bos"


def _open_tokenizer(path: str | Path | None, base: Base) -> Tokenizer:
    if not path:
        raise UserError(
            "base.tokenizer is empty and the base brings none; name a file or directory"
        )
    return within_rows(open_tokenizer(path), base.config.vocab_size)


def _check_models(setup: Setup) -> None:
    """Raise UserError unless the bare base and every bank can be run as `config.run` says."""
    setup.model(())
    for stage in setup.stages:
        for spec in stage.added:
            setup.model((spec,))
            where = f"stages.{stage.name}.banks.{spec.name}"
            _check_languages(where, spec, setup.languages)


def _check_languages(where: str, spec: BankSpec, languages: Languages | None) -> None:
    if spec.gate != "language" or spec.forcing == "off":
        return
    if languages is None:
        raise UserError(f"{where}: gate 'language' needs a table of languages: data.languages")
    if spec.experts != len(languages.experts):
        raise UserError(
            f"{where}.experts: {spec.experts}, but data.languages has {len(languages.experts)} "
            f"({', '.join(languages.experts)})"
        )
