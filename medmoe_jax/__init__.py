"""medmoe_jax: medical adaptation of frozen decoder LLMs with sharded mixtures of LoRA experts."""

__version__ = "0.1.0"
