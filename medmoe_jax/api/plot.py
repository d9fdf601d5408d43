"""Drawing what runs have logged: `medmoe_jax.plot`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from medmoe_jax.api.train import Finished
from medmoe_jax.evaluation.html import Picture, framed, page_html, report_html, save_png
from medmoe_jax.evaluation.logged import pictures, read_logged
from medmoe_jax.storage.places import make_folder, place
from medmoe_jax.training.run import Run

PAGE = "plots.html"
FOLDER = "plots"  # in a work directory
_TITLE = "How training went"


@dataclass(frozen=True)
class Pictures:
    """Pictures of runs; in a notebook they are shown, and answer the pointer.

    Attributes:
      pictures: by the names of their files.
    """

    pictures: Mapping[str, Picture]

    def figures(self) -> dict[str, Figure]:
        """Figures of matplotlib, by the same names, to be changed or saved otherwise."""
        return {name: picture.figure() for name, picture in self.pictures.items()}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a page and a PNG file a picture into a folder; gives the page's path.

        Raises:
          OSError: it cannot be written.
        """
        to = place(folder)
        make_folder(to)
        for name, picture in self.pictures.items():
            save_png(to / f"{name}.png", picture)
        links = {"Scores": "../report.html"} if (to.parent / "report.html").is_file() else {}
        return report_html(to / PAGE, list(self.pictures.values()), _TITLE, links, live=True)

    def __repr__(self) -> str:
        return f"Pictures({', '.join(self.pictures)})"

    def _repr_html_(self) -> str:
        return framed(page_html(list(self.pictures.values()), _TITLE, live=True))


def plot(*runs: str | os.PathLike[str] | Finished | Run) -> Pictures:
    """Losses, scores by stage, use of experts over time and depth, ranks and angles of runs.

    Args:
      runs: work directories, or what `train` has given; several are drawn together.

    Raises:
      UserError: none is named, or one is no work directory or has logged nothing.
    """
    return Pictures(dict(pictures(read_logged([_workdir(one) for one in runs]))))


def _workdir(given: str | os.PathLike[str] | Finished | Run) -> str:
    run = given.run if isinstance(given, Finished) else given
    return str(run.workdir) if isinstance(run, Run) else os.fspath(run)
