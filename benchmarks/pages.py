"""Parts of pages in docs/ that scripts write: from `<!-- NAME -->` to `<!-- end of NAME -->`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; numbers stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(page: Path, name: str, text: str) -> None:
    """Put a text in the place of a part of a page."""
    before, _, after = _parts(page, name)
    start, end = _marks(name)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def shown(page: Path, name: str) -> str:
    """The text of a part of a page."""
    return _parts(page, name)[1].strip()


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    start, end = _marks(name)
    before, rest = page.read_text(encoding="utf-8").split(start)
    text, after = rest.split(end)
    return before, text, after
