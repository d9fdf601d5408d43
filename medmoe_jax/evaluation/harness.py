"""A model of ours for lm-evaluation-harness (extra `lm-eval`): its tasks, its prompts, our scores.

A text becomes ids as transformers makes them from the same files: special tokens that it writes
become their ids, bos stands before it where the files say so. Context and continuation are cut
where `TemplateLM` cuts them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from medmoe_jax.data.conversation import Turn
from medmoe_jax.errors import UserError
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.sampling import Sampling

NAME = "medmoe"
# What is taken of `gen_kwargs` beside the most and the stops.
_SETTLED = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MOST = 256  # tokens of an answer, where the task says nothing


class Pair(NamedTuple):
    """A context and what is scored after it, as ids; `text` is the context."""

    text: str
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Harness(TemplateLM):
    """Answers the three kinds of requests with an opened model.

    Attributes:
      max_length: tokens that the model reads, the whole context; the last one of what is scored is
        never read.
    """

    def __init__(self, model: LanguageModel, seed: int = 0) -> None:
        """`seed` is that of answers which are drawn."""
        super().__init__()
        self._model, self._seed = model, seed
        self._tokenizer = model.encoder.tokenizer
        self.max_length = model.engine.config.decoder.max_positions

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        eos = self._tokenizer.eos_id
        return self._tokenizer.pad_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """By which requests are kept apart in lm-evaluation-harness's cache."""
        return f"{NAME}-{self._tokenizer.digest[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in Jinja, for the record."""
        if chat_template is False or chat_template is None:
            return None
        names = (self._tokenizer.text_of(i) for i in (self.prefix_token_id, self.eot_token_id))
        return self._model.encoder.template.sources(*names)[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; one that ends with the beginning of an answer stays open."""
        turns: list[Turn] = [{"role": t["role"], "content": t["content"]} for t in chat_history]
        begun = "" if add_generation_prompt else turns.pop()["content"]
        pieces = self._model.encoder.template.prompt(turns)
        own = {"bos": self._tokenizer.bos_id, "eos": self._tokenizer.eos_id}
        texts = [self._tokenizer.text_of(own[p.kind]) if p.kind in own else p.text for p in pieces]
        return "".join(texts) + begun

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, with bos where the files or the caller say so."""
        ids = self._tokenizer.encode_markup(string, start=True)
        bos = self._tokenizer.bos_id
        if add_special_tokens is None:
            begun = string.startswith(self._tokenizer.text_of(self.prefix_token_id))
            add_special_tokens = self._tokenizer.encodes_bos and not begun
        return [bos, *ids] if add_special_tokens and bos is not None else ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log probability, whether it is the greedy answer) of each continuation.

        Continuations of one context share its reading.
        """
        pairs = [self._pair(*request) for request in requests]
        expert_of = functools.cache(self._model.expert_of)
        rows = self._model.engine.scored(
            [pair.context for pair in pairs],
            [[pair.continuation] for pair in pairs],
            [expert_of(pair.text) for pair in pairs],
        )
        found = [(score.log_prob, score.greedy) for (score,) in rows]
        for (texts, *_), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _pair(self, texts: tuple[str, str] | None, context: list[int], said: list[int]) -> Pair:
        """A request whose context is cut from the left to fit."""
        whole = (context + said)[-(self.max_length + 1) :]
        at = len(whole) - len(said)
        if at < 1:
            raise UserError(f"{len(said)} tokens do not fit a context of {self.max_length}")
        return Pair(texts[0] if texts else "", tuple(whole[:at]), tuple(said))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log probability of each text, in windows where it is longer than the context."""
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            own = list(self._windows(text))
            windows += [(None, before, after) for before, after in own]
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        out = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, up to the first of its stops."""
        out = [""] * len(requests)
        by_settings: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(number)
        for own in by_settings.values():
            settings = dict(normalize_gen_kwargs(requests[own[0]].args[1], _MOST))
            texts = [requests[n].args[0] for n in own]
            for number, said in zip(own, self._answers(texts, settings, own[0]), strict=True):
                out[number] = said
                self.cache_hook.add_partial("generate_until", requests[number].args, said)
        return out

    def _answers(self, texts: list[str], settings: dict[str, Any], first: int) -> list[str]:
        """Answers to contexts with the same settings, the first of which is request `first`."""
        tokenizer = self._tokenizer
        given = handle_stop_sequences(settings.pop("until"), tokenizer.text_of(self.eot_token_id))
        until = list(filter(None, given))  # `until: null` is none
        most = settings.pop("max_gen_toks")
        sampling = self._sampling(settings, first)
        if most >= self.max_length:
            raise UserError(f"{most} new tokens do not fit a context of {self.max_length}")
        prompts = [self.tok_encode(text)[-(self.max_length - most) :] for text in texts]
        stops = [tokenizer.encode_markup(stop) for stop in until]
        experts = [self._model.expert_of(text) for text in texts]
        found = self._model.engine.generate(
            prompts, most, [self.eot_token_id, *filter(None, stops)], sampling, experts
        )
        return [
            postprocess_generated_text(
                tokenizer.decode(ids, start=tokenizer.begins_after(prompt)), until, None
            )
            for prompt, ids in zip(prompts, found, strict=True)
        ]

    def _sampling(self, settings: dict[str, Any], first: int) -> Sampling:
        """How answers are drawn. Raises UserError for what there is not."""
        if settings.get("num_beams") == 1:
            del settings["num_beams"]
        unknown = sorted(set(settings) - set(_SETTLED))
        if unknown:
            raise UserError(f"gen_kwargs: {unknown[0]} is none of {', '.join(_SETTLED)}")
        drawn = settings.pop("do_sample", False)
        # What bounds a draw says nothing of the likeliest token. YAML reads 1e-3 as a text.
        own: dict[str, Any] = {
            name: value if name == "top_k" else float(value)
            for name, value in settings.items()
            if drawn or name == "repetition_penalty"
        }
        own.setdefault("temperature", 1.0 if drawn else 0.0)
        return Sampling(seed=self._seed, first=first, **own)


def register(model: LanguageModel) -> None:
    """Make a model known to lm-evaluation-harness as model type `medmoe`, once in a process."""

    @register_model(NAME)
    class Opened(Harness):
        """The model that `medmoe lm-eval` has opened."""

        def __init__(self, **_: Any) -> None:
            # Batch sizes and devices are the configuration's matter.
            super().__init__(model)
