"""Public medical sets as rows of prompt and answer, with fixed splits that do not leak."""

from medmoe_jax.data.medical.registry import (
    SETS,
    MedicalSet,
    conversations,
    data_root,
    find,
    rows,
)
from medmoe_jax.data.medical.row import Row, shorten

__all__ = ["SETS", "MedicalSet", "Row", "conversations", "data_root", "find", "rows", "shorten"]
