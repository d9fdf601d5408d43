"""A chat template and a vocabulary's settings as other tools read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.data.pieces import SAMPLE
from medmoe_jax.data.tokenizers import SentencePiece
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError

_SYSTEM: Turn = {"role": "system", "content": "s"}
# What an exported template is tried on. Where one refuses the other must, too.
_PROMPTS: tuple[tuple[Turn, ...], ...] = (
    SAMPLE[:1],
    (_SYSTEM, SAMPLE[0]),
    (*SAMPLE, {"role": "user", "content": "Is it so?"}),
    ({"role": "user", "content": " Where?\n"},),
)
_DUMMY = "x"  # a text that shows whether one is begun with a space


class Portable(NamedTuple):
    """A template for other tools.

    Attributes:
      source: in Jinja.
      same: whether prompts in it have the ids that were trained.
    """

    source: str
    same: bool


def portable_template(encoder: Encoder) -> Portable:
    """The encoder's template in Jinja, and whether its text gives the same ids to a vocabulary."""
    template, tokenizer = encoder.template, encoder.tokenizer
    bos, eos = tokenizer.text_of(tokenizer.bos_id), tokenizer.text_of(tokenizer.eos_id)
    sources = template.sources(bos, eos)
    fitting = (source for source in sources if _same(encoder, source))
    source = next(fitting, "")
    return Portable(source or sources[0], bool(source))


def _same(encoder: Encoder, source: str) -> bool:
    """Whether whole texts of a template, as other tools encode them, have the encoder's ids."""
    return agrees(encoder, source, lambda text: encoder.tokenizer.encode_markup(text, True))


def agrees(encoder: Encoder, source: str, read: Callable[[str], list[int]]) -> bool:
    """Whether prompts that a Jinja template writes have the encoder's ids where `read` reads them.

    Args:
      encoder: what the model was trained with.
      source: of the template.
      read: the ids of a text with markup.
    """
    template = Jinja(source, encoder.tokenizer.names, encoder.tokenizer.specials)
    for turns in _PROMPTS:
        try:
            wanted = encoder.prompt(turns)
        except UserError:
            continue
        if read(template.render(turns, (), True)) != wanted:
            return False
    return True


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a vocabulary that has none: its class, names and added tokens."""
    added = {
        str(token.id): {
            "content": text,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": False,
            "single_word": False,
            "special": token.special,
        }
        for text, token in tokenizer.added.items()
    }
    common = {
        **tokenizer.names,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
    }
    if not isinstance(tokenizer, SentencePiece):
        return {"tokenizer_class": "PreTrainedTokenizerFast", **common}
    spaced = tokenizer.encode(_DUMMY, start=True) != tokenizer.encode(_DUMMY)
    return {
        "tokenizer_class": "LlamaTokenizer",
        **common,
        "legacy": tokenizer.restarts,
        "add_prefix_space": spaced,
        "add_bos_token": False,
    }
