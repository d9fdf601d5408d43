"""Programs of this room's tests are small: most time would go into compiling them."""

import pytest

from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """See `tiny.quick_compiles`."""
    with tiny.quick_compiles():
        yield
