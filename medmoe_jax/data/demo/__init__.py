"""The demo corpus: a small bilingual corpus of our own, made from tables by seeded functions.

`corpus` holds the public functions; the tables are the `.tsv` files beside it.
"""

from medmoe_jax.data.demo.corpus import (
    alignment_items,
    alignment_rows,
    answer_rows,
    everyday_rows,
    in_language,
    knowledge_items,
    knowledge_rows,
    pretraining_rows,
    texts_for_tokenizer,
)

__all__ = [
    "alignment_items",
    "alignment_rows",
    "answer_rows",
    "everyday_rows",
    "in_language",
    "knowledge_items",
    "knowledge_rows",
    "pretraining_rows",
    "texts_for_tokenizer",
]
