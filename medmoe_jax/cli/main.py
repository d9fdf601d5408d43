"""The `medmoe` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import medmoe_jax
from medmoe_jax.cli import data, demo, evaluate, export, generate, import_, score, tokenizer, train
from medmoe_jax.errors import UserError

COMMANDS = {
    "demo": demo,
    "train": train,
    "import": import_,
    "eval": evaluate,
    "generate": generate,
    "score": score,
    "export": export,
    "data": data,
    "tokenizer": tokenizer,
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="medmoe",
        description="Adapt a frozen decoder LLM to medicine with mixtures of LoRA experts.",
    )
    top.add_argument("--version", action="version", version=medmoe_jax.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        one = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for bad input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("medmoe_jax").setLevel(logging.INFO)
    arguments, rest = parser().parse_known_args(argv)
    try:
        arguments.run(arguments, rest)
    except (UserError, OSError) as error:
        print(f"medmoe {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was saved is intact, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
