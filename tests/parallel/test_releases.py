"""Plugins of jax that are of another release than jax asks for."""

import jax
import pytest
from packaging.requirements import Requirement

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes, releases, topology
from medmoe_jax.parallel.mesh import make_mesh

# As jax 0.11.2 has it, with the extras tpu, cuda12 and cuda13.
ASKED = (
    "jaxlib<=0.11.2,>=0.11.2",
    "libtpu==0.0.48.*",
    "jax-cuda12-plugin[with-cuda]<=0.11.2,>=0.11.2",
    "jax-cuda13-plugin[with-cuda]<=0.11.2,>=0.11.2",
)
JAX = {"jax": "0.11.2", "jaxlib": "0.11.2"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Gives a machine with jax 0.11.2, these plugins and files of these kinds of devices."""

    def make(plugins, *kinds):
        monkeypatch.setattr(
            releases, "requirements", lambda name, extras: list(map(Requirement, ASKED))
        )
        monkeypatch.setattr(releases, "installed", lambda: JAX | plugins)
        for kind in releases.FILES:
            file = tmp_path / kind
            file.unlink(missing_ok=True)
            if kind in kinds:
                file.touch()
            monkeypatch.setitem(releases.FILES, kind, (str(file),))

    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "")  # no device is asked for
    yield make
    jax.config.update("jax_platforms", before)


STALE = (
    r"libtpu 0\.0\.42\.1 is installed; jax 0\.11\.2 asks for ==0\.0\.48\.\*: pip install 'libtpu"
)


def test_a_plan_does_not_begin_with_a_libtpu_of_another_release(machine):
    machine({"libtpu": "0.0.42.1"})
    with pytest.raises(UserError, match=STALE):
        topology.describe("v5e:2x2")


def test_a_tpu_does_not_begin_with_a_libtpu_of_another_release(machine):
    """Neither one process nor several; where no TPU is or none is asked for, it does not matter."""
    machine({"libtpu": "0.0.42.1"}, "tpu")
    with pytest.raises(UserError, match=STALE):
        make_mesh({"fsdp": -1})
    with pytest.raises(UserError, match=STALE), processes.Membership("localhost:1", 2, 0):
        pass
    jax.config.update("jax_platforms", "cuda")
    releases.check_plugins()
    jax.config.update("jax_platforms", "tpu,cpu")
    with pytest.raises(UserError, match=STALE):
        releases.check_plugins()
    machine({"libtpu": "0.0.48.1"}, "tpu")
    releases.check_plugins()


def test_a_gpu_needs_one_plugin_that_fits(machine):
    machine({"jax-cuda12-plugin": "0.7.2"}, "gpu")
    with pytest.raises(UserError, match=r"jax-cuda12-plugin 0\.7\.2 is installed; jax 0\.11\.2"):
        releases.check_plugins()
    machine({"jax-cuda12-plugin": "0.7.2", "jax-cuda13-plugin": "0.11.2"}, "gpu")
    releases.check_plugins()
    machine({"jax-cuda12-plugin": "0.7.2"})
    releases.check_plugins()


def test_what_is_installed_here_fits():
    assert not list(releases.misfits(releases.installed()))
    releases.check_libtpu()
