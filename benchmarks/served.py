"""What HTTP costs: an engine's tokens a second alone, and through the server with as many streams.

  python benchmarks/served.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf [--streams=32] [--tokens=64]

The same chats are answered greedily by the engine in one call, and as streams of OpenAI's client,
which runs in a process of its own; both by turns. Prints a table and writes
benchmarks/results/served.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

from benchmarks.heap import keep_pages
from benchmarks.routing import PACKAGES, ROOT, console, show
from benchmarks.timing import machine
from medmoe_jax.api.opening import open_model
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.worker import Worker
from medmoe_jax.serving.app import application
from medmoe_jax.serving.models import Served
from medmoe_jax.serving.server import Server, bind
from medmoe_jax.storage.places import local
from medmoe_jax.training.config import recipe
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup

THINGS = ("scurvy", "insulin", "the liver", "fever", "asthma", "malaria", "anaemia", "the heart")


def texts(count: int, of: int) -> list[str]:
    """So many different questions, others in every round: rows keep what they have read."""
    asked = [f"tell me all about {THINGS[n % 8]}, in {n + 9} sentences." for n in range(count)]
    return [f"Question {1000 * (of + 1) + n}: {text}" for n, text in enumerate(asked)]


def alone(model: LanguageModel, asked: Sequence[str], tokens: int) -> dict[str, float]:
    """The engine's seconds, and its tokens with those that end an answer."""
    prompts = [model.prompt([{"role": "user", "content": text}]) for text in asked]
    start = time.perf_counter()
    said = model.engine.generate(prompts, tokens, model.stops.ids)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(ids) + (len(ids) < tokens) for ids in said)}


class Client:
    """`served_client.py` in its process."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, str(ROOT / "benchmarks/served_client.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._url = url

    def ask(self, asked: Sequence[str], tokens: int) -> dict[str, float]:
        """All streams at once, to their end."""
        assert self._process.stdin and self._process.stdout
        line = json.dumps({"url": self._url, "texts": list(asked), "tokens": tokens})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextlib.contextmanager
def serving(model: LanguageModel, places: int) -> Iterator[Client]:
    """A client of the model, served as `medmoe serve` does it."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker(model.engine.decoding(), places))
        bound = stack.enter_context(bind("127.0.0.1", 0))
        served, ready = [Served("model", model, worker)], threading.Event()
        server = Server(application(served), 60.0)
        thread = threading.Thread(target=server.serve_models, args=(served, bound, ready.set))
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        ready.wait()
        client = Client(f"http://127.0.0.1:{bound.getsockname()[1]}/v1")
        stack.callback(client.close)
        yield client


def measured(model: LanguageModel, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of both in every round, after one that compiles."""
    rounds_of: dict[str, list[dict[str, float]]] = {"engine": [], "server": []}
    with serving(model, streams) as client:
        calls = {
            "engine": functools.partial(alone, model),
            "server": client.ask,
        }
        for n in range(rounds + 1):
            asked = texts(streams, n)
            for name in list(calls)[:: 1 if n % 2 else -1]:
                found = calls[name](asked, tokens)
                if n:
                    rounds_of[name].append(found)
    rates = {
        name: [one["tokens"] / one["seconds"] for one in found] for name, found in rounds_of.items()
    }
    return {
        "tokens/s": rates,
        "tokens": {name: found[0]["tokens"] for name, found in rounds_of.items()},
        "first token, s": [one["first"] for one in rounds_of["server"]],
        "server over engine": float(np.median(np.divide(rates["server"], rates["engine"]))),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the model")
    parser.add_argument("--streams", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--output", type=local, default=ROOT / "benchmarks/results/served.json")
    args = parser.parse_args()
    keep_pages()
    config = recipe()
    config.base.path, config.data.template = str(args.gguf), "tokenizer"
    config.run.score_batch = args.streams
    model = open_model(Run(open_setup(config), ""), "base")
    found = measured(model, args.streams, args.tokens, args.rounds)
    rows = [
        [name, f"{np.median(rates):.1f}", str(found["tokens"][name])]
        for name, rates in found["tokens/s"].items()
    ]
    show(f"{args.gguf.stem}, {args.streams} streams", ["", "tokens/s", "tokens"], rows)
    console.print(
        f"server over engine {found['server over engine']:.3f}, first token after "
        f"{np.median(found['first token, s']):.2f} s"
    )
    results = {
        "machine": machine(PACKAGES),
        "model": args.gguf.name,
        "streams": args.streams,
        **found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
