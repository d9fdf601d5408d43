"""Prompts that are longer than their place: the body is cut, the frame stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medmoe_jax.data.conversation import Turn
from medmoe_jax.errors import UserError

Measure = Callable[[Sequence[Turn]], int]


def shortened(turns: Sequence[Turn], limit: int, measure: Measure) -> list[Turn]:
    """The turns of a prompt, made to fit.

    The oldest questions go first, each with all that was said until the next one; then the longest
    text of the last question is cut at its beginning. A system text stays whole.

    Args:
      turns: of the prompt.
      limit: the largest measure that fits.
      measure: of a prompt, say its tokens; it must not shrink as text is added.

    Raises:
      UserError: not even the frame without a text fits.
    """
    kept = list(turns)
    while measure(kept) > limit and len(asked := _questions(kept)) > 1:
        del kept[asked[0] : asked[1]]
    if measure(kept) <= limit:
        return kept
    sizes = [(turn["role"] != "system", len(turn["content"])) for turn in kept]
    at = sizes.index(max(sizes))
    text = kept[at]["content"]

    def cut(size: int) -> list[Turn]:
        """The turns with the last `size` characters of the longest text."""
        return [*kept[:at], {**kept[at], "content": text[len(text) - size :]}, *kept[at + 1 :]]

    if measure(cut(0)) > limit:
        raise UserError(
            f"the prompt {text[:30]!r} does not fit: without this text it takes "
            f"{measure(cut(0)):,} of {limit:,} tokens"
        )
    low, high = 0, len(text)  # `low` characters fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(cut(middle)) <= limit else (low, middle)
    return cut(low)


def _questions(turns: Sequence[Turn]) -> list[int]:
    return [number for number, turn in enumerate(turns) if turn["role"] == "user"]
