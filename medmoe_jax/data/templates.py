"""Chat templates: a conversation becomes pieces of text, each with its place in its turn.

Pieces are encoded one by one and concatenated. So the ids of a prompt are always a prefix of the
ids of the same conversation in training, and the loss mask is exact: it is a property of pieces.

A turn has five parts, each possibly empty:

    chatml   <|im_start|>   assistant\\n   The answer.   <|im_end|>   \\n
             open           head          content       close        tail
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox

from medmoe_jax.data.tokenizers import Tokenizer
from medmoe_jax.errors import UserError

DEFAULT_SYSTEM = "You are a helpful assistant."


class Piece(NamedTuple):
    """A run of text that is encoded by itself.

    `part`: open, head, content, close or tail. `kind`: `text` (written by people: special tokens in
    it are ordinary text), `markup` (special tokens in it become their ids), or `bos`/`eos` (the
    tokenizer's own id, nothing where it has none).
    """

    text: str
    role: str
    part: str
    kind: str = "markup"

    @property
    def target(self) -> bool:
        """Whether the model learns to say this piece, under the mask `completion`."""
        return MASKS["completion"](self)


def _completion(piece: Piece) -> bool:
    """The answers and the marker that ends each of them."""
    return piece.role == "assistant" and piece.part in ("content", "close")


def _qwen_legacy(piece: Piece) -> bool:
    """As the public ChatML training code does: every turn's frame but the role, and the answers."""
    frame = piece.part in ("open", "close", "tail") and piece.kind != "bos"
    return frame or _completion(piece)


MASKS: dict[str, Callable[[Piece], bool]] = {
    "completion": _completion,
    "qwen_legacy": _qwen_legacy,
}


class Template(Protocol):
    """What turns a conversation into pieces of text."""

    def render(self, turns: Sequence[dict], add_generation_prompt: bool = False) -> list[Piece]:
        """The pieces of a conversation; with `add_generation_prompt`, up to where an answer starts.

        `turns`: `[{"role": "system"|"user"|"assistant", "content": str}, ...]`.
        """


class Stops(NamedTuple):
    """What ends an answer: any of these ids, or (without a token of its own) one of these texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """How one role's turns are written. `lead` goes before the content and is encoded with it."""

    open: str = ""
    head: str = ""
    lead: str = ""
    close: str = ""
    tail: str = ""
    bos: bool = False
    eos: bool = False

    def prompt(self, role: str) -> list[Piece]:
        """What stands before the content."""
        pieces = [Piece("", role, "open", "bos")] if self.bos else []
        return pieces + _filled([Piece(self.open, role, "open"), Piece(self.head, role, "head")])

    def render(self, role: str, content: str) -> list[Piece]:
        end = [Piece(self.close, role, "close")]
        end += [Piece("", role, "close", "eos")] if self.eos else []
        end += [Piece(self.tail, role, "tail")]
        content = Piece(self.lead + content, role, "content", "text")
        return self.prompt(role) + _filled([content, *end])


@dataclass(frozen=True)
class Layout:
    """A built-in template. `system_in_user` writes the system text into the first user turn."""

    user: Turn
    assistant: Turn
    system: Turn = field(default_factory=Turn)
    bos: bool = False
    default_system: str = ""
    system_in_user: str = ""
    strip: bool = False

    def render(self, turns: Sequence[dict], add_generation_prompt: bool = False) -> list[Piece]:
        pieces = [Piece("", "system", "open", "bos")] if self.bos else []
        for turn in self._placed(turns):
            content = turn["content"].strip() if self.strip else turn["content"]
            pieces += getattr(self, turn["role"]).render(turn["role"], content)
        return pieces + (self.assistant.prompt("assistant") if add_generation_prompt else [])

    def _placed(self, turns: Sequence[dict]) -> Sequence[dict]:
        """The turns with the default system text added, or the system text moved."""
        has_system = bool(turns) and turns[0]["role"] == "system"
        if self.default_system and not has_system:
            return [{"role": "system", "content": self.default_system}, *turns]
        if self.system_in_user and has_system and len(turns) > 1:
            system, first, *rest = turns
            system = system["content"].strip() if self.strip else system["content"]
            content = first["content"].strip() if self.strip else first["content"]
            content = self.system_in_user.format(system=system) + content
            return [{"role": first["role"], "content": content}, *rest]
        return turns


def _chatml(role: str) -> Turn:
    return Turn(open="<|im_start|>", head=f"{role}\n", close="<|im_end|>", tail="\n")


def _llama3(role: str) -> Turn:
    head = f"{role}<|end_header_id|>\n\n"
    return Turn(open="<|start_header_id|>", head=head, close="<|eot_id|>")


def _gemma(role: str) -> Turn:
    return Turn(open="<start_of_turn>", head=f"{role}\n", close="<end_of_turn>", tail="\n")


TEMPLATES: dict[str, Template] = {
    "chatml": Layout(
        system=_chatml("system"),
        user=_chatml("user"),
        assistant=_chatml("assistant"),
        default_system=DEFAULT_SYSTEM,
    ),
    # Every question begins a new text, as in the family's own chat format.
    "llama2": Layout(
        user=Turn(bos=True, open="[INST]", lead=" ", tail=" [/INST]"),
        assistant=Turn(lead=" ", close=" ", eos=True),
        system_in_user="<<SYS>>\n{system}\n<</SYS>>\n\n",
        strip=True,
    ),
    "llama3": Layout(
        system=_llama3("system"),
        user=_llama3("user"),
        assistant=_llama3("assistant"),
        bos=True,
        strip=True,
    ),
    "gemma": Layout(
        user=_gemma("user"),
        assistant=_gemma("model"),
        bos=True,
        system_in_user="{system}\n\n",
        strip=True,
    ),
    "user_assistant": Layout(
        system=Turn(tail="\n"),
        user=Turn(open="User:", tail="\n"),
        assistant=Turn(open="Assistant:", eos=True),
        bos=True,
    ),
    "plain": Layout(user=Turn(), assistant=Turn(eos=True), bos=True),
}


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %} ... {% endgeneration %}` and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Jinja:
    """A tokenizer's own chat template. Where the answers lie is found by rendering turn by turn."""

    def __init__(self, source: str, bos_text: str = "", eos_text: str = ""):
        self.source = source
        # Templates ask for these by name. A template that knows a date function takes today's:
        # without one it writes a fixed date, and a resumed run reads the same rows.
        self._values = {
            "bos_token": bos_text,
            "eos_token": eos_text,
            "tools": None,
            "documents": None,
        }
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.globals["raise_exception"] = _template_error
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from error

    def render(self, turns: Sequence[dict], add_generation_prompt: bool = False) -> list[Piece]:
        contents = self._contents(turns, add_generation_prompt)
        slots = _slots(turns)
        pieces, done = [], ""
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt = self._text(slots[:number], True)
                answered = self._text(slots[: number + 1], False)
                pieces += _question(_after(done, prompt), turns, contents)
                pieces += _answer(_after(prompt, answered), contents)
                done = answered
        rest = _after(done, self._text(slots, add_generation_prompt))
        return _filled(pieces + _question(rest, turns, contents))

    def _contents(self, turns: Sequence[dict], add_generation_prompt: bool) -> list[str]:
        """The turns' texts as the template writes them: as they are, or stripped."""
        slots = _slots(turns)
        slotted = self._text(slots, add_generation_prompt)
        wanted = self._text(turns, add_generation_prompt)
        exact = [turn["content"] for turn in turns]
        for contents in (exact, [content.strip() for content in exact]):
            if _SLOT.sub(lambda slot, c=contents: c[int(slot[1])], slotted) == wanted:
                return contents
        raise UserError(
            "the chat template changes the text of a turn, so answers cannot be located in it; "
            "use a built-in template"
        )

    def _text(self, turns: Sequence[dict], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(turns), add_generation_prompt=add_generation_prompt, **self._values
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses this conversation: {error}") from error


# A template is rendered with a numbered slot in place of each turn's text, so that the text can
# be told from the template's own markup, whatever the text is.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SLOT = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def _slots(turns: Sequence[dict]) -> list[dict]:
    return [{**turn, "content": f"{_OPEN}{i}{_CLOSE}"} for i, turn in enumerate(turns)]


def _question(text: str, turns: Sequence[dict], contents: Sequence[str]) -> list[Piece]:
    """What a template wrote since the last answer, up to where the next answer starts."""
    *parts, tail = _SLOT.split(text)
    pieces = []
    for markup, slot in zip(parts[::2], parts[1::2], strict=True):
        role = turns[int(slot)]["role"]
        head, lead = _spaces_apart(markup)
        pieces.append(Piece(head, role, "head"))
        pieces.append(Piece(lead + contents[int(slot)], role, "content", "text"))
    return [*pieces, Piece(tail, "user", "tail")]


def _answer(text: str, contents: Sequence[str]) -> list[Piece]:
    """An answer, the marker that closes it, and the white space after the marker."""
    markup, slot, end = _SLOT.split(text, maxsplit=1)
    head, lead = _spaces_apart(markup)
    close = end.rstrip()
    return [
        Piece(head, "assistant", "head"),
        Piece(lead + contents[int(slot)], "assistant", "content", "text"),
        Piece(close, "assistant", "close"),
        Piece(end[len(close) :], "assistant", "tail"),
    ]


def _spaces_apart(markup: str) -> tuple[str, str]:
    """Spaces before a text are encoded with the text, as vocabularies expect."""
    head = markup.rstrip(" ")
    return head, markup[len(head) :]


def load_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """A built-in template by name, `tokenizer` (the tokenizer's own), or a `.jinja` file.

    Raises UserError for an unknown name, listing the known ones.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "tokenizer":
        if tokenizer is None or not tokenizer.chat_template:
            raise UserError(
                f"template 'tokenizer': {tokenizer!r} brings no chat template; "
                f"use one of {', '.join(TEMPLATES)}"
            )
        source = tokenizer.chat_template
    elif name.endswith(".jinja") and Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        known = ", ".join([*TEMPLATES, "tokenizer"])
        raise UserError(f"unknown template {name!r}; use one of {known} or a .jinja file")
    if tokenizer is None:
        return Jinja(source)
    return Jinja(source, tokenizer.text_of(tokenizer.bos_id), tokenizer.text_of(tokenizer.eos_id))


def get_mask(name: str) -> Callable[[Piece], bool]:
    """A loss mask by name. Raises UserError for an unknown name."""
    if name not in MASKS:
        raise UserError(f"unknown mask {name!r}; use one of {', '.join(MASKS)}")
    return MASKS[name]


def markers(template: Template, tokenizer: Tokenizer) -> frozenset[str]:
    """The tokenizer's special tokens that the template writes: they may not come from content."""
    texts = [piece.text for piece in _probe(template) if piece.kind == "markup"]
    # White space is a token of some vocabularies, but marks nothing.
    named = (s for s in tokenizer.specials if s.strip())
    return frozenset(s for s in named if any(s in text for text in texts))


def stops(template: Template, tokenizer: Tokenizer) -> Stops:
    """What ends an answer under this template: the end-of-turn marker, and eos if there is one."""
    close = [p for p in _probe(template) if p.role == "assistant" and p.part == "close"]
    texts = {piece.text.strip() for piece in close} - {""}
    ids = {text: tokenizer.special(text) for text in texts}
    known = {i for i in [tokenizer.eos_id, *ids.values()] if i is not None}
    return Stops(tuple(sorted(known)), tuple(sorted(t for t, i in ids.items() if i is None)))


def _probe(template: Template) -> list[Piece]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return template.render(turns)


def _filled(pieces: Sequence[Piece]) -> list[Piece]:
    """Without the pieces that stand for nothing."""
    return [piece for piece in pieces if piece.text or piece.kind in ("bos", "eos")]


def _after(prefix: str, text: str) -> str:
    if not text.startswith(prefix):
        raise UserError(
            "the chat template rewrites earlier turns when a turn is added, so answers cannot be "
            "located in it; train on single-turn rows or use a built-in template"
        )
    return text[len(prefix) :]


def _template_error(message: str):
    raise jinja2.TemplateError(message)
