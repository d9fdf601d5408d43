"""A decoder without a model, whose answers are known: it says what a function of the prompt says."""

from collections.abc import Callable, Sequence

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Request, Said, Token


class Scripted:
    """A `Decoding` of a few rows; each step says one token a row.

    Attributes:
      running: requests in rows, by number; `waiting`: those without one.
      most: the most rows that were taken at once.
      before_step: called before each step.
    """

    def __init__(
        self,
        answer: Callable[[Request], Sequence[int]],
        rows: int = 4,
        before_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.answer, self.rows, self.before_step = answer, rows, before_step
        self.running: dict[int, tuple[Request, list[int]]] = {}
        self.waiting: dict[int, Request] = {}
        self.count = self.most = 0

    def submit(self, request: Request) -> int:
        if not request.prompt:
            raise UserError("every prompt needs at least one token")
        self.count += 1
        self.waiting[self.count] = request
        return self.count

    def cancel(self, request: int) -> None:
        self.waiting.pop(request, None)
        self.running.pop(request, None)

    def step(self) -> list[Said]:
        self.before_step()
        while self.waiting and len(self.running) < self.rows:
            number, request = next(iter(self.waiting.items()))
            del self.waiting[number]
            self.running[number] = (request, list(self.answer(request)))
        self.most = max(self.most, len(self.running))
        return [self._say(number) for number in list(self.running)]

    def _say(self, number: int) -> Said:
        request, left = self.running[number]
        said = left.pop(0)
        told = sum(1 for _ in self.answer(request)) - len(left)
        ended = "stop" if (said,) in request.stops else ""
        ended = ended or ("length" if told >= request.max_tokens or not left else "")
        if ended:
            del self.running[number]
        likely = tuple((said + n, -0.5 - n) for n in range(request.alternatives))
        return Said(number, (Token(said, -0.5, likely),), ended)
