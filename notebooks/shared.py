"""Writes into every notebook what all of them share: the way to Colab, and the cell that installs.

  python notebooks/shared.py      (or: make notebooks)

The repository's address is `tool.medmoe.repository` of pyproject.toml, and is written nowhere else
by hand. The cell tagged `install` is the file install.py beside this one, with the address in it;
the cell tagged `colab` has the badge, or says what to do while there is no address.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_COLAB = "https://colab.research.google.com/github"
_BY_HAND = (
    "In Colab: *File › Upload notebook*; then upload the package's wheel beside it (the folder on "
    "the left): the next cell installs it."
)


def repository() -> str:
    """The repository's address, "" while it has none."""
    with open(FOLDER.parent / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["medmoe"]["repository"]


def way(address: str, name: str) -> str:
    """How a notebook gets into Colab: the badge, for what is on GitHub, or by hand."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if not found:
        return _BY_HAND
    return f"[![Open in Colab]({_BADGE})]({_COLAB}/{found[1]}/blob/main/notebooks/{name})"


def install(address: str) -> str:
    """The cell that installs."""
    text = (FOLDER / "install.py").read_text(encoding="utf-8").strip()
    return re.sub(r'^REPOSITORY = ".*"', f'REPOSITORY = "{address}"', text, flags=re.MULTILINE)


def fill(notebook: nbformat.NotebookNode, address: str, name: str) -> nbformat.NotebookNode:
    """The notebook with what is shared put in; raises ValueError where it has no place for it."""
    texts = {"colab": way(address, name), "install": install(address)}
    for tag, text in texts.items():
        cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
        if len(cells) != 1:
            raise ValueError(f"{name}: {len(cells)} cells are tagged '{tag}', not one")
        cells[0].source = text
    return notebook


def main() -> None:
    """Fill all notebooks."""
    for path in NOTEBOOKS:
        filled = fill(nbformat.read(path, as_version=4), repository(), path.name)
        nbformat.write(filled, path)


if __name__ == "__main__":
    main()
