"""Models whose answers are known."""

import itertools
import random

from medmoe_jax.inference.language_model import Answer


def asked(prompt):
    """The text of a prompt's last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


class Constant:
    """Always says the same, and likes this choice best."""

    shortened = 0

    def __init__(self, text, ended=True):
        self.text, self.ended = text, ended
        self.asked = 0

    def choose(self, prompts, choices, ending, done):
        self.asked += len(prompts)
        return [[(float(c == self.text), 1) for c in options] for options in choices]

    def constrained(self, prompts, choices):
        return [list(options).index(self.text) for options in choices]

    def answer(self, prompts, max_tokens, sampling):
        return [Answer(self.text, ended=self.ended)] * len(prompts)


class Oracle(Constant):
    """Knows the answers by prompt."""

    def __init__(self, *tasks):
        super().__init__("")
        items = [item for task in tasks for item in task.items]
        self.answers = {asked(item.turns): item.answer for item in items}

    def choose(self, prompts, choices, ending, done):
        self.asked += len(prompts)
        return [
            [(0.0 if c == self.answers[asked(p)] else -5.0, 1) for c in options]
            for p, options in zip(prompts, choices, strict=True)
        ]

    def constrained(self, prompts, choices):
        self.asked += len(prompts)
        return [
            list(options).index(self.answers[asked(p)])
            for p, options in zip(prompts, choices, strict=True)
        ]

    def answer(self, prompts, max_tokens, sampling):
        return [Answer(self.answers[asked(p)]) for p in prompts]


class Guesser(Constant):
    """Chooses at random."""

    def __init__(self, seed):
        super().__init__("")
        self.random = random.Random(seed)

    def choose(self, prompts, choices, ending, done):
        return [[(self.random.random(), 1) for _ in options] for options in choices]


class Scripted(Constant):
    """Writes what it is told: for a prompt, its texts one after the other."""

    def __init__(self, texts):
        super().__init__("")
        self.texts = {prompt: itertools.cycle(some) for prompt, some in texts.items()}
        self.prompts = []

    def answer(self, prompts, max_tokens, sampling):
        self.prompts += prompts
        self.sampling = sampling
        return [Answer(next(self.texts[asked(p).split("\n")[0]])) for p in prompts]
