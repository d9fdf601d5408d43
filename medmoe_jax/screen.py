"""What is shown on a person's terminal: no table cuts a text, and no text can steer the terminal.

Control characters move the cursor, rename the window or hide what stands before; marks of writing
direction show a text in another order than it has. They are shown as `\\x1b` and the like.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich import box, table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text
from tqdm import tqdm

# All controls but tab and line feed, marks of direction, line separators, halves of surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)

_WIDE = 10_000  # columns; more than any table has
_NAME = 14  # columns that a name has before it is broken for want of room


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

    def on_broken_pipe(self) -> None:
        """Let the error pass, which `rich` would make an exit: the program says how it ends."""
        raise

    def render_str(self, text: str, **options: Any) -> Text:
        """What `Console.render_str` gives, made harmless before it is laid out."""
        return super().render_str(harmless(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What `Console.render` gives; its own codes are no part of a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


class TerminalBar(tqdm):
    """A bar of tqdm at a terminal; elsewhere, and where a program has no standard error, none."""

    def __init__(self, *given: Any, quiet: bool = False, **options: Any) -> None:
        """Draw the bar, unless it is `quiet`; all else as for tqdm."""
        nowhere = quiet or sys.stderr is None  # as in pythonw, which tqdm does not know of
        super().__init__(*given, disable=nowhere or None, **options)


def typed_by_hand() -> bool:
    """Whether the standard input is a terminal; a program may have none at all."""
    return sys.stdin is not None and sys.stdin.isatty()


@dataclass(frozen=True)
class ScreenTable:
    """Rows that are whole at any width: names are broken into lines, numbers never.

    Where a row has no room, its names are broken first, and then the headings of its numbers; after
    that the columns of numbers stand in blocks below each other, each beside the names.

    Attributes:
      words: headings of the columns of names, on the left.
      numbers: headings of the columns of numbers, which stand to the right of their columns.
      rows: texts, one for each column; a `Text` of `rich` has colours.
      title, caption: what stands above and below.
    """

    words: Sequence[str]
    numbers: Sequence[str] = ()
    rows: Sequence[Sequence[str | Text]] = ()
    title: str = ""
    caption: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """As wide as all of it side by side."""
        return Measurement.get(console, options, self._drawn(range(len(self.numbers))))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterable[RenderableType]:
        """The tables of `rich` that it is made of."""
        every, wide = range(len(self.numbers)), options.update(width=_WIDE)

        def fits(least: table.Table) -> bool:
            return Measurement.get(console, wide, least).maximum <= options.max_width

        if fits(self._drawn(every, name=_NAME)):
            yield self._drawn(every)
            return
        blocks: list[list[int]] = [[]]
        for number in every:
            if blocks[-1] and not fits(self._drawn([*blocks[-1], number], console, _NAME)):
                blocks.append([])
            blocks[-1].append(number)
        for block in blocks:
            yield self._drawn(block, console, title=block is blocks[0], caption=block is blocks[-1])

    def _drawn(
        self,
        block: Sequence[int],
        console: Console | None = None,
        name: int | None = None,
        title: bool = True,
        caption: bool = True,
    ) -> table.Table:
        """These columns of numbers beside the names, as `rich` draws it.

        Args:
          block: which columns.
          console: where headings are broken; None = they are not.
          name: the greatest width of a column of names; None = what it asks for.
          title, caption: whether they belong to it.
        """
        out = table.Table(
            header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
            title=self.title if title else None, title_justify="left",
            caption=self.caption if caption else None, caption_justify="left",
        )  # fmt: skip
        for heading in self.words:
            out.add_column(heading, overflow="fold", max_width=name)
        for number in block:
            heading: str | Text = self.numbers[number]
            if console is not None:
                heading = Text("\n").join(self._broken(number, console))
            out.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            names, numbers = row[: len(self.words)], row[len(self.words) :]
            out.add_row(*names, *(numbers[number] for number in block))
        return out

    def _broken(self, number: int, console: Console) -> Iterator[Text]:
        """The lines of a heading that is no wider than its column must be."""
        heading = harmless(self.numbers[number])
        cells = [row[len(self.words) + number] for row in self.rows]
        longest = max(map(cell_len, heading.split()), default=0)
        widest = max((cell_len(str(cell)) for cell in cells), default=0)
        width = max(widest, min(longest, _NAME), 1)
        for line in Text(heading).wrap(console, width):
            line.rstrip()
            yield line
