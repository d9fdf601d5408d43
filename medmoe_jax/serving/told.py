"""Answers in OpenAI's JSON, whole or in chunks."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.inference.requests import Token
from medmoe_jax.inference.streaming import NewText

_LEAST = -9999.0  # OpenAI's word for "very unlikely"; JSON has no infinity


class News(NamedTuple):
    """What is new of one answer.

    Attributes:
      index: its number.
      said: its new text.
      tokens: those that it is told with; NaN is the log-probability of one that nothing came
        before.
      ended: why it ended, or "".
      said_tokens: how many of them the model has said.
    """

    index: int
    said: NewText
    tokens: Sequence[Token] = ()
    ended: str = ""
    said_tokens: int = 0


class AnswerForm(Protocol):
    """How an endpoint writes answers."""

    prefix: str
    whole: str
    chunk: str

    def choice(self, news: News, log_probs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole answer, or all but the log-probabilities of what is new of it."""
        ...

    def delta(self, news: News, log_probs: dict[str, Any] | None, first: bool) -> dict[str, Any]:
        """What is new of an answer; `first`: nothing of it was told before."""
        ...

    def log_probs(
        self, tokenizer: Tokenizer, tokens: Sequence[Token], places: Sequence[int]
    ) -> dict[str, Any]:
        """Log-probabilities of tokens, which begin at these places of the text."""
        ...


class ChatForm:
    """The form of `/v1/chat/completions`. Reasoning is told apart, as other open servers do."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, news: News, log_probs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole answer."""
        thought = {"reasoning_content": news.said.reasoning} if news.said.reasoning else {}
        message = {"role": "assistant", "content": news.said.content, **thought}
        return _ended({"index": news.index, "message": message, "logprobs": log_probs}, news.ended)

    def delta(self, news: News, log_probs: dict[str, Any] | None, first: bool) -> dict[str, Any]:
        """What is new of an answer."""
        delta = {"role": "assistant", "content": ""} if first else {}
        if news.said.reasoning:
            delta["reasoning_content"] = news.said.reasoning
        if news.said.content:
            delta["content"] = news.said.content
        return _ended({"index": news.index, "delta": delta, "logprobs": log_probs}, news.ended)

    def log_probs(
        self, tokenizer: Tokenizer, tokens: Sequence[Token], places: Sequence[int]
    ) -> dict[str, Any]:
        """Each token with its alternatives."""
        del places

        def one(token: int, log_prob: float) -> dict[str, Any]:
            text, stands = shown(tokenizer, token), tokenizer.bytes_of(token)
            stands = text.encode() if stands == b"" else stands  # a mark, by its name
            told = None if stands is None else list(stands)
            return {"token": text, "logprob": max(log_prob, _LEAST), "bytes": told}

        content = [
            one(t.id, t.log_prob) | {"top_logprobs": [one(*other) for other in t.alternatives]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


class TextForm:
    """The form of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, news: News, log_probs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole answer."""
        choice = {"index": news.index, "text": news.said.content, "logprobs": log_probs}
        return _ended(choice, news.ended)

    def delta(self, news: News, log_probs: dict[str, Any] | None, first: bool) -> dict[str, Any]:
        """What is new of an answer."""
        del first
        return self.choice(news, log_probs)

    def log_probs(
        self, tokenizer: Tokenizer, tokens: Sequence[Token], places: Sequence[int]
    ) -> dict[str, Any]:
        """A list for each property, the token itself among its alternatives.

        Of alternatives that read alike, as halves of characters do, the likeliest is told.
        """
        out: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [*places],
        }  # fmt: skip
        for token in tokens:
            first = math.isnan(token.log_prob)
            likely: dict[str, float] = {}
            for other, log_prob in sorted(
                () if first else (*token.alternatives, token[:2]), key=lambda pair: -pair[1]
            ):
                likely.setdefault(shown(tokenizer, other), max(log_prob, _LEAST))
            out["tokens"].append(shown(tokenizer, token.id))
            out["token_logprobs"].append(None if first else max(token.log_prob, _LEAST))
            out["top_logprobs"].append(None if first else likely)
        return out


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; a mark, which has no text, as it is written in the vocabulary."""
    return tokenizer.decode([token]) or tokenizer.text_of(token)


def _ended(choice: dict[str, Any], ended: str) -> dict[str, Any]:
    return choice | {"finish_reason": ended or None}


class Usage:
    """Counts tokens: `prompt` of the prompts, `said` of the answers."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.said = prompt, 0

    def content(self) -> dict[str, int]:
        """The counts in OpenAI's words."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.said,
            "total_tokens": self.prompt + self.said,
        }


class Envelope:
    """What stands around the choices of one answer, in all of its chunks alike."""

    def __init__(self, form: AnswerForm, model: str) -> None:
        self._form = form
        self._common = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer as one object."""
        named = {**self._common, "object": self._form.whole}
        return {**named, "choices": list(choices), "usage": usage.content()}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: Usage | None = None
    ) -> dict[str, Any]:
        """A part of the answer, the last of which has no choices but the usage."""
        named = {**self._common, "object": self._form.chunk, "choices": list(choices)}
        return named if usage is None else {**named, "usage": usage.content()}
