"""A base with its banks as something that answers: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from medmoe_jax.data.conversation import Turn, turns_of
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.languages import spoken
from medmoe_jax.data.pieces import Template
from medmoe_jax.data.shortening import shortened
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.inference.engine import Engine, Sampling

Prompt = str | Sequence[Turn]


class Answer(NamedTuple):
    """What a model says.

    Attributes:
      text: the answer.
      reasoning: what it thinks before it, where the template has a place for that.
    """

    text: str
    reasoning: str = ""


class LanguageModel:
    """Applies the chat template around an `Engine`.

    A prompt is the text of one user turn, or a list of turns `{"role", "content"}` that ends with
    a user's. A completion's tokens are those a training run would count as targets: all that the
    model says after the prompt, up to what ends the turn. `expert_of` gives the expert of a text's
    language, or -1, for gates that always force it.

    Attributes:
      shortened: prompts that were cut so far, because they did not fit the context.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        expert_of: Callable[[str], int] = lambda text: -1,
    ):
        self.engine = engine
        self.expert_of = expert_of
        self.encoder = Encoder(tokenizer, template)
        self.stops = self.encoder.stops
        self.shortened = 0

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> list[tuple[float, int]]:
        """`(summed log-probability, tokens)` of one completion a prompt."""
        return [row[0] for row in self.choose(prompts, [[c] for c in completions])]

    def choose(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, int]]]:
        """`(summed log-probability, tokens)` of every choice of every prompt."""
        prompt_ids, choice_ids = [], []
        for prompt, options in zip(prompts, choices, strict=True):
            turns = turns_of(prompt)
            ids = self._prompt(turns)
            said = [self._completion(turns, len(ids), choice) for choice in options]
            room = max(map(len, said))
            if len(ids) + room > self._context:
                turns, ids = self._fitted(turns, ids, room)
                said = [self._completion(turns, len(ids), choice) for choice in options]
            prompt_ids.append(ids)
            choice_ids.append(said)
        sums = self.engine.score(prompt_ids, choice_ids, self._experts(prompts))
        return [
            [(s, len(ids)) for s, ids in zip(row, options, strict=True)]
            for row, options in zip(sums, choice_ids, strict=True)
        ]

    def generate(
        self, prompts: Sequence[Prompt], max_tokens: int, sampling: Sampling = Sampling()
    ) -> list[str]:
        """Answers without their reasoning, up to the end of the turn or `max_tokens`."""
        return [answer.text for answer in self.answer(prompts, max_tokens, sampling)]

    def answer(
        self, prompts: Sequence[Prompt], max_tokens: int, sampling: Sampling = Sampling()
    ) -> list[Answer]:
        """Answers and what was thought before them, up to the end of the turn or `max_tokens`."""
        prompt_ids = []
        for prompt in prompts:
            turns = turns_of(prompt)
            prompt_ids.append(self._fitted(turns, self._prompt(turns), max_tokens)[1])
        tokenizer = self.encoder.tokenizer
        stops = [*self.stops.ids, *(tokenizer.encode(text) for text in self.stops.texts)]
        experts = self._experts(prompts)
        answers = self.engine.generate(prompt_ids, max_tokens, stops, sampling, experts)
        texts = (
            self._cut(tokenizer.decode(ids, start=tokenizer.begins_after(prompt)))
            for prompt, ids in zip(prompt_ids, answers, strict=True)
        )
        return [Answer(*self.encoder.read(text)) for text in texts]

    def _cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.stops.texts if stop in text]
        return text[: min(ends, default=len(text))]

    def _experts(self, prompts: Sequence[Prompt]) -> list[int]:
        return [self.expert_of(spoken(turns_of(prompt))) for prompt in prompts]

    @property
    def _context(self) -> int:
        return self.engine.config.decoder.max_positions

    def _fitted(
        self, turns: Sequence[Turn], ids: list[int], room: int
    ) -> tuple[Sequence[Turn], list[int]]:
        """The turns of a prompt and their ids, with room for an answer in the context."""
        limit = self._context - room
        if len(ids) <= limit or limit <= 0:  # the engine refuses what leaves no room
            return turns, ids
        self.shortened += 1
        turns = shortened(turns, limit, lambda some: len(self.encoder.prompt(some)))
        return turns, self._prompt(turns)

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        ids = self.encoder.prompt(turns)
        if not ids:
            raise UserError("the prompt is empty and the template adds nothing to it")
        return ids

    def _completion(self, turns: Sequence[Turn], prompt: int, text: str) -> list[int]:
        """The ids that the model says after a prompt of so many in order to give this answer."""
        answered = [*turns, {"role": "assistant", "content": text}]
        row = self.encoder({"conversations": answered, "language": ""})
        end = int(row.loss_mask.nonzero()[0].max(initial=-1)) + 1
        return row.tokens[prompt:end].tolist()
