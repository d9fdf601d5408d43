"""What is shown on a person's terminal: nothing in a text that others wrote can steer it.

Control characters move the cursor, rename the window or hide what stands before; marks of writing
direction show a text in another order than it has. They are shown as `\\x1b` and the like.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

# All controls but tab and line feed, marks of direction, line separators, halves of surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)

_WIDE = 10_000  # columns; more than any table has


def harmless(text: str) -> str:
    """The text with what steers a terminal written out; line breaks and tabs stay."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def plain(shown: RenderableType, width: int | None = None) -> str:
    """A table or the like as lines of plain text, also within a notebook.

    Args:
      shown: what `rich` draws.
      width: of the lines; None = as wide as it is.
    """
    # A notebook's kernel asks for colours, and would show the captured text as well.
    out = Console(
        file=io.StringIO(), width=width or _WIDE, markup=False, color_system=None,
        force_terminal=False, force_jupyter=False,
    )  # fmt: skip
    wide = width or Measurement.get(out, out.options, shown).maximum
    with out.capture() as text:
        out.print(shown, width=wide)
    return "\n".join(line.rstrip() for line in text.get().splitlines()).strip("\n")


class Screen(Console):
    """A console of `rich` whose lines and tables hold harmless texts, in colours of its own.

    Brackets in a text are text, not markup of `rich`.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """What `Console.render_str` gives, made harmless before it is laid out."""
        return super().render_str(harmless(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What `Console.render` gives; its own codes are no part of a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))
