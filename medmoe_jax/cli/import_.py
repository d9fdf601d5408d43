"""Take a stage from a directory that another tool made instead of training it.

  medmoe import --config=medcare:qwen1.5-1.8b --workdir=runs/released \\
      --adapter=stage1 --stage=aggregate

The directory is one that PEFT wrote (LoRA, AdaLoRA, DoRA; with modules_to_save, biases, embedding
or head where the stage's train_base names these leaves), or one with LoRA experts in
non_lora_trainables.bin or model.safetensors as the authors of mixtures of LoRA experts release
them, or a whole model some of whose feed-forward networks are mixtures of experts, for a stage that
trains all of the base; what it is shows in its files and tensor names. It must fit the stage's
banks. After it, eval, generate, score, export and train go on as if the stage had been trained.
"""

from __future__ import annotations

import argparse

from medmoe_jax.cli.session import open_run
from medmoe_jax.training.imports import import_stage
from medmoe_jax.training.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", required=True, help="where the stage is put")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the directory")
    parser.add_argument("--stage", default="", help="its name (default: the first not finished)")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    opened = open_run(rest, arguments.workdir)
    name = import_stage(opened, arguments.adapter, arguments.stage)
    say(f"stage '{name}' imported into {arguments.workdir}")
