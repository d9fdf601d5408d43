"""A small LoRA on every site of a real model, for benchmarks/vllm_texts.py."""

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, recipe, source, stage


def get_config(arg: str = "models/SmolLM2-135M-Instruct.Q4_1.gguf") -> ConfigDict:
    """The recipe; `arg` is the base."""
    config = recipe()
    config.base.path = arg
    config.data.template = "tokenizer"
    config.data.length = 128
    config.data.global_batch = 8
    config.data.sources.facts = source(reader="demo_knowledge")
    config.stages.order = ("facts",)
    config.stages.facts = stage(
        banks={"lora": bank(sites=("*",), rank=8, alpha=16.0)},
        mixture={"facts": 1.0},
        steps=8,
        learning_rate=3e-4,
    )
    config.run.score_batch = 4
    return config
