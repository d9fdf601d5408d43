"""Pieces: what a chat template makes of a conversation, each with its place in its turn.

A turn of a built-in template has five parts, each possibly empty:

    chatml   <|im_start|>   assistant\\n   The answer.   <|im_end|>   \\n
             open           head          content       close        tail

The prompt of an answer ends before its first part that the model says itself: `lead` (what the
template writes between the prompt and the answer's text), `reasoning`, `content`, `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from medmoe_jax.data.conversation import Turn
from medmoe_jax.errors import ParameterError, UserError

# The shortest conversation; templates are tried on it.
SAMPLE: tuple[Turn, ...] = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
)
_TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = ({"type": "function", "function": _TOOL},)
# Some published templates take ids of nine letters and digits alone.
_CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
# The shortest one with a call of a function.
CALLED: tuple[Turn, ...] = (
    SAMPLE[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "t", "name": "f", "tool_call_id": "abcdef123"},
    SAMPLE[1],
)
SAID = ("lead", "reasoning", "content", "close")


class Piece(NamedTuple):
    """A run of text of one turn and part.

    Attributes:
      text: what is written.
      role, part: whose, and where in the turn. Parts as in the module, and `frame` for what a
        template of its own writes around the turns.
      kind: `text` (written by people: special tokens in it are ordinary text), `markup` (special
        tokens in it become their ids), or `bos`/`eos` (the tokenizer's own id, nothing where it
        has none).
      learned: whether an answer of this row is trained; otherwise it is context.
    """

    text: str
    role: str
    part: str
    kind: str = "markup"
    learned: bool = True

    @property
    def said(self) -> bool:
        """Whether the model says this piece itself."""
        return self.role == "assistant" and self.part in SAID


def _completion(piece: Piece) -> bool:
    """All that the model says: everything between a prompt's end and the end of its answer."""
    return piece.said and piece.learned


def _answer(piece: Piece) -> bool:
    """As `completion`, without the reasoning before an answer."""
    return _completion(piece) and piece.part != "reasoning"


def _qwen_legacy(piece: Piece) -> bool:
    """As the public ChatML training code does: every turn's frame but the role, and the answers."""
    frame = piece.part in ("open", "close", "tail") and piece.kind != "bos"
    return frame or _completion(piece)


MASKS: dict[str, Callable[[Piece], bool]] = {
    "completion": _completion,
    "answer": _answer,
    "qwen_legacy": _qwen_legacy,
}
FRAME_MASKS = ("qwen_legacy",)  # those that ask for the parts of every turn


def get_mask(name: str) -> Callable[[Piece], bool]:
    """A loss mask by name. Raises ParameterError for an unknown name."""
    if name not in MASKS:
        raise ParameterError(f"mask: {name!r} is none of {', '.join(MASKS)}")
    return MASKS[name]


class Template(Protocol):
    """What turns a conversation into pieces."""

    @property
    def frames(self) -> bool:
        """Whether the parts of every turn are known, not of the answers alone."""
        ...

    @property
    def end(self) -> str:
        """The text that ends an answer, stripped; "" where that is the tokenizer's eos alone."""
        ...

    @property
    def ends_with_eos(self) -> bool:
        """Whether an answer ends with the tokenizer's own eos."""
        ...

    def prompt(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[Piece]:
        """What the model reads before it answers these turns."""

    def rows(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[list[Piece]]:
        """The training rows of a conversation.

        In every row each learned answer stands after exactly its prompt, as `prompt` gives it for
        the turns before; there are several rows where the template writes an answer otherwise once
        it is followed by more turns. Pieces of answers that belong to another row are not learned.
        """

    def sample(self) -> list[Piece]:
        """The pieces of a short conversation."""

    def lead(self) -> list[Piece]:
        """What stands between a prompt and the text of a plain answer."""

    def sources(self, bos: str, eos: str) -> list[str]:
        """Its text in Jinja, for a vocabulary with these texts of bos and eos: the forms that are
        to be tried, the first of them where none gives the trained ids."""

    def thought(self) -> tuple[Piece, Piece]:
        """What stands before and after the reasoning of an answer; empty where it has no place."""


def filled(pieces: Sequence[Piece]) -> list[Piece]:
    """Without the pieces that stand for nothing."""
    return [piece for piece in pieces if piece.text or piece.kind in ("bos", "eos")]


def beside_text(turns: Sequence[Turn], tools: Sequence[dict]) -> list[str]:
    """What turns hold that is no text of a system, a user or an answer."""
    found: Mapping[str, Any] = {key: value for turn in turns for key, value in turn.items()}
    named = [key for key in ("reasoning_content", "tool_calls", "name") if found.get(key)]
    named += ["tools"] * bool(tools) + ["role 'tool'"] * any(t["role"] == "tool" for t in turns)
    return named


def refuse_fields(turns: Sequence[Turn], tools: Sequence[dict], whose: str) -> None:
    """Raise UserError where turns hold what a template has no place for."""
    named = beside_text(turns, tools)
    if named:
        raise UserError(
            f"{whose} has no place for {', '.join(named)}; use a chat template that writes it "
            "(data.template), or leave it out"
        )
