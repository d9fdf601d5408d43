"""Several processes that run one program: how they meet, talk and part.

What they tell each other goes through JAX's coordination service, which process 0 hosts. It needs
no device and waits for whoever is late; collectives between CPUs give up after 30 seconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import sys
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed  # its client and what it found have no public names
from jax.experimental import multihost_utils

from medmoe_jax.errors import ParameterError, Stopped
from medmoe_jax.parallel import rollcall
from medmoe_jax.parallel.releases import check_plugins
from medmoe_jax.parallel.rollcall import ProcessError, RollCall

AUTO = "auto"
# Seconds. JAX's own net below the roll call.
_initialize = functools.partial(
    jax.distributed.initialize,
    initialization_timeout=60,
    heartbeat_timeout_seconds=60,
    shutdown_timeout_seconds=30,
)
_CLUSTER_COMES = 600
_ANSWER = 3600  # what the others wait for while one hashes or writes a large model
_calls = itertools.count()


class Membership:
    """This process as one of those that run a program together; a context manager.

    It begins before JAX is asked for a device.
    """

    def __init__(self, coordinator: str, processes: int, process: int) -> None:
        """Say who is who.

        Args:
          coordinator: HOST:PORT of process 0, which listens there and on the port after it; `auto`
            where the machines tell it (Cloud TPU, GKE, Slurm, Open MPI); "" = this is the only one.
          processes, process: how many there are, and which one this is; unused with `auto`.

        Raises:
          ParameterError: these do not fit together.
        """
        self._coordinator, self._processes, self._process = coordinator, processes, process
        self._roll: RollCall | None = None
        if coordinator == AUTO:
            return
        host, _, port = coordinator.rpartition(":")
        if coordinator and not (host and port.isdigit()):
            raise ParameterError(f"coordinator: '{coordinator}' is not HOST:PORT, nor auto")
        if not coordinator and processes != 1:
            raise ParameterError(f"processes: {processes} need a coordinator: HOST:PORT, or auto")
        if not 0 <= process < processes:
            raise ParameterError(f"process: {process} is none of {processes}, counted from 0")

    def __enter__(self) -> Membership:
        """Meet the others.

        Raises:
          ParameterError: `auto` finds nothing.
          UserError: a plugin of jax does not fit it (`releases.check_plugins`).
          ProcessError: a process did not come.
        """
        if self._coordinator:
            check_plugins()
        if self._coordinator == AUTO:
            self._meet_in_cluster()
        elif self._coordinator:
            self._meet_at_address()
        return self

    def _meet_in_cluster(self) -> None:
        try:
            # Pods begin when their node has fetched the image, some minutes after the first.
            _initialize(initialization_timeout=_CLUSTER_COMES)
        except ValueError as error:
            raise ParameterError(f"coordinator: auto finds nothing here: {error}") from None
        except RuntimeError as error:  # of JAX, which has found out who is who but cannot reach it
            raise ProcessError(f"the cluster's processes did not meet: {error}") from error
        found = distributed.global_state
        if found.coordinator_address is None:
            raise ParameterError("coordinator: auto finds no address of process 0 here")
        host = found.coordinator_address.rpartition(":")[0]
        with socket.create_server(("", 0)) as listener:
            ports = dict(gather((found.process_id, listener.getsockname()[1])))
            if found.process_id:
                address = (host, ports[0])
                self._roll = rollcall.answer(address, found.process_id, found.num_processes)
            else:
                self._roll = rollcall.host(listener, found.num_processes)

    def _meet_at_address(self) -> None:
        host, _, port = self._coordinator.rpartition(":")
        roll_port = int(port) + 1
        if self._process:
            self._roll = rollcall.answer((host, roll_port), self._process, self._processes)
        else:
            with socket.create_server(("", roll_port)) as listener:
                self._roll = rollcall.host(listener, self._processes)
        with contextlib.ExitStack() as unless_met:
            unless_met.push(self.__exit__)
            _initialize(
                self._coordinator,
                self._processes,
                self._process,
                cluster_detection_method="deactivate",
            )
            unless_met.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Part in good order; after an error, only once a death that may be its cause is known."""
        if self._roll is None:
            return
        if kind is None or issubclass(kind, Stopped):
            self._roll.leave()
        else:
            self._roll.fail()


def end(status: int) -> int:
    """A command's exit status; of several processes, one that failed ends here.

    Leaving in good order, JAX would wait for the others, who wait for this one.
    """
    if status and count() > 1:
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(status)
    return status


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
    client = distributed.global_state.client
    if client is None or count() == 1:
        return [value]
    call = next(_calls)
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


class Notice:
    """Whether the machine has asked the run to stop, by SIGTERM; to be used as a context manager.

    Called after every step, by all processes alike, it gives the same answer to all: JAX spreads
    the notice and chooses the step.
    """

    def __init__(self) -> None:
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

    def __exit__(self, *error: object) -> None:
        if count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *_) -> None:
        self._asked = True
