"""A base with its banks, ready to be asked: `medmoe_jax.load`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

from ml_collections import ConfigDict

from medmoe_jax import interrupts
from medmoe_jax.api import configs
from medmoe_jax.api.opening import language_model, open_run, open_stage
from medmoe_jax.api.routing import Routing, measure, read
from medmoe_jax.api.tasks import check_prompts, note_cut
from medmoe_jax.base.presets import HUB
from medmoe_jax.checkpoints.bases import open_base, open_tokenizer
from medmoe_jax.data.conversation import ROLES, Turn, check_asked, check_text, check_texts
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.inference.chat import Chat
from medmoe_jax.inference.language_model import Answer, LanguageModel, Prompt
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import COUNT
from medmoe_jax.storage.places import place, scheme_of
from medmoe_jax.training.config import recipe
from medmoe_jax.training.kept import NAME, is_kept, kept
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import Trained


class Score(NamedTuple):
    """How likely an answer is.

    Attributes:
      logprob: the sum of the natural log-probabilities of its tokens, what ends the turn included.
      tokens: how many they are.
    """

    logprob: float
    tokens: int


class Model:
    """A base with its banks, ready to be asked; see `load`.

    Everywhere a prompt is the text of one user turn, or a list of turns
    `{"role": "user", "content": "..."}` that ends with a user's or a tool's. One too long for the
    context is shortened, which is said.

    Attributes:
      run: the recipe and its work directory.
      trained: the weights.
      off: banks left out.
      language_model: what encodes, decodes and runs the programs.
    """

    def __init__(
        self, run: Run, trained: Trained, off: Sequence[str] = (), language: str = ""
    ) -> None:
        """
        Args:
          run, trained, off: see above.
          language: as of `load`.
        """
        self.run, self.trained = run, trained
        self.language_model: LanguageModel = language_model(run.setup, trained, off, language)
        self.off, self._language = tuple(off), language

    def __repr__(self) -> str:
        where = f" of {self.run.workdir}" if self.stage else ""
        banks = ", ".join(self.banks) or "none"
        return f"Model({self.stage or 'the bare base'}{where}; banks: {banks})"

    @property
    def stage(self) -> str:
        """The stage whose end it is, "" for the bare base."""
        return self.trained.stage

    @property
    def banks(self) -> tuple[str, ...]:
        """The banks that take part; one that is merged is a part of the base."""
        return tuple(bank.name for bank in self.language_model.engine.config.banks)

    def without(self, *banks: str) -> Model:
        """The same model with these banks left out too; it shares the weights.

        Raises:
          UserError: there is no such bank.
        """
        return Model(self.run, self.trained, (*self.off, *banks), self._language)

    @overload
    def generate(self, prompts: str, max_tokens: int = 256, **sampling: Any) -> str: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_tokens: int = 256, **sampling: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: str | Sequence[Prompt], max_tokens: int = 256, **sampling: Any
    ) -> str | list[str]:
        """The answer to a prompt, or those to several, without their reasoning.

        Args:
          prompts: one text, or a list of prompts.
          max_tokens: of an answer.
          sampling: as of `answer`: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`,
            `seed`, `stops`.

        Raises:
          UserError: as of `answer`.
        """
        texts = [answer.text for answer in self.answer(prompts, max_tokens, **sampling)]
        return texts[0] if isinstance(prompts, str) else texts

    @interrupts.never_lost()
    def answer(
        self,
        prompts: str | Sequence[Prompt],
        max_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stops: Sequence[str] = (),
    ) -> list[Answer]:
        """Answers with their reasoning, and whether each came to its end.

        Args:
          prompts: one text, or a list of prompts.
          max_tokens: of an answer.
          temperature: 0 takes the most probable token.
          top_p, top_k, min_p, repetition_penalty, seed: see `inference.sampling.Sampling`.
          stops: texts that end an answer.

        Raises:
          UserError: a number out of its range, or a prompt that the template refuses.
        """
        COUNT.check_whole("max_tokens", max_tokens)
        sampling = Sampling(
            temperature, top_p, seed, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        asked = _prompts(prompts)
        check_prompts(self.run.setup, asked, _place)
        before = self.language_model.shortened
        answers = self.language_model.answer(asked, max_tokens, sampling, stops)
        note_cut(self.language_model, before)
        return answers

    @overload
    def score(self, prompts: str, options: Sequence[str]) -> list[Score]: ...
    @overload
    def score(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]
    ) -> list[list[Score]]: ...
    @interrupts.never_lost()
    def score(self, prompts: str | Sequence[Prompt], options: Sequence) -> list:
        """How likely each of some answers is.

        Args:
          prompts: one text, or a list of prompts.
          options: possible answers: a list of texts, for several prompts a list of them for each.

        Returns:
          A `Score` for each option; for several prompts a list of them for each.

        Raises:
          UserError: a prompt or an answer that the template refuses, or no option.
        """
        asked = _prompts(prompts)
        lists = [options] if isinstance(prompts, str) else options
        if len(lists) != len(asked):
            raise ParameterError(f"options: {len(lists)} lists for {len(asked)} prompts")
        for number, texts in enumerate(lists):
            check_texts(f"options: {_place(number)}", texts)
            if len(texts) == 0:
                raise ParameterError(f"options: {_place(number)}: needs at least one text")
            check_text(texts, f"options: {_place(number)}")
            same = [asked[number]] * len(texts)
            check_prompts(self.run.setup, same, lambda _, number=number: _place(number), texts)
        before = self.language_model.shortened
        rows = self.language_model.choose(asked, lists, ending=True)
        note_cut(self.language_model, before)
        scored = [[Score(*one) for one in row] for row in rows]
        return scored[0] if isinstance(prompts, str) else scored

    def chat(
        self,
        system: str = "",
        max_tokens: int = 512,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Chat:
        """A new conversation: `say` gives a whole answer, `stream` its text as it comes.

        Args:
          system: what the model is told first.
          max_tokens: of an answer.
          temperature, top_p, top_k, min_p, repetition_penalty, seed: as of `answer`.

        Raises:
          UserError: a number out of its range, or a system text that the template refuses.
        """
        sampling = Sampling(
            temperature, top_p, seed, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        return Chat(self.language_model, sampling, max_tokens, system)

    @interrupts.never_lost()
    def routing(self, *data: str | os.PathLike[str], limit: int | None = None) -> Routing:
        """Which experts rows use, by their languages, as `medmoe analyze routing` tells it.

        Args:
          data: sources of the recipe, or files or built data sets of rows.
          limit: rows a language, the first ones; None = all.

        Raises:
          UserError: no bank that takes part has a router, or there are no such rows.
        """
        texts = read(self.run.setup, [os.fspath(one) for one in data], limit)
        return measure(self.run.setup, self.language_model, texts)


@interrupts.never_lost()
def load(
    source: str | os.PathLike[str] | Run,
    *,
    stage: str | None = None,
    off: Sequence[str] = (),
    language: str = "",
    config: str | os.PathLike[str] | ConfigDict | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """The model that a work directory holds, or a bare base.

    Args:
      source: a work directory (a run that is open will do); or a base: a Hugging Face folder,
        `hf://org/name`, a published one's short name (`smollm2-135m`), a GGUF or llama2.c file.
        A base is asked in the chat template that its tokenizer brings, else in plain text.
      stage: whose end is used; None = the last finished one, "base" = no bank.
      off: banks left out.
      language: code of the texts' language, for routers that always force its expert; "" = it is
        detected where a bank asks.
      config: the work directory's recipe, as of `config`; None = the one it was last trained with.
      overrides: fields that differ (`{"base.dtype": "bfloat16"}`).

    Raises:
      UserError: there is no such model, or what is there does not fit the configuration.
    """
    run = open_source(source, config, overrides)
    return Model(run, open_stage(run, stage), off, language)


def open_source(
    source: str | os.PathLike[str] | Run,
    config: str | os.PathLike[str] | ConfigDict | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Run:
    """The run that holds a model; see `load`. No weights are loaded.

    Raises:
      UserError: as of `load`.
    """
    if isinstance(source, Run):
        return source
    path = os.fspath(source)
    if config is not None:
        return open_run(configs.config(config, overrides), path)
    base = HUB.get(path, path)
    if scheme_of(base) != "hf":
        if is_kept(path):
            return open_run(configs.config(kept(path), overrides), path)
        if (place(path) / "stages").is_dir():
            raise ParameterError(
                f"config: '{path}' does not say what it was trained with (no {NAME}); name the "
                "recipe"
            )
        if not place(path).exists():
            hint = f"; a model on the hub is 'hf://{path}'" if path.count("/") == 1 else ""
            raise UserError(f"'{path}': no work directory and no base is there{hint}")
    return open_run(_of_base(base, dict(overrides or {})), "")


def _of_base(path: str, overrides: dict[str, Any]) -> ConfigDict:
    """The configuration of a bare base."""
    fields = configs.config(recipe(), {"base.path": path, "data.length": 0, **overrides})
    if "data.template" not in overrides:
        base = open_base(path, "", {}, 0, fields.base.quantise)
        tokenizer = fields.base.tokenizer or base.tokenizer
        talks = bool(tokenizer) and bool(open_tokenizer(tokenizer).chat_template)
        configs.set_field(fields, "data.template", "tokenizer" if talks else "plain")
    return fields


def _prompts(given: str | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts. Raises UserError, with the number, for what is none."""
    if isinstance(given, str):
        given = [given]
    for number, prompt in enumerate(given):
        check_text(prompt, _place(number))
        if isinstance(prompt, Mapping):
            raise ParameterError("prompts: a list of turns is one prompt; give a list of prompts")
        if isinstance(prompt, str):
            continue
        if not _is_talk(prompt):
            raise ParameterError(f"prompts: {_place(number)} is neither a text nor a list of turns")
        check_asked(prompt, f"prompts: {_place(number)}")
    return list(given)


def _is_talk(turns: Sequence[Turn]) -> bool:
    return isinstance(turns, list | tuple) and all(
        isinstance(turn, Mapping)
        and turn.get("role") in ROLES
        and isinstance(turn.get("content"), str)
        for turn in turns
    )


def _place(number: int) -> str:
    return f"prompt {number}"
