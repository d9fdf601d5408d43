"""From rows of text to packed batches of token ids."""
