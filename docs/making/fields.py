"""Every field of a configuration with its default, range and meaning, read from the sources.

What a field means stands beside its default: in a comment of medmoe_jax/training/config.py, in the
docstring of the dataclass that a section stands for, or in that of the function that makes it. This
module collects the three; nothing of ours but the table of ranges is imported for it.

  python -m docs.making.fields          # prints all tables
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medmoe_jax.ranges import FINITE, Range
from medmoe_jax.training.limits import LIMITS

PACKAGE = Path(__file__).parents[2] / "medmoe_jax"
CONFIG = PACKAGE / "training" / "config.py"
# A section: where it stands in a configuration, and where its fields are described.
#   dict NAME: keys of the dictionary NAME within `recipe`, or of the one that a function fills.
#   args NAME: arguments of a function, by its docstring.
#   class NAME: fields of a dataclass, by its docstring; `-X` leaves X out.
SECTIONS = {
    "base": ("base", ["dict base"]),
    "decoder": ("base.decoder", ["class base/config.py DecoderConfig"]),
    "rope": ("base.decoder.rope_scaling", ["class base/config.py RopeScaling"]),
    "data": ("data", ["dict data"]),
    "source": ("data.sources.*", ["args source"]),
    "stage": ("stages.*", ["dict stage"]),
    "bank": (
        "stages.*.banks.*",
        ["dict bank", "class adapters/bank.py BankSpec -name -sites -start -stop"],
    ),
    "orthogonality": ("stages.*.losses.*", ["class adapters/orthogonality.py Orthogonality"]),
    "orthonormality": ("stages.*.losses.*", ["class adapters/orthonormality.py Orthonormality"]),
    "sparsity": ("stages.*.losses.*", ["class adapters/sparsity.py Sparsity"]),
    "allocator": ("stages.*.allocators.*", ["class adapters/adalora.py Allocator"]),
    "evaluation": ("stages.*.evaluation", ["dict evaluation"]),
    "run": ("run", ["dict run"]),
}


class Field(NamedTuple):
    """One field, or several that are described together.

    Attributes:
      names: as they are written in a configuration.
      defaults: as Python writes them; "" where a value must be given.
      meaning: what the source says; "" where it says nothing.
    """

    names: tuple[str, ...]
    defaults: tuple[str, ...]
    meaning: str


def table(section: str) -> str:
    """A section of SECTIONS as a table in Markdown."""
    place = SECTIONS[section][0]
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in fields(section):
        names = ", ".join(f"`{name}`" for name in field.names)
        texts = [f"`{value}`" if value else "must be given" for value in field.defaults]
        defaults = ", ".join(texts if len(set(texts)) > 1 else texts[:1])
        ranges = {LIMITS.get(f"{place}.{name}", FINITE) for name in field.names}
        bounds = "; ".join(sorted(filter(None, map(_bounds, ranges))))
        meaning = field.meaning if ". " in field.meaning else field.meaning.rstrip(".")
        meaning = f"{meaning} ({bounds})" if bounds else meaning
        lines.append(f"| {names} | {defaults} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def fields(section: str) -> list[Field]:
    """The fields of a section of SECTIONS, in the order of the source."""
    found: list[Field] = []
    for words in map(str.split, SECTIONS[section][1]):
        kind, *rest = words
        if kind == "class":
            without = {word.removeprefix("-") for word in rest[2:]}
            found += described_class(PACKAGE / rest[0], rest[1], without)
        elif kind == "args":
            found += described_arguments(CONFIG, rest[0])
        else:
            found += described_keys(CONFIG.read_text(encoding="utf-8"), rest[0])
    return found


def described_class(source: Path, name: str, without: set[str]) -> list[Field]:
    """The fields of a dataclass, by the part `Attributes:` of its docstring."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    defaults = {
        inner.target.id: ast.unparse(inner.value) if inner.value else ""
        for inner in node.body
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
    }
    return _described(defaults, node, "Attributes", without)


def described_arguments(source: Path, name: str) -> list[Field]:
    """The arguments of a function, by the part `Args:` of its docstring."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    given, values = node.args.args, node.args.defaults
    texts = [""] * (len(given) - len(values)) + [ast.unparse(value) for value in values]
    defaults = dict(zip((one.arg for one in given), texts, strict=True))
    return _described(defaults, node, "Args", set())


def _described(
    defaults: dict[str, str], node: ast.ClassDef | ast.FunctionDef, part: str, without: set[str]
) -> list[Field]:
    """Fields by their lines in a docstring, then those without a line of their own."""
    found, left = [], {name for name in defaults if name not in without}
    for names, meaning in _entries(ast.get_docstring(node) or "", part):
        kept = tuple(name for name in names if name in left)
        if kept:
            found.append(Field(kept, tuple(defaults[name] for name in kept), meaning))
        left -= set(kept)
    return found + [Field((name,), (defaults[name],), "") for name in defaults if name in left]


def _entries(docstring: str, part: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """`(names, meaning)` of each entry of a docstring's part, whose entries are indented by two."""
    block = re.search(rf"^{part}:\n((?:(?:  .*)?\n?)*)", docstring, re.MULTILINE)
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(block[1]).strip()) if block else []:
        names, _, meaning = entry.partition(":")
        yield tuple(re.split(r",\s*", names)), " ".join(meaning.split())


def described_keys(source: str, name: str) -> list[Field]:
    """The keys of a dictionary in config.py, by the comments above and beside them."""
    alone, beside = _comments(source)
    keys = _dictionary(ast.parse(source), name)
    found = []
    for key, value in zip(keys.keys, keys.values, strict=True):
        if key is None:  # `**own`: fields of a dataclass, listed beside these
            continue
        line, above = key.lineno - 1, []
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        meaning = " ".join([*above, beside.get(value.end_lineno or 0, "")]).strip()
        default = ast.unparse(value).replace("ConfigDict()", "{}")
        found.append(Field((ast.literal_eval(key),), (default,), meaning))
    return found


def _dictionary(tree: ast.Module, name: str) -> ast.Dict:
    """The value of a key of the dictionary within `recipe`, or the one within a function."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    within = functions.get(name, functions["recipe"])
    found = [node for node in ast.walk(within) if isinstance(node, ast.Dict) and node.keys]
    if within.name == name:
        return found[0]
    named = zip(found[0].keys, found[0].values, strict=True)
    return next(v for k, v in named if isinstance(v, ast.Dict) and ast.literal_eval(k) == name)


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those that stand alone, and those beside code."""
    alone, beside = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            which = alone if not token.line[: token.start[1]].strip() else beside
            which[token.start[0]] = token.string.removeprefix("#").strip()
    return alone, beside


def _bounds(limits: Range) -> str:
    """A range in words; "" for any finite number, and for what no one would exceed."""
    low = "above 0" if limits.above and limits.low == 0 else f"from {limits.low:g}"
    if abs(limits.low) > 1e9:
        return ""
    if limits.high == FINITE.high:
        return low
    return f"{low} {'to below' if limits.below else 'to'} {limits.high:g}"


if __name__ == "__main__":
    for one in SECTIONS:
        print(f"\n{one}\n\n{table(one)}")
