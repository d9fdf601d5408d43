"""Public medical sets as rows of prompt and answer, with fixed splits that do not leak."""

from medmoe_jax.data.medical.cards import MedicalSet
from medmoe_jax.data.medical.locate import data_root
from medmoe_jax.data.medical.registry import (
    SETS,
    Split,
    add_cards,
    conversations,
    default_split,
    find,
    read_split,
    rows,
    size,
    training_rows,
)
from medmoe_jax.data.medical.row import Row, shorten

__all__ = [
    "SETS",
    "MedicalSet",
    "Row",
    "Split",
    "add_cards",
    "conversations",
    "data_root",
    "default_split",
    "find",
    "read_split",
    "rows",
    "shorten",
    "size",
    "training_rows",
]
