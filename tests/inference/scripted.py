"""A decoder without a model, whose answers are known: a function of the prompt gives them."""

import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Request, Said, Token


class Scripted:
    """A `Decoding` of a few rows; each step says `stride` tokens a row.

    Attributes:
      cancelled: the numbers of requests that were cancelled while they waited or ran.
      most: the most rows that were taken at once.
    """

    def __init__(
        self,
        answer: Callable[[Request], Iterable[int]],
        rows: int = 4,
        before_step: Callable[[], object] = lambda: None,
        stride: int = 1,
    ) -> None:
        self.answer, self.rows, self.before_step = answer, rows, before_step
        self.stride = stride
        self.running: dict[int, tuple[Request, Iterator[int], Iterator[int]]] = {}
        self.waiting: dict[int, Request] = {}
        self.cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.count = self.most = 0

    def submit(self, request: Request) -> int:
        if not request.prompt:
            raise UserError("every prompt needs at least one token")
        self.count += 1
        self.waiting[self.count] = request
        return self.count

    def cancel(self, request: int) -> None:
        if self.waiting.pop(request, None) or self.running.pop(request, None):
            self.cancelled.put(request)

    def step(self) -> list[Said]:
        self.before_step()
        time.sleep(0)  # lets other threads run, as while a device computes
        while self.waiting and len(self.running) < self.rows:
            number = next(iter(self.waiting))
            request = self.waiting.pop(number)
            self.running[number] = (request, iter(self.answer(request)), itertools.count(1))
        self.most = max(self.most, len(self.running))
        return [self._say(number) for number in list(self.running)]

    def _say(self, number: int) -> Said:
        request, ids, told = self.running[number]
        tokens, ended = [], ""
        while len(tokens) < self.stride and not ended:
            token = next(ids)
            tokens.append(scored(token, request.alternatives))
            ended = "stop" if (token,) in request.stops else ""
            ended = ended or ("length" if next(told) >= request.max_tokens else "")
        if ended:
            del self.running[number]
        return Said(number, tuple(tokens), ended)


def scored(token: int, alternatives: int) -> Token:
    """A token with a log-probability and alternatives that can be told from its id."""
    likely = tuple((token + n, -0.5 - n) for n in range(alternatives))
    return Token(token, -0.5, likely)
