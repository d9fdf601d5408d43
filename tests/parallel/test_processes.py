"""What a process finds out alone, and how the pods of a cluster meet."""

import os
import signal
import subprocess
import sys

import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes
from tests.several import free_port


@pytest.mark.parametrize(
    "several, message",
    [
        (("", 2, 0), "processes: 2 need a coordinator"),
        (("here", 2, 0), "coordinator: 'here' is not HOST:PORT, nor auto"),
        (("host:", 2, 0), "'host:' is not HOST:PORT"),
        (("host:1234", 2, 2), "process: 2 is none of 2, counted from 0"),
        (("host:1234", 2, -1), "process: -1"),
    ],
)
def test_what_does_not_fit_together(several, message):
    with pytest.raises(UserError, match=message):
        processes.Membership(*several)


def test_alone():
    with processes.Membership("", 1, 0):
        assert (processes.count(), processes.index()) == (1, 0)
        assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.end(3) == 3


def test_a_notice_is_a_sigterm_and_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Notice() as notice:
        assert not notice()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice() and notice()
    assert signal.getsignal(signal.SIGTERM) == before


# On a machine without TPU, JAX looks for no cluster of them.
POD = """
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
from medmoe_jax.parallel import processes
with processes.Membership("auto", 1, 0):
    print(processes.count(), processes.index(), processes.gather(processes.index()))
"""


def test_pods_of_gke_meet_by_what_it_tells_them():
    """Two slices of one pod each: the second slice's pods come after the first's."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(free_port())}
    env |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    env |= {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:1"}
    pods = [
        subprocess.Popen(
            [sys.executable, "-c", POD],
            env={**env, "MEGASCALE_SLICE_ID": slice_},
            stdout=subprocess.PIPE,
            text=True,
        )
        for slice_ in "01"
    ]
    try:
        said = [pod.communicate(timeout=300)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0]
    assert said == ["2 0 [0, 1]\n", "2 1 [0, 1]\n"]


def test_a_cluster_whose_processes_do_not_meet_is_no_bad_input(monkeypatch):
    """The launcher and Kubernetes start such a job again, one with bad input not."""

    def initialize(**given):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(processes, "_initialize", initialize)
    with pytest.raises(processes.ProcessError, match="did not meet: DEADLINE_EXCEEDED"):
        processes.Membership("auto", 1, 0).__enter__()
