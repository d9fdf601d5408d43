"""What requests ask for: `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from medmoe_jax.data.conversation import Turn, check_asked
from medmoe_jax.data.turns import ROLES, kind, quoted, read_turn
from medmoe_jax.data.turns import text as text_of
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE, SEED, Range
from medmoe_jax.serving.fields import Fields
from medmoe_jax.serving.refusals import Refused

Prompt = str | tuple[int, ...]
# Without effect on an answer, by OpenAI's own description of them.
_LABELS = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)
# What cannot be done, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = _NEUTRAL | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # of tools, of which there are none
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = _NEUTRAL | {"suffix": ("",)}
_ALTERNATIVES = Range(0, 20)
# Of a message; those of an answer that clients send back may be null.
_MESSAGE = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
_TEXT_TOKENS = 16  # of a completion that does not say how many; OpenAI's own default


@dataclass(frozen=True)
class Asked:
    """What both kinds of request hold.

    Attributes:
      model: the name of the model.
      n: answers to each prompt.
      max_tokens: of an answer; None = as many as the context holds.
      sampling: how tokens are drawn; `first` counts the answers.
      stops: texts that end an answer.
      log_probs: whether the log-probability of each token is told.
      alternatives: with so many tokens that were likely in its place.
      stream: whether the answer is told as it comes.
      usage: whether a stream ends with the numbers of tokens.
    """

    model: str
    n: int
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    log_probs: bool
    alternatives: int
    stream: bool
    usage: bool


@dataclass(frozen=True)
class ChatRequest(Asked):
    """A conversation to be continued. `turns` ends with what is to be answered."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Text(Asked):
    """Texts to be continued.

    Attributes:
      prompts: texts, or ids.
      echo: whether the prompts are told, too.
    """

    prompts: tuple[Prompt, ...]
    echo: bool


def chat(body: bytes) -> ChatRequest:
    """A request of `/v1/chat/completions`. Raises Refused."""
    fields = Fields(body)
    turns = _turns(fields.need("messages"))
    whole, both = fields.whole("max_tokens", None, COUNT), "max_completion_tokens"
    limit = fields.whole(both, whole, COUNT)
    if whole is not None and limit != whole:
        raise Refused(f"{both}: {limit}, but max_tokens is {whole}; give one of them", param=both)
    log_probs = fields.truth("logprobs")
    alternatives = fields.whole("top_logprobs", 0, _ALTERNATIVES) or 0
    if alternatives and not log_probs:
        raise Refused("top_logprobs: needs logprobs=true", param="top_logprobs")
    fields.neutral(_NEUTRAL_CHAT)
    return ChatRequest(**_common(fields), **_told(limit, log_probs, alternatives), turns=turns)


def text(body: bytes) -> Text:
    """A request of `/v1/completions`. Raises Refused."""
    fields = Fields(body)
    prompts, echo = _prompts(fields.need("prompt")), fields.truth("echo")
    limit = fields.whole("max_tokens", _TEXT_TOKENS, NOT_NEGATIVE)
    if not limit and not echo:
        raise Refused("max_tokens: 0 leaves nothing to tell without echo", param="max_tokens")
    alternatives = fields.whole("logprobs", None, _ALTERNATIVES)
    best_of = fields.whole("best_of", 1, COUNT)
    fields.neutral(_NEUTRAL_TEXT)
    told = _told(limit, alternatives is not None, alternatives or 0)
    asked = Text(**_common(fields), **told, prompts=prompts, echo=echo)
    if best_of not in (1, asked.n):
        raise Refused(
            f"best_of: only n, here {asked.n}, can be served: all that is made is told",
            param="best_of",
            code="unsupported",
        )
    return asked


def _told(limit: int | None, log_probs: bool, alternatives: int) -> dict[str, Any]:
    return {"max_tokens": limit, "log_probs": log_probs, "alternatives": alternatives}


def _common(fields: Fields) -> dict[str, Any]:
    """What both kinds have, taken last: anything left over is refused."""
    stream, options = fields.truth("stream"), fields.take("stream_options", {})
    named = {"include_usage", "include_obfuscation"}  # the latter hides sizes, and is off here
    if not isinstance(options, dict) or not options.keys() <= named:
        raise Refused("stream_options: only include_usage is known", param="stream_options")
    if not all(isinstance(one, bool | None) for one in options.values()):
        raise Refused("stream_options: its values must be true or false", param="stream_options")
    if options and not stream:
        raise Refused("stream_options: needs stream=true", param="stream_options")
    if options.get("include_obfuscation"):
        raise Refused(
            "stream_options: include_obfuscation cannot be served", param="stream_options"
        )
    fields.ignore(_LABELS)
    common = {
        "model": fields.text("model"),
        "n": fields.whole("n", 1, COUNT),
        "sampling": _sampling(fields),
        "stops": fields.texts("stop"),
        "stream": stream,
        "usage": bool(options.get("include_usage")),
    }
    fields.finish()
    return common


def _sampling(fields: Fields) -> Sampling:
    """OpenAI draws at temperature 1, and anew each time, unless it is told otherwise.

    The last three fields are not OpenAI's, but those of other open servers.
    """
    seed = fields.whole("seed", None, SEED)
    try:
        return Sampling(
            fields.real("temperature", 1.0),
            fields.real("top_p", 1.0),
            secrets.randbits(63) if seed is None else seed,
            top_k=fields.whole("top_k", 0) or 0,
            min_p=fields.real("min_p", 0.0),
            repetition_penalty=fields.real("repetition_penalty", 1.0),
        )
    except ParameterError as error:
        raise Refused(str(error), param=str(error).partition(":")[0]) from None


def _turns(value: Any) -> tuple[Turn, ...]:
    """Messages as turns, the last of them one that is to be answered."""
    if not isinstance(value, list) or not value:
        raise Refused("messages: must be a list of messages", param="messages")
    turns = []
    for number, message in enumerate(value):
        at = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refused(f"{at}: must be an object, found {kind(message)}", param="messages")
        given = {name: one for name, one in message.items() if one is not None and one != []}
        strange = [name for name in given if name not in _MESSAGE]
        if strange:
            raise Refused(f"{at}: {quoted(strange)} cannot be served", param="messages")
        if "role" not in given or not given.keys() & {"content", "tool_calls"}:
            raise Refused(f"{at}: needs 'role' and 'content'", param="messages")
        try:
            if ROLES.get(str(given["role"])) != "tool":
                if given.get("tool_call_id"):
                    raise Refused(
                        f"{at}: only a tool's message has 'tool_call_id'", param="messages"
                    )
                # Rows to train on name no speakers, so no model here knows what to make of a name.
                text_of(given.pop("name", ""), f"{at}: name")
            turns.append(read_turn(given, at))
        except UserError as error:
            raise Refused(str(error), param="messages") from None
    try:
        check_asked(turns, "messages")
    except UserError as error:
        raise Refused(str(error), param="messages") from None
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise Refused("messages: a system's message comes first, and once", param="messages")
    return tuple(turns)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One text, several, the ids of one, or those of several."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Refused("prompt: must be text, ids, or a list of either", param="prompt")
    if not all(isinstance(one, str) or _are_ids(one) for one in value):
        raise Refused("prompt: must be text, ids, or a list of either", param="prompt")
    return tuple(one if isinstance(one, str) else tuple(one) for one in value)


def _are_ids(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
