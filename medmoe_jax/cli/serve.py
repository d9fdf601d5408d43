"""Answer over HTTP, in OpenAI's form.

  medmoe serve --config=FILE --workdir=DIR
  medmoe serve --config=FILE --workdir=DIR --model=a=align --model=b=align:noise --model=raw=base

Serves /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics to this machine, or
to others with --host and a key. Each --model is a stage of the run, with some of its banks left out
where they are named, under a name of its own; all of them share the base. Without --model it is
the last finished stage, under its own name. SIGTERM and Ctrl-C let it end what it has begun.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
from collections.abc import Sequence
from typing import NamedTuple

from medmoe_jax.api.opening import open_models, stage_of
from medmoe_jax.cli.session import open_run
from medmoe_jax.errors import UserError
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.worker import Worker
from medmoe_jax.parallel import processes
from medmoe_jax.ranges import NOT_NEGATIVE, POSITIVE, Range
from medmoe_jax.storage.places import local
from medmoe_jax.training.run import Run
from medmoe_jax.training.terminal import note

KEY = "MEDMOE_API_KEY"
_EXTRA = ("anyio", "prometheus_client", "starlette", "uvicorn")


class ServedStage(NamedTuple):
    """A model to serve: its name, its stage ("" = the bare base), and the banks left out."""

    name: str
    stage: str
    off: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", default="", help="of the run; not needed for a bare base")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=STAGE[:BANK,...]",
        help="a stage, without these banks, under this name; repeatable; 'base' = no bank "
        "(default: the last stage)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s; 0 = any free one)")
    parser.add_argument(
        "--api-key-file", help=f"file with the key that clients must send (default: ${KEY})"
    )
    parser.add_argument(
        "--no-key", action="store_true", help="let other machines ask without a key, too"
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=64,
        help="answers that wait for a row, at most; others get status 429 (%(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds of a request (%(default)s)"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    try:
        from medmoe_jax.serving import app, models, server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise UserError(
            f"the extra 'serve' is not installed (there is no {error.name}): pip install "
            "'medmoe_jax[serve]'"
        ) from None
    if processes.count() > 1:
        raise UserError("a server runs in one process, and here are several")
    Range(0, 65535).check("port", arguments.port)
    NOT_NEGATIVE.check("queue", arguments.queue)
    POSITIVE.check("timeout", arguments.timeout)
    key = _key(arguments)
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(server.bind(arguments.host, arguments.port))
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        open_to_all = key or arguments.no_key
        hosts = () if open_to_all else ("localhost", "127.0.0.1", "::1", "[::1]", shown)
        opened = open_run(rest, arguments.workdir)
        named = _named(opened, arguments.model)
        served = []
        loaded = open_models(opened, [(one.stage, one.off) for one in named])
        for one, model in zip(named, loaded, strict=True):
            places = model.engine.batch + arguments.queue
            worker = stack.enter_context(Worker(model.engine.decoding(), places))
            served.append(models.Served(one.name, model, worker, _about(one)))
            note(f"{one.name}: {_described(one, model)}; compiling")
            server.warm_up(served[-1])
        limits = app.Limits(arguments.timeout)
        serving = server.Server(app.application(served, limits, key, hosts), arguments.timeout)
        ready = f"ready: http://{shown}:{port}/v1, {'with the key' if key else 'no key is needed'}"
        serving.serve_models(served, bound, lambda: note(ready))
    note("ended")


def _named(opened: Run, given: Sequence[str]) -> list[ServedStage]:
    """The models that are asked for. Raises UserError."""
    if not given:
        stage = stage_of(opened, None, "model")
        return [ServedStage(stage or "base", stage, ())]
    out: list[ServedStage] = []
    for text in given:
        name, equal, what = text.partition("=")
        stage, _, off = what.partition(":")
        if not (name and equal and stage):
            raise UserError(f"--model: '{text}' is not NAME=STAGE or NAME=STAGE:BANK,BANK")
        if name in [one.name for one in out]:
            raise UserError(f"--model: the name '{name}' is given twice")
        banks = tuple(bank for bank in off.split(",") if bank)
        out.append(ServedStage(name, stage_of(opened, stage, "model"), banks))
    return out


def _about(one: ServedStage) -> dict[str, object]:
    return {"stage": one.stage or "base", "off": list(one.off)}


def _described(one: ServedStage, model: LanguageModel) -> str:
    banks = ", ".join(bank.name for bank in model.engine.config.banks) or "no bank"
    stage = f"stage {one.stage}" if one.stage else "the base"
    return f"{stage}, {banks}, context {model.context}, {model.engine.batch} rows"


def _key(arguments: argparse.Namespace) -> str:
    """The key that clients must send, or "". Raises UserError where there must be one."""
    key, source = os.environ.get(KEY, ""), f"${KEY}"
    if arguments.api_key_file is not None:
        path, source = local(arguments.api_key_file), "--api-key-file"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(
                f"--api-key-file: {path} is not text; a key is one word of ASCII characters"
            ) from None
        if not key:
            raise UserError(f"--api-key-file: {path} is empty")
        if path.stat().st_mode & 0o077:
            note(
                f"--api-key-file: others on this machine can read {path}; chmod 600 keeps it yours"
            )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{source}: a key is one word of ASCII characters")
    if key and arguments.no_key:
        raise UserError(f"--no-key: there is a key, from {source}")
    if not key and not arguments.no_key and not _is_loopback(arguments.host):
        raise UserError(
            f"--host: others can reach {arguments.host}, so clients need a key: --api-key-file or "
            f"${KEY} (--no-key lets everybody ask)"
        )
    return key


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
