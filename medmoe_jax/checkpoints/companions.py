"""What stands beside exported weights: generation settings, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.data.portable import tokenizer_config
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.kinds import check_fields

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_BESIDE = (_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE)
_JSON, _MODEL = "tokenizer.json", "tokenizer.model"
_OTHER_FORMS = ("vocab.json", "merges.txt", _MODEL)  # of what a tokenizer.json beside them holds
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(_IDS, int | None),
    "eos_token_id": int | list[int] | None,
    "stop_strings": str | list[str] | None,
}


def tokenizer_files(path: Path) -> dict[str, Path]:
    """`{name in the exported folder: file}` of the tokenizer whose main file is `path`.

    The main file gets the name under which readers look for it, and the files that name special
    tokens and the chat template go along. Another vocabulary in the folder does not, as readers
    might choose it, but for the other forms of a `tokenizer.json`.
    """
    names = (*_BESIDE, *_OTHER_FORMS) if path.name == _JSON else _BESIDE
    beside = {name: path.with_name(name) for name in names}
    found = {name: file for name, file in beside.items() if file.is_file()}
    return {**found, _JSON if path.suffix == ".json" else _MODEL: path}


def prompting_files(tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """`{name in the exported folder: file or content}` of a tokenizer and the chat template.

    The template stands in a file of its own, and nowhere else.
    """
    files: dict[str, Any] = dict(tokenizer_files(tokenizer.path))
    config = read_json(files[_CONFIG]) if _CONFIG in files else tokenizer_config(tokenizer)
    config.pop("chat_template", None)
    return {**files, _CONFIG: config, TEMPLATE: template.encode()}


def token_ids(bos: int | None, eos: int | None, pad: int | None) -> dict[str, int]:
    """The ids that a configuration names, as its fields."""
    return {key: i for key, i in zip(_IDS, (bos, eos, pad), strict=True) if i is not None}


def generation_config(
    folder: Path | None,
    ids: dict[str, int],
    stop_ids: Sequence[int],
    stop_texts: Sequence[str] = (),
) -> dict[str, Any]:
    """generation_config.json: the source's own, with every id that ends an answer.

    Args:
      folder: the Hugging Face folder of the base, or None.
      ids: of `token_ids`, for those that the folder does not name.
      stop_ids, stop_texts: what ends an answer in the template it was trained with.

    Raises:
      UserError: a file of the folder has a field of another type; the message names both.
    """
    settings: dict[str, Any] = dict(ids)
    if folder is not None:
        config = _read(folder / "config.json")
        settings |= {key: config[key] for key in _IDS if config.get(key) is not None}
        if (folder / GENERATION).is_file():
            settings |= _read(folder / GENERATION)
    if ends := _with(settings.pop("eos_token_id", None), stop_ids):
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if texts := _with(settings.pop("stop_strings", None), stop_texts):
        settings["stop_strings"] = texts
    return settings


def _read(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    check_fields(fields, _KINDS, str(path))
    return fields


def _with(own: Any, more: Sequence[Any]) -> list[Any]:
    """What a field names, as one value, several or none, and what it lacks of `more`."""
    own = own if isinstance(own, list) else [own]
    return [one for one in dict.fromkeys([*own, *more]) if one is not None]
