"""What all tests share: simulated devices, the data folder, and no silent skip of a data test."""

import os
from pathlib import Path

# Before the first import of jax: the tests run on eight simulated CPU devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

import jax
import pytest

# A shape that broadcasts by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

DATA_DIR = Path(
    os.environ.get("MEDMOE_DATA", Path(__file__).parents[2] / "shared" / "data")
).resolve()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that use it carry the marker `data`."""
    return DATA_DIR


def pytest_runtest_setup(item):
    """Skip a test marked `data` only where the data folder is absent."""
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
