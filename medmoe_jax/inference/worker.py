"""A thread that owns a decoder and answers the requests of many others.

Whoever asks is told of every new token by a function that is called in this thread, and must be
quick. Whatever ends the thread is told to all who wait, and to all who ask later.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Decoding, Request, Said

Told = Said | BaseException  # of which an exception is the last


class Full(Exception):
    """No request is taken until others have ended."""


class TimeLimit(Exception):
    """A request has had all the time that it was given."""


class Closed(Exception):
    """The worker takes no more requests: it was closed, or has failed."""


class Ask:
    """A request with whoever waits for its answer."""

    def __init__(self, request: Request, tell: Callable[[Told], None], until: float) -> None:
        """
        Args:
          request: what is asked.
          tell: called with all that becomes of it: `Said`, the last one with `ended`, or an
            exception, after which nothing comes.
          until: the time, by the worker's clock, at which the asker has waited enough.
        """
        self.request, self.tell, self.until = request, tell, until
        self.number: int | None = None  # that the decoder gave it


class Worker:
    """Runs a `Decoding` in a thread of its own, which is ended by `close`, `stop` or Python's end.

    Attributes:
      places: the most requests that wait or are answered.
    """

    def __init__(
        self, decoding: Decoding, places: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the thread.

        Args:
          decoding: what answers; nobody else may use it.
          places: see above.
          clock: tells the time in seconds.
        """
        self.places = places
        self._decoding, self._clock = decoding, clock
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over the next two
        self._asks: set[Ask] = set()
        self._over: BaseException | None = None
        self._live: dict[int, Ask] = {}  # by the decoder's number; the thread's own
        self._closing = False  # the thread's own
        self._end: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._end.add_done_callback(self._tell_end)
        # Python waits for every thread that is no daemon before it calls what `atexit` knows.
        self._thread = threading.Thread(target=self._run_to_end, name="decoder", daemon=True)
        atexit.register(self._leave)
        self._thread.start()

    def ask(
        self, requests: Sequence[tuple[Request, Callable[[Told], None]]], seconds: float
    ) -> list[Ask]:
        """Ask for the answers to some requests, all of them or none.

        Args:
          requests: each with what is told of it; see `Ask`.
          seconds: the most that each may take, waiting included.

        Raises:
          Full: there are not as many free places.
          Closed: nothing is answered any more.
        """
        until = self._clock() + seconds
        asks = [Ask(request, tell, until) for request, tell in requests]
        with self._lock:
            self._check_open()
            if len(self._asks) + len(asks) > self.places:
                raise Full(f"{len(self._asks)} of {self.places} places are taken")
            self._asks.update(asks)
            for ask in asks:
                self._jobs.put(lambda ask=ask: self._submit(ask))
        return asks

    def cancel(self, ask: Ask) -> None:
        """Free the place of a request that nobody waits for; it may have ended already."""
        self._jobs.put(lambda: self._cancel(ask))

    @property
    def pending(self) -> int:
        """How many requests wait or are answered."""
        with self._lock:
            return len(self._asks)

    @property
    def failure(self) -> BaseException | None:
        """What has ended the thread, where it was not `close`."""
        return self._end.exception() if self._end.done() else None

    def when_over(self, tell: Callable[[], None]) -> None:
        """Call this at the thread's end, in that thread, or now where it is over."""
        self._end.add_done_callback(lambda _: tell())

    def close(self) -> None:
        """Answer what was asked, take nothing more, and wait for the thread's end.

        What the thread has failed with is raised again.
        """
        with self._lock:
            self._over = self._over or Closed("the decoder takes no more requests")
        self._jobs.put(self._close)
        self._thread.join()
        self._end.result()

    def stop(self) -> None:
        """Have the thread end after its step, whatever was asked; neither waits nor takes a lock.

        So it may be called wherever Python frees an object.
        """
        self._jobs.put(self._stop)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The thread ---------------------------------------------------------------------------------

    def _run_to_end(self) -> None:
        with contextlib.ExitStack() as leaving:
            leaving.push(self._keep_end)
            self._run()

    def _keep_end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        """The thread's error is raised where somebody asks for its end, not here."""
        atexit.unregister(self._leave)
        if error is None or isinstance(error, Closed):
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
        return True

    def _run(self) -> None:
        while self._live or not self._closing:
            self._do_jobs()
            now = self._clock()
            for ask in [ask for ask in self._live.values() if now >= ask.until]:
                try:
                    self._cancel(ask)
                finally:
                    ask.tell(TimeLimit())
            for said in self._decoding.step() if self._live else ():
                ask = self._live.get(said.request)
                if ask is None:
                    continue
                if said.ended:
                    self._forget(ask)
                ask.tell(said)

    def _do_jobs(self) -> None:
        """All that was put down; waits for something where there is nothing else to do."""
        while True:
            try:
                job = self._jobs.get(block=not self._live and not self._closing)
            except queue.Empty:
                return
            job()

    def _submit(self, ask: Ask) -> None:
        try:
            ask.number = self._decoding.submit(ask.request)
        except UserError as error:
            self._forget(ask)
            ask.tell(error)
        else:
            self._live[ask.number] = ask

    def _cancel(self, ask: Ask) -> None:
        if ask.number in self._live:
            self._forget(ask)  # first: who sees that a row is free finds its place free too
            self._decoding.cancel(ask.number)

    def _forget(self, ask: Ask) -> None:
        """An ended request has no place any more."""
        if ask.number is not None:
            del self._live[ask.number]
        with self._lock:
            self._asks.discard(ask)

    def _close(self) -> None:
        self._closing = True

    def _stop(self) -> None:
        raise Closed

    def _leave(self) -> None:
        """At Python's end: no step may be cut short within the device's code."""
        self.stop()
        self._thread.join()

    def _check_open(self) -> None:
        if self._over is not None:
            raise Closed(str(self._over)) from self._over

    def _tell_end(self, end: concurrent.futures.Future[None]) -> None:
        """The thread is over: nobody may wait for it in vain."""
        error = end.exception()
        with self._lock:
            self._over = over = error or self._over or Closed("the decoder was stopped")
            waiting, self._asks = self._asks, set()
        for ask in waiting:
            ask.tell(over)
