"""Several processes that run one program: how they meet, talk and part.

What they tell each other here goes through JAX's coordination service, which process 0 hosts. It
needs no device and waits for whoever is late; collectives between CPUs give up after 30 seconds.
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from typing import Any

import jax
from jax._src import distributed  # its client has no public name
from jax.experimental import multihost_utils

from medmoe_jax.errors import UserError

AUTO = "auto"
# Seconds. A process that never comes, or dies, ends the others within two minutes.
_COMING, _SILENT, _LEAVING = 90, 60, 30
_ANSWER = 3600  # what the others wait for while one hashes or writes a large model
_ASKED = 40  # above the 30 of a collective that a death leaves hanging
_FAILED = "medmoe/failed"
_calls = itertools.count()


class ProcessError(RuntimeError):
    """Another process of the run never came, died or does not answer; the message says which."""


def start(coordinator: str, processes: int, process: int) -> None:
    """Join the other processes of a run, before anything else asks JAX for a device.

    Args:
      coordinator: HOST:PORT on which process 0 listens; `auto` where the machines tell it (Cloud
        TPU, Slurm, Open MPI); "" = there is only this process.
      processes, process: how many there are, and which one this is; unused with `auto`.

    Raises:
      UserError: the arguments do not fit together, or `auto` finds nothing.
      ProcessError: a process did not come.
    """
    if not coordinator:
        if processes != 1:
            raise UserError(f"--processes={processes} needs --coordinator=HOST:PORT, or auto")
        return
    waits = {
        "initialization_timeout": _COMING,
        "heartbeat_timeout_seconds": _SILENT,
        "shutdown_timeout_seconds": _LEAVING,
    }
    try:
        if coordinator == AUTO:
            jax.distributed.initialize(**waits)
            return
        _check(coordinator, processes, process)
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method="deactivate", **waits
        )
    except ValueError as error:
        raise UserError(f"--coordinator={coordinator}: {error}") from None
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            f"not all processes came to {coordinator} within {_COMING} s: {error}"
        ) from error


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("give HOST:PORT, or auto")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process} is not among --processes={processes}, from 0 on")


def count() -> int:
    """How many processes run this program; starts no backend where there is but one."""
    return jax.process_count() if distributed.global_state.client else 1


def index() -> int:
    """Which of them this is; number 0 writes what all have, and speaks to the person."""
    return jax.process_index() if distributed.global_state.client else 0


def gather(value: Any) -> list[Any]:
    """The JSON-able value of every process, in their order; all of them call this alike.

    Raises:
      ProcessError: a process does not answer.
    """
    if count() == 1:
        return [value]
    client, call = distributed.global_state.client, next(_calls)
    client.key_value_set(f"medmoe/{call}/{index()}", json.dumps(value))
    values = []
    for process in range(count()):
        try:
            text = client.blocking_key_value_get(f"medmoe/{call}/{process}", _ANSWER * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise ProcessError(f"process {process} does not answer: {error}") from error
        values.append(json.loads(text))
    # Whoever has reached this call has read the one before.
    client.key_value_delete(f"medmoe/{call - 1}/{index()}")
    return values


def missing() -> list[int]:
    """After a failure that may be another's: the processes that are no longer there.

    All that still are call this alike, each when it fails.
    """
    client, here = distributed.global_state.client, set()
    until = time.monotonic() + _ASKED
    try:
        client.key_value_set(f"{_FAILED}/{index()}", "", allow_overwrite=True)
        while len(here) < count() and time.monotonic() < until:
            time.sleep(0.2)
            here = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(_FAILED)}
    except jax.errors.JaxRuntimeError:  # its host, process 0, is gone
        return [0]
    return sorted(set(range(count())) - here)


class Notice:
    """Whether the machine has asked the run to stop, by SIGTERM; to be used as a context manager.

    Called after every step, by all processes alike, it gives the same answer to all: JAX spreads
    the notice and chooses the step.
    """

    def __init__(self):
        self._asked = False
        self._calls = itertools.count(1)

    def __enter__(self) -> Notice:
        # With several processes JAX itself listens for the signal.
        if count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __call__(self) -> bool:
        if count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(next(self._calls))

    def __exit__(self, *error) -> None:
        if count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *_) -> None:
        self._asked = True
