"""A notebook run as its reader runs it: by a kernel, in an empty folder, from the wheel alone."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from tests import quick, wheel

FOLDER = wheel.ROOT / "notebooks"
_WHERE = """
import medmoe_jax
assert medmoe_jax.__file__.startswith({site!r}), medmoe_jax.__file__
"""


def execute(name: str, folder: Path, parameters: str = "") -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Args:
      name: of the notebook.
      folder: where it runs.
      parameters: code that runs after the cell tagged `parameters`.

    Raises:
      CellExecutionError: a cell raised an error; shows it.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    tagged = [n for n, cell in enumerate(notebook.cells) if "parameters" in tags(cell)]
    for at in tagged if parameters else ():
        notebook.cells.insert(at + 1, new_code_cell(parameters))
    site = str(wheel.site())
    notebook.cells.append(new_code_cell(_WHERE.format(site=site)))
    paths = os.pathsep.join([site, str(wheel.ROOT / "tests" / "without_torch")])
    flags = {} if quick.SHIPPED else {"XLA_FLAGS": quick.flags(1)}
    own = {"PYTHONPATH": paths, "IPYTHONDIR": str(folder / ".ipython"), **flags}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where)
    return client.execute(env=os.environ | own)


def tags(cell: nbformat.NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", ()))


def printed(notebook: nbformat.NotebookNode, tag: str = "") -> str:
    """What its cells, or those with a tag, have printed, and the texts of what they have shown."""
    told = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and (not tag or tag in tags(cell)):
            for one in cell.outputs:
                told.append(one.get("text", "") or one.get("data", {}).get("text/plain", ""))
    return "\n".join(told)


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """All that its cells have shown of a kind, such as `image/png` or `text/html`."""
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    return [one.data[kind] for one in outputs if kind in one.get("data", {})]
