"""A server process: its socket, its warm-up, its signals and its end."""

from __future__ import annotations

import contextlib
import errno
import queue
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence

import uvicorn
from starlette.types import ASGIApp

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.serving.models import Served

_LONG = 512  # tokens
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address; nobody is let in yet.

    Raises:
      UserError: the address is taken, or is not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UserError(f"--host: '{host}' is no address of this machine ({error})") from None
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_address(error, host, port) from error
    return bound


def _no_address(error: OSError, host: str, port: int) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"--port: another program listens at {host}, port {port}; end it, or give another port"
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM):
        return UserError(f"--host, --port: {host}, port {port}: {error.strerror}")
    return error


def warm_up(served: Served) -> None:
    """Let a model answer a long prompt and a short one, so that what most need is compiled.

    The long one comes first, as memory grows with it, and programs are of a size of memory. What an
    answer fails with is raised.
    """
    model, told = served.model, queue.SimpleQueue()
    ids = model.prompt([{"role": "user", "content": "Hello"}])
    for length in (min(_LONG, model.context // 2), len(ids)):
        prompt = (ids * (length // len(ids) + 1))[:length]
        request = Request(tuple(prompt), 2, model.ends, Sampling())
        served.worker.ask([(request, told.put)], float("inf"))
        said = told.get()
        while not isinstance(said, BaseException) and not said.ended:
            said = told.get()
        if isinstance(said, BaseException):
            raise said


class Server(uvicorn.Server):
    """Serves until a signal comes or a model fails; what it has begun to answer it ends."""

    def __init__(self, app: ASGIApp, grace: float) -> None:
        """
        Args:
          app: the application.
          grace: seconds that answers have to end once it is asked to stop.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(grace),
            )
        )

    def serve_models(
        self, models: Sequence[Served], bound: socket.socket, ready: Callable[[], None]
    ) -> None:
        """Run until the end; `ready` is called once clients are let in.

        What a model has failed with is raised again.

        Raises:
          UserError: another program has begun to listen at the address.
        """
        host, port = bound.getsockname()[:2]
        for one in models:
            one.worker.when_over(self._stop)
        self._ready = ready
        try:
            self.run(sockets=[bound])
        except OSError as error:
            raise _no_address(error, host, port) from error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients in, and say so."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """A first signal lets the server end what it has begun, Ctrl-C after that ends it at once.

        Unlike uvicorn's own, a signal is not raised again when the server has ended in good order.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _stop(self) -> None:
        self.should_exit = True
