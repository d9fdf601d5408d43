"""A base with its banks as something that answers: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.languages import spoken
from medmoe_jax.data.templates import Template, stops
from medmoe_jax.data.tokenizers import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.inference.engine import Engine, Sampling


class LanguageModel:
    """Applies the chat template around an `Engine`.

    A prompt is the text of one user turn, or a list of turns `{"role", "content"}` that ends with
    a user's. A completion's tokens are those a training run would count as targets: the text and
    the mark that ends the turn, if the template has one. `expert_of` gives the expert of a text's
    language, or -1, for gates that always force it.
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
        self.stops = stops(template, tokenizer)

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[float, int]]:
        """`(summed log-probability, tokens)` of one completion a prompt."""
        return [row[0] for row in self.choose(prompts, [[c] for c in completions])]

    def choose(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, int]]]:
        """`(summed log-probability, tokens)` of every choice of every prompt."""
        prompt_ids = [self._prompt(prompt) for prompt in prompts]
        choice_ids = [
            [self._completion(prompt, ids, choice) for choice in options]
            for prompt, ids, options in zip(prompts, prompt_ids, choices, strict=True)
        ]
        sums = self.engine.score(prompt_ids, choice_ids, self._experts(prompts))
        return [
            [(s, len(ids)) for s, ids in zip(row, options, strict=True)]
            for row, options in zip(sums, choice_ids, strict=True)
        ]

    def generate(
        self, prompts: Sequence[str], max_tokens: int, sampling: Sampling = Sampling()
    ) -> list[str]:
        """Answers, up to the end of the turn or `max_tokens`."""
        prompt_ids = [self._prompt(prompt) for prompt in prompts]
        # A template that ends a turn by plain text has no stop id; -1 is never generated.
        stop_ids = self.stops.ids or (-1,)
        experts = self._experts(prompts)
        answers = self.engine.generate(prompt_ids, max_tokens, stop_ids, sampling, experts)
        tokenizer = self.encoder.tokenizer
        return [
            self._cut(tokenizer.decode(ids, start=tokenizer.begins_after(prompt)))
            for prompt, ids in zip(prompt_ids, answers, strict=True)
        ]

    def _cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.stops.texts if stop in text]
        return text[: min(ends, default=len(text))]

    def _experts(self, prompts) -> list[int]:
        return [self.expert_of(spoken(_turns(prompt))) for prompt in prompts]

    def _prompt(self, prompt) -> list[int]:
        ids = self.encoder.prompt(_turns(prompt))
        if not ids:
            raise UserError("the prompt is empty and the template adds nothing to it")
        return ids

    def _completion(self, prompt, prompt_ids: list[int], text: str) -> list[int]:
        turns = [*_turns(prompt), {"role": "assistant", "content": text}]
        row = self.encoder({"conversations": turns, "language": ""})
        end = int(row.loss_mask.nonzero()[0].max(initial=-1)) + 1
        return row.tokens[len(prompt_ids) : end].tolist()


def _turns(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
