"""The tiny recipe and its trained work directory, as options of commands name them."""

import pytest

from tests import several, tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`--config=` of the tiny recipe."""
    file = tmp_path_factory.mktemp("config") / "recipe.py"
    file.write_text(several.CONFIG)
    return f"--config={file}"


@pytest.fixture(scope="module")
def workdir():
    """The path of a work directory in which it was trained."""
    return str(tiny.trained()[1])
