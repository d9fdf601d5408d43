"""A base with its banks as something that answers: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from medmoe_jax.data.conversation import Turn, check_texts, turns_of
from medmoe_jax.data.encode import Encoder, Frame
from medmoe_jax.data.languages import spoken
from medmoe_jax.data.pieces import Template
from medmoe_jax.data.shortening import shortened
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.inference.streaming import Detokenizer, Reader

Prompt = str | Sequence[Turn]


class Answer(NamedTuple):
    """What a model says.

    Attributes:
      text: the answer.
      reasoning: what it thinks before it, where the template has a place for that.
      ended: whether it ended the answer itself, before the most tokens.
    """

    text: str
    reasoning: str = ""
    ended: bool = True


class LanguageModel:
    """Applies the chat template around an `Engine`.

    A prompt is the text of one user turn, or a list of turns `{"role", "content"}` that ends with
    a user's. `expert_of` gives the expert of a text's language, or -1, for gates that always force
    it.

    Attributes:
      shortened: prompts that were cut so far, because they did not fit the context.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        expert_of: Callable[[str], int] = lambda text: -1,
    ) -> None:
        self.engine = engine
        self.expert_of = expert_of
        self.encoder = Encoder(tokenizer, template)
        self.stops = self.encoder.stops
        self.shortened = 0

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> list[tuple[float, int]]:
        """`(summed log-probability, tokens)` of one completion a prompt.

        Its tokens are those a training run would count as targets: all that the model says after
        the prompt, up to what ends the turn.
        """
        return [row[0] for row in self.choose(prompts, [[c] for c in completions], ending=True)]

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[str]],
        ending: bool = False,
        done: Callable[[int], object] = lambda prompts: None,
    ) -> list[list[tuple[float, int]]]:
        """`(summed log-probability, tokens)` of every choice of every prompt.

        ending: not of the choice's text alone, but of all that the model says around it as well.
        done: told after each batch how many prompts it was the last for.
        """
        prompt_ids, choice_ids = self._encoded(prompts, choices, ending)
        sums = self.engine.score(prompt_ids, choice_ids, self._experts(prompts), done)
        return [
            [(s, len(ids)) for s, ids in zip(row, options, strict=True)]
            for row, options in zip(sums, choice_ids, strict=True)
        ]

    def constrained(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[int]:
        """The number of the choice that each prompt's greedy answer is, among its choices alone.

        Token by token the likeliest is taken of those that some choice goes on with; a choice that
        another one begins with ends with the template's mark, where it has one.
        """
        prompt_ids, choice_ids = self._encoded(prompts, choices, ending=True)
        experts = self._experts(prompts)
        left = [list(range(len(options))) for options in choice_ids]
        for depth in range(max((len(ids) for row in choice_ids for ids in row), default=0)):
            nexts = [
                sorted({row[c][depth] for c in alive if depth < len(row[c])}) if alive[1:] else []
                for row, alive in zip(choice_ids, left, strict=True)
            ]
            open_ = [i for i, tokens in enumerate(nexts) if tokens[1:]]
            sums = self.engine.score(
                [prompt_ids[i] + choice_ids[i][left[i][0]][:depth] for i in open_],
                [[[token] for token in nexts[i]] for i in open_],
                [experts[i] for i in open_],
            )
            best = {i: tokens[0] for i, tokens in enumerate(nexts) if tokens}
            for i, row in zip(open_, sums, strict=True):
                best[i] = nexts[i][max(range(len(row)), key=row.__getitem__)]
            for i, token in best.items():
                left[i] = [c for c in left[i] if choice_ids[i][c][depth : depth + 1] == [token]]
        return [alive[0] for alive in left]

    def generate(
        self, prompts: Sequence[Prompt], max_tokens: int, sampling: Sampling = Sampling()
    ) -> list[str]:
        """Answers without their reasoning, up to the end of the turn or `max_tokens`."""
        return [answer.text for answer in self.answer(prompts, max_tokens, sampling)]

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        sampling: Sampling = Sampling(),
        stops: Sequence[str] = (),
        numbers: Sequence[int] | None = None,
        done: Callable[[int, Answer], object] = lambda prompt, answer: None,
    ) -> list[Answer]:
        """Answers and what was thought before them.

        They go up to the end of the turn, to the first of the texts `stops`, or to `max_tokens`.

        Args:
          prompts, max_tokens, sampling, stops: see above.
          numbers: of the prompts, where they are some of a whole: each draws as it would there.
          done: told each answer as soon as it is whole, with the place of its prompt among these.

        Raises:
          UserError: the stops are no list of texts, one is empty, or what the engine does not
            generate.
        """
        check_texts("stops", stops)
        if not all(stops):
            raise UserError("stops: every one needs at least one character")
        prompt_ids = [self.fitted(turns_of(prompt), max_tokens)[1] for prompt in prompts]

        def enough(i: int, ids: list[int]) -> bool:
            reader = self.reader(prompt_ids[i], stops)
            reader.add(ids)
            return bool(reader.ended)

        def read(i: int, ids: list[int]) -> Answer:
            reader = self.reader(prompt_ids[i], stops)
            said = reader.add(ids, "stop" if len(ids) < max_tokens else "length")
            return Answer(said.content, said.reasoning, reader.ended == "stop")

        answers = self.engine.generate(
            prompt_ids,
            max_tokens,
            self.stops.ids,
            sampling,
            self._experts(prompts),
            enough if stops or self.stops.texts else None,
            numbers,
            lambda i, ids: done(i, read(i, ids)),
        )
        return [read(i, ids) for i, ids in enumerate(answers)]

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """The ids that each end an answer, as a request has them; a text is for a reader to find.

        It may be written in other tokens than those it is encoded to by itself, and begin in a
        token before them.
        """
        return tuple((token,) for token in self.stops.ids)

    def reader(self, prompt: Sequence[int], stops: Sequence[str] = ()) -> Reader:
        """What reads the answer to a prompt, as its tokens come.

        Args:
          prompt: the ids that the model has read.
          stops: texts that end the answer beside the template's.
        """
        return self._reader(prompt, (*self.stops.texts, *stops), self.encoder.frame)

    def continuing(self, prompt: Sequence[int], stops: Sequence[str] = ()) -> Reader:
        """What reads what comes after a text that no template was put around."""
        return self._reader(prompt, stops, Frame())

    def _reader(self, prompt: Sequence[int], stops: Sequence[str], frame: Frame) -> Reader:
        tokenizer = self.encoder.tokenizer
        text = Detokenizer(tokenizer, tokenizer.begins_after(prompt))
        return Reader(text, self.stops.ids, stops, frame)

    def language(self, prompt: Prompt) -> int:
        """The expert of a prompt's language, or -1."""
        return self.expert_of(spoken(turns_of(prompt)))

    def _experts(self, prompts: Sequence[Prompt]) -> list[int]:
        return [self.language(prompt) for prompt in prompts]

    @property
    def context(self) -> int:
        """The most positions of a prompt with its answer."""
        return self.engine.config.decoder.max_positions

    def fitted(self, turns: Sequence[Turn], room: int) -> tuple[Sequence[Turn], list[int]]:
        """The turns of a prompt and their ids, shortened where `room` new ones would not fit.

        Raises:
          UserError: the template refuses the turns, or not even its own words fit.
        """
        return self._fitted(turns, self.prompt(turns), room)

    def _fitted(
        self, turns: Sequence[Turn], ids: list[int], room: int
    ) -> tuple[Sequence[Turn], list[int]]:
        """The turns of a prompt and their ids, with room for an answer in the context."""
        limit = self.context - room
        if len(ids) <= limit or limit <= 0:  # the engine refuses what leaves no room
            return turns, ids
        self.shortened += 1
        turns = shortened(turns, limit, lambda some: len(self.encoder.prompt(some)))
        return turns, self.prompt(turns)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids that the model reads before it answers these turns.

        Raises:
          UserError: the template refuses them, or there is none.
        """
        ids = self.encoder.prompt(turns)
        if not ids:
            raise UserError("the prompt is empty and the template adds nothing to it")
        return ids

    def _encoded(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], ending: bool
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """The ids of prompts that fit the context, and of their choices."""
        prompt_ids, choice_ids = [], []
        for prompt, options in zip(prompts, choices, strict=True):
            turns = turns_of(prompt)
            ids, said = self._said(turns, options, ending)
            room = max(map(len, said))
            if len(ids) + room > self.context:
                turns, _ = self._fitted(turns, ids, room)
                ids, said = self._said(turns, options, ending)
            prompt_ids.append(ids)
            choice_ids.append(said)
        return prompt_ids, choice_ids

    def _said(
        self, turns: Sequence[Turn], choices: Sequence[str], ending: bool
    ) -> tuple[list[int], list[list[int]]]:
        """What the model reads, and what it says in order to give each of the answers."""
        ids = self.prompt(turns)
        answered: list[list[Turn]] = [
            [*turns, {"role": "assistant", "content": text}] for text in choices
        ]
        if ending:
            rows = [self.encoder({"conversations": some, "language": ""}) for some in answered]
            ends = [int(row.loss_mask.nonzero()[0].max(initial=-1)) + 1 for row in rows]
            return ids, [
                row.tokens[len(ids) : end].tolist() for row, end in zip(rows, ends, strict=True)
            ]
        (led, *_), texts = zip(*map(self.encoder.answered, answered), strict=True)
        # What the template writes before an answer's text is read, where no token holds both.
        if all(text[: len(led)] == led for text in texts):
            ids = led
        return ids, [text[len(ids) :] for text in texts]
