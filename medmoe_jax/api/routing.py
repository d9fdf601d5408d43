"""Which experts each language uses: what `Model.routing` gives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from medmoe_jax.base import trees
from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.languages import detector, row_languages
from medmoe_jax.data.sources import RowFitter, open_source
from medmoe_jax.errors import ParameterError
from medmoe_jax.evaluation import routing, routing_report
from medmoe_jax.evaluation.html import Picture, framed, page_html
from medmoe_jax.evaluation.routing import Gate, Texts
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.ranges import COUNT
from medmoe_jax.storage.places import exists
from medmoe_jax.training.config import source
from medmoe_jax.training.setup import Setup

TITLE = "Routing by language"


@dataclass(frozen=True)
class Routing:
    """Which experts the texts of each language use, by layer; in a notebook it shows itself.

    Attributes:
      texts: of each language.
      gates: what each router, or each bank's mixing weights, did with them.
    """

    texts: Sequence[Texts]
    gates: Sequence[Gate]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a gate and language, for a `Table`: shares as means over the layers.

        Of the picks, by the name of the expert; and of the tokens, those that pick the expert of
        their language, where it has one.
        """
        found = []
        for gate in self.gates:
            parts = zip(self.texts, gate.share_GxNxE, gate.own_G, gate.own_GxN, strict=True)
            for text, share_NxE, own, own_N in parts:
                share_E = share_NxE.mean(axis=0).tolist()
                found.append(
                    {"gate": gate.name, "language": text.name}
                    | dict(zip(gate.experts, share_E, strict=True))
                    | ({"own expert": float(own_N.mean())} if own >= 0 else {})
                )
        return found

    @property
    def pictures(self) -> dict[str, Picture]:
        """By the names of their files."""
        return dict(routing_report.pictures(self.texts, self.gates))

    def figures(self) -> dict[str, Figure]:
        """Figures of matplotlib, by the same names, to be changed or saved otherwise."""
        return {name: picture.figure() for name, picture in self.pictures.items()}

    def to_dict(self) -> dict[str, Any]:
        """All figures, by gate, then by language, then by layer."""
        return routing_report.to_dict(self.texts, self.gates)

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write routing.json, routing.html and a PNG a picture into a folder; gives their paths.

        Raises:
          OSError: it cannot be written.
        """
        return routing_report.save(os.fspath(folder), self.texts, self.gates, TITLE)

    def __repr__(self) -> str:
        languages = ", ".join(one.name for one in self.texts)
        return f"Routing({languages}; {', '.join(gate.name for gate in self.gates)})"

    def _repr_html_(self) -> str:
        return framed(page_html(list(self.pictures.values()), TITLE))


def read(setup: Setup, data: Sequence[str], limit: int | None = None) -> Sequence[Texts]:
    """The rows of each language; see `Model.routing`."""
    if limit is not None:
        COUNT.check_whole("limit", limit)
    return routing.by_language(_rows(setup, data), setup.languages, limit)


def measure(setup: Setup, model: LanguageModel, texts: Sequence[Texts]) -> Routing:
    """Run the rows of `read` through a model and read its gates."""
    engine = model.engine
    gates = routing.measure(
        engine.config,
        trees.overlay(engine.base, engine.trained),
        engine.banks,
        setup.mesh,
        texts,
        setup.encoder,
        setup.config.data.length,
        engine.batch,
        setup.languages,
    )
    return Routing(texts, gates)


def _rows(setup: Setup, names: Sequence[str]) -> Iterator[tuple[Conversation, str, str]]:
    """Rows of sources of the recipe, or of paths, with their languages and places."""
    data = setup.config.data
    detect = detector(data.detect_language)
    fit = RowFitter(setup.encoder, data.length)
    for name in names:
        if name not in data.sources and not (is_name(name) or exists(name)):
            known = ", ".join(data.sources) or "none"
            raise ParameterError(f"data: '{name}' is no file and no source of the config ({known})")
        fields = data.sources[name] if name in data.sources else source(name)
        rows = open_source(name, fields.to_dict(), data.ignore, fit).rows
        found = row_languages(rows, detect)
        for number, (row, (code, _)) in enumerate(zip(rows, found, strict=True)):
            yield row, code, rows.place(number)
