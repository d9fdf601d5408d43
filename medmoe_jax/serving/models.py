"""The models of a server: each a language model with a worker that answers for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import anyio

from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.streaming import Reader
from medmoe_jax.inference.worker import Worker
from medmoe_jax.serving.asked import Asked, ChatRequest, Prompt, Text
from medmoe_jax.serving.refusals import Refused, too_long


class PreparedPrompt(NamedTuple):
    """A prompt as ids, and what reads each of its answers.

    Attributes:
      ids: of the prompt.
      text: that is told where the prompt is to be echoed.
      language: the expert of its language, or -1.
      requests: one for each answer.
      readers: of the answers.
    """

    ids: tuple[int, ...]
    text: str
    language: int
    requests: list[Request]
    readers: list[Reader]


class Served:
    """A model under its name.

    Attributes:
      name: as requests name it.
      model: what makes prompts and reads answers.
      worker: what answers.
      about: further facts for those who list the models.
      scoring: lets one request at a time have its prompts scored.
    """

    def __init__(
        self, name: str, model: LanguageModel, worker: Worker, about: dict[str, Any] | None = None
    ) -> None:
        self.name, self.model, self.worker = name, model, worker
        self.about = about or {}
        self._created = int(time.time())
        self.scoring = anyio.CapacityLimiter(1)

    def content(self) -> dict[str, Any]:
        """The model as `/v1/models` tells it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "medmoe",
            "max_model_len": self.model.context,
            **self.about,
        }

    def prepare(self, asked: Asked) -> list[PreparedPrompt]:
        """The prompts of a request, each with the requests and readers of its answers.

        Raises:
          Refused: more answers are asked for than there are places, or a prompt is empty, or does
            not fit the context.
          UserError: the template refuses a prompt.
        """
        written = isinstance(asked, Text) and asked.max_tokens != 0
        answers = asked.n * (len(asked.prompts) if written else 1)
        if answers > self.worker.places:
            raise Refused(
                f"a request may ask for {self.worker.places} answers at most, and this one asks "
                f"for {answers}",
                param="n" if asked.n > 1 else "prompt",
            )
        if isinstance(asked, ChatRequest):
            turns = list(asked.turns)
            ids, language = self.model.prompt(turns), self.model.language(turns)
            return [self._prepared(asked, "messages", ids, "", language, 0)]
        assert isinstance(asked, Text)
        prompts = [self._encoded(prompt) for prompt in asked.prompts]
        return [
            self._prepared(asked, "prompt", ids, text, self.model.language(text), number * asked.n)
            for number, (ids, text) in enumerate(prompts)
        ]

    def _encoded(self, prompt: Prompt) -> tuple[list[int], str]:
        """The ids and the text of a prompt without a template."""
        tokenizer = self.model.encoder.tokenizer
        if isinstance(prompt, str):
            bos = tokenizer.bos_id if tokenizer.encodes_bos else None
            first = [] if bos is None else [bos]
            return [*first, *tokenizer.encode_markup(prompt, start=True)], prompt
        size = self.model.engine.config.decoder.vocab_size
        if not all(0 <= token < size for token in prompt):
            raise Refused(f"prompt: ids must be from 0 to {size - 1}", param="prompt")
        return list(prompt), tokenizer.decode(prompt, start=True)

    def _prepared(
        self, asked: Asked, param: str, ids: Sequence[int], text: str, language: int, first: int
    ) -> PreparedPrompt:
        """A prompt's requests; `first` is the number of its first answer among all."""
        context = self.model.context
        if not ids:
            raise Refused(f"{param}: is empty", param=param)
        room = max(1, context - len(ids)) if asked.max_tokens is None else asked.max_tokens
        if len(ids) + room > context:
            raise too_long(len(ids), room, context, param)
        chat = isinstance(asked, ChatRequest)
        read = self.model.reader if chat else self.model.continuing
        requests = [
            Request(
                tuple(ids),
                room,
                self.model.ends,
                dataclasses.replace(asked.sampling, first=first + number),
                language,
                asked.alternatives,
            )
            for number in range(asked.n if room else 0)
        ]
        return PreparedPrompt(
            tuple(ids), text, language, requests, [read(ids, asked.stops) for _ in requests]
        )
