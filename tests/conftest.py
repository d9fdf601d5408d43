"""What all tests share: simulated devices, the data folder, and no silent skip of a data test."""

import collections
import gc
import os
import re
import signal
import sys
from pathlib import Path

from tests import quick

os.environ.update(quick.environment())

import jax
import pytest

# Tracing makes millions of objects that live for long: looking for circles among them as often as
# Python does by itself took a tenth of the time.
gc.set_threshold(100_000, 50, 100)
# A shape that broadcasts by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parents[1]
DATA_DIR = Path(os.environ.get("MEDMOE_DATA", ROOT.parent / "shared" / "data")).resolve()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that use it carry the marker `data`."""
    return DATA_DIR


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a background job, where the shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_configure(config):
    """Say where this process and its children import from: this checkout, and torch only if asked.

    TensorBoard's writer imports torch wherever that is installed, which takes seconds.
    """
    paths = [str(ROOT)]
    if "not parity" in config.getoption("markexpr"):
        paths.insert(0, str(ROOT / "tests" / "without_torch"))
    sys.path[:0] = paths
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([given] if given else [])])


class _Unread(pytest.Module):
    """A file of which no test is asked for."""

    def collect(self):
        return []


def pytest_pycollect_makemodule(module_path, parent):
    """Do not import a file that cannot have a test of a `-m` like "a and not b" or "a or b".

    It names none of the marks asked for, or carries one that is refused as a whole. Torch alone
    takes ten seconds to import.
    """
    asked = parent.config.getoption("markexpr")
    if "(" in asked:
        return None
    text = module_path.read_text()
    refused = re.findall(r"not (\w+)", asked)
    wanted = set(re.findall(r"\w+", asked)) - {*refused, "and", "or", "not"}
    whole = "|".join(refused) or "-"
    if (not wanted or any(f"mark.{name}" in text for name in wanted)) and not re.search(
        rf"^pytestmark = pytest\.mark\.({whole})$", text, re.MULTILINE
    ):
        return None
    return _Unread.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    """Files with few tests first: these are the long ones, and the last to come should be short."""
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_runtest_setup(item):
    """Skip a test marked `data` only where the data folder is absent; compile as a test needs."""
    if not quick.SHIPPED and any(item.get_closest_marker(name) for name in ("aot", "shipped")):
        pytest.fail("looks at a compiled program: run it with MEDMOE_SHIPPED=1", pytrace=False)
    if item.get_closest_marker("data") and not DATA_DIR.is_dir():
        pytest.skip(f"no data folder at {DATA_DIR} (set MEDMOE_DATA)")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn the skip of a test marked `data` into a failure where the data folder exists."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.get_closest_marker("data") and DATA_DIR.is_dir():
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} is marked `data` and was skipped although {DATA_DIR} exists: "
            f"{call.excinfo.value if call.excinfo else report.longrepr}"
        )
