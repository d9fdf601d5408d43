"""Chat templates by name, and what is to be known of one with a vocabulary.

The ids of a prompt are exactly what the model reads, and a prefix of the ids of its training row;
all that follows up to the end of the answer is what the model says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.pieces import CALLED, SAMPLE, TOOLS, Piece, Template
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import place
from medmoe_jax.storage.plain import read_text

# What looks like a token of its own: <|im_end|>, <start_of_turn>, </think>.
MARK = re.compile(r"<\|[^|<>\s]+\|>|</?\w+>")

_SYSTEM: Turn = {"role": "system", "content": "s"}
# What a template may write marks for that the shortest conversation lacks.
_TALKS: tuple[tuple[Sequence[Turn], Sequence[dict]], ...] = (
    ((*SAMPLE, *SAMPLE), ()),
    ((_SYSTEM, *SAMPLE), ()),
    (SAMPLE, TOOLS),
    (CALLED, TOOLS),
    ((_SYSTEM, *CALLED), TOOLS),
)


class Stops(NamedTuple):
    """What ends an answer: any of these ids, or (without a token of its own) one of these texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def load_template(
    name: str, tokenizer: Tokenizer | None = None, options: Mapping[str, Any] | None = None
) -> Template:
    """A built-in template by name, `tokenizer` (the tokenizer's own), or a `.jinja` file.

    Args:
      name: of the template.
      tokenizer: whose template, and whose tokens the template writes.
      options: variables of a Jinja template, such as `enable_thinking`.

    Raises:
      UserError: an unknown name (the message lists the known ones), a template that cannot be
        used or that writes a token without a row in the base's embedding, or an option that it
        does not use.
    """
    template = _opened(name, tokenizer, options or {})
    if tokenizer is not None:
        lost = sorted(_written(template, tokenizer.set_aside))
        if lost:
            raise UserError(
                f"data.template: it writes {', '.join(lost)}, which {tokenizer!r} has beyond the "
                f"{tokenizer.rows} rows of the base's embedding; use another template, or the "
                "tokenizer that belongs to this model"
            )
    return template


def _opened(name: str, tokenizer: Tokenizer | None, options: Mapping[str, Any]) -> Template:
    if name in TEMPLATES:
        if options:
            raise UserError(
                f"data.template_options.{next(iter(options))}: the built-in template '{name}' has "
                "no options; use one in Jinja"
            )
        return TEMPLATES[name].fitted(tokenizer is not None and tokenizer.leaves_bos)
    if name == "tokenizer":
        if tokenizer is None or not tokenizer.chat_template:
            others = tokenizer.other_templates if tokenizer else ()
            known = ", ".join(TEMPLATES)
            if others:
                raise UserError(
                    f"template 'tokenizer': {tokenizer!r} brings no chat template named 'default', "
                    f"only {', '.join(others)}; save one of them as a .jinja file and name that "
                    f"(data.template), or use one of {known}"
                )
            raise UserError(
                f"template 'tokenizer': {tokenizer!r} brings no chat template; use one of {known}"
            )
        source = tokenizer.chat_template
    elif name.endswith(".jinja") and place(name).is_file():
        source = read_text(fetched(name), name)
    else:
        known = ", ".join([*TEMPLATES, "tokenizer"])
        raise UserError(f"unknown template {name!r}; use one of {known} or a .jinja file")
    if tokenizer is None:
        return Jinja(source, options=options)
    return Jinja(source, tokenizer.names, tokenizer.specials, options)


def stops(template: Template, tokenizer: Tokenizer) -> Stops:
    """What ends an answer: the mark that the template writes there, eos, and the base's own ids.

    Raises:
      UserError: nothing that the template writes after an answer could end it.
    """
    end = template.end
    own = tokenizer.special(end) if end else None
    if own is None and not end and (not template.ends_with_eos or tokenizer.eos_id is None):
        raise UserError(
            f"{tokenizer!r} has no eos token, and the template ends an answer with nothing else, "
            "so a model would never learn to stop; use a template with a mark at the end of a turn "
            "(data.template), or name eos_token in tokenizer_config.json"
        )
    known = {i for i in (own, tokenizer.eos_id, *tokenizer.stop_ids) if i is not None}
    return Stops(tuple(sorted(known)), (end,) if end and own is None else ())


def markers(template: Template, tokenizer: Tokenizer, said: bool = False) -> frozenset[str]:
    """The tokenizer's special tokens that the template writes: they may not come from content.

    said: of content that the model says itself, in which a call or a thought may be written out:
      only those of the shortest conversation.
    """
    # White space is a token of some vocabularies, but marks nothing.
    return _written(template, [s for s in tokenizer.specials if s.strip()], said)


def _written(template: Template, tokens: Collection[str], said: bool = False) -> frozenset[str]:
    """Those of some tokens that a template writes; `said`: in the shortest conversation."""
    if not tokens:
        return frozenset()
    pieces = template.sample() if said else _tried(template)
    texts = [piece.text for piece in pieces if piece.kind == "markup"]
    return frozenset(token for token in tokens if any(token in text for text in texts))


def _tried(template: Template) -> Iterator[Piece]:
    """The pieces of short conversations of every kind that the template has a place for."""
    yield from template.sample()
    for turns, tools in _TALKS:
        thoughtful = [
            turn | {"reasoning_content": "r"} if turn["role"] == "assistant" else turn
            for turn in turns
        ]
        for talk in (turns, thoughtful):  # some write no answer without reasoning
            try:
                rows = template.rows(talk, tools)
            except UserError:
                continue
            yield from itertools.chain.from_iterable(rows)
            break


def doubts(template: Template, tokenizer: Tokenizer) -> list[str]:
    """What hints that base, vocabulary and template were not made together, a sentence each."""
    written = " ".join(piece.text for piece in template.sample() if piece.kind == "markup")
    absent = [mark for mark in dict.fromkeys(MARK.findall(written)) if not tokenizer.special(mark)]
    found = []
    if tokenizer.set_aside:
        found.append(
            f"base.tokenizer: its tokens {', '.join(sorted(tokenizer.set_aside))} lie beyond the "
            f"{tokenizer.rows} rows of the base's embedding, and are read as plain text"
        )
    if tokenizer.other_templates and template.sources("", "") == [tokenizer.chat_template]:
        found.append(
            f"data.template: the tokenizer has more chat templates, which are not read: "
            f"{', '.join(tokenizer.other_templates)}; to use one, save it as a .jinja file and "
            "name that here"
        )
    if tokenizer.chat_template and not written.strip():
        found.append(
            "data.template: it writes nothing around turns, and this tokenizer brings a chat "
            "template, in which such a model is mostly asked (data.template=tokenizer)"
        )
    if absent:
        found.append(
            f"data.template: its marks {', '.join(absent)} are no tokens of this vocabulary, and "
            "are read as several pieces of text each"
        )
    if tokenizer.encodes_bos and not _begins_with_bos(template, tokenizer):
        found.append(
            f"data.template: it never writes {tokenizer.text_of(tokenizer.bos_id)}, with which "
            "texts of this vocabulary begin (bos)"
        )
    return found


def _begins_with_bos(template: Template, tokenizer: Tokenizer) -> bool:
    first = template.sample()[:1]
    bos = tokenizer.text_of(tokenizer.bos_id)
    return any(piece.kind == "bos" or piece.text.startswith(bos) for piece in first)
