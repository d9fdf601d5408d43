"""Have the free answers of an evaluation graded by a language model that you name.

  medmoe judge runs/mine --url=http://127.0.0.1:8000/v1 --model=judge
  medmoe judge runs/mine --url=https://HOST/v1 --model=NAME --key-file=key.txt --price=0.4,1.6

RUN is a folder in which `medmoe eval` wrote records.jsonl. The endpoint is one in OpenAI's form; it
gets questions and answers of the evaluation. Answers to items with a rubric are judged criterion by
criterion, other free answers from 1 to 5 on fluency, relevance, completeness and proficiency. An
answer without a readable verdict is counted as unjudged. What it will cost is told before, and
verdicts are kept: the same question is not asked twice. Writes judged.json and judged.jsonl into
RUN/judges/NAME, and compares the judges that it finds in RUN/judges. The key comes from --key-file
or $MEDMOE_JUDGE_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from medmoe_jax import json_text
from medmoe_jax.checkpoints.files import write_json, write_text
from medmoe_jax.cli.session import no_rest
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import records
from medmoe_jax.evaluation.compare import by_task
from medmoe_jax.evaluation.judging import judge
from medmoe_jax.evaluation.judging.endpoint import Client, JudgeEndpoint
from medmoe_jax.evaluation.judging.questions import SCALES, questions
from medmoe_jax.evaluation.judging.verdicts import Verdicts
from medmoe_jax.ranges import COUNT
from medmoe_jax.screen import ScreenTable, TerminalBar, typed_by_hand
from medmoe_jax.storage.places import local
from medmoe_jax.training.terminal import console, note, say

KEY = "MEDMOE_JUDGE_KEY"
# Fields of every request; --request lays others over them, and null takes one away.
REQUEST = {"temperature": 0.0, "max_tokens": 1024}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add = parser.add_argument
    add("evaluation", metavar="RUN", help="folder of an evaluation")
    add("--url", required=True, help="of the API, such as https://host/v1")
    add("--model", required=True, help="the judge's name there")
    add("--name", help="of its folder in RUN/judges (default: the model's)")
    add("--key-file", help=f"whose first line is the key (default: ${KEY}, or none)")
    add("--scales", default=",".join(SCALES), help="comma-separated (default: all)")
    add("--limit", type=int, help="answers, the first of every task and split (default: all)")
    add("--request", default="{}", help="JSON of further fields; null leaves one out")
    add("--parallel", type=int, default=4, help="questions at a time")
    add("--timeout", type=float, default=120.0, help="seconds to wait for an answer")
    add("--attempts", type=int, default=5, help="at most, a question")
    add("--price", metavar="IN,OUT", help="of a million tokens read and written, to tell the cost")
    add("--yes", action="store_true", help="do not ask whether to go on")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    COUNT.check("parallel", arguments.parallel)
    endpoint = JudgeEndpoint(arguments.url, _key(arguments), arguments.timeout, arguments.attempts)
    who = judge.Judge(endpoint.place, arguments.model, _request(arguments.request))
    price = _price(arguments.price)
    folder = local(arguments.evaluation, "RUN")
    found = _first(records.read(folder / "records.jsonl"), arguments.limit)
    asked = list(questions(found, _scales(arguments.scales)))
    if not asked:
        raise UserError(f"{folder / 'records.jsonl'}: there is no free answer in it to judge")
    judges = folder / "judges"
    judges.mkdir(exist_ok=True)
    known = Verdicts(judges / "verdicts.jsonl")
    if not _confirmed(judge.cost(who, asked, known), endpoint, price, arguments.yes):
        raise UserError("not judged")
    with Client(endpoint) as client, TerminalBar(total=len(asked), desc="judging") as bar:
        said = judge.put(who, client, asked, known, arguments.parallel, bar.update)
    lines = judge.judged(found, asked, said)
    own = judges / (arguments.name or _slug(arguments.model))
    _write(own, who, lines, [sum(part) for part in zip(*(s.tokens for s in said), strict=True)])
    _show(lines, own)
    _compare(lines, own)


def _key(arguments: argparse.Namespace) -> str:
    """The key, which is in no message."""
    if not arguments.key_file:
        return os.environ.get(KEY, "").strip()
    path = local(arguments.key_file, "--key-file")
    if not path.is_file():
        raise UserError(f"--key-file: there is no file '{path}'")
    key = path.read_bytes().decode("utf-8", "replace").partition("\n")[0].strip()
    if not key:
        raise UserError(f"--key-file: the first line of {path} is empty")
    return key


def _request(text: str) -> dict[str, Any]:
    try:
        given = json_text.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--request: not JSON: {error.msg}") from None
    if not isinstance(given, dict) or {"model", "messages", "stream"} & given.keys():
        raise UserError("--request: write an object, without model, messages and stream")
    return {name: value for name, value in {**REQUEST, **given}.items() if value is not None}


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--price: '{text}' is not two numbers IN,OUT") from None
    return read, written


def _scales(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in SCALES:
            raise UserError(f"--scales: '{name}' is none of {', '.join(SCALES)}")
    if not names:
        raise UserError(f"--scales is empty; name some of {', '.join(SCALES)}")
    return names


def _first(found: list[dict], limit: int | None) -> list[dict]:
    """The first records of every task, of each of its splits."""
    if limit is None:
        return found
    COUNT.check("limit", limit)
    return [record for own in by_task(found).values() for record in own[:limit]]


def _confirmed(
    cost: judge.JudgingCost, endpoint: JudgeEndpoint, price: tuple[float, float] | None, yes: bool
) -> bool:
    """Tell what is to be asked, and ask whether to go on where a person can answer."""
    told = f"{cost.calls:,} questions to {endpoint.place}, about {cost.read:,} tokens to read and "
    told += f"{cost.written:,} to write"
    note(told + (f", {cost.price(*price):.2f} at your prices" if price else ""))
    url = httpx.URL(endpoint.url)
    if endpoint.key and url.scheme == "http" and url.host not in ("127.0.0.1", "localhost", "::1"):
        note("the key goes over http, where others can read it")
    if yes or not cost.calls or not typed_by_hand():
        return True
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


def _slug(model: str) -> str:
    return re.sub(r"[^\w.-]+", "_", model).strip(".") or "judge"


def _write(own: Path, who: judge.Judge, lines: Sequence[dict], tokens: list[int]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(own / "judged.jsonl", text)
    about = {**asdict(who), "tokens_read": tokens[0], "tokens_written": tokens[1]}
    results = [asdict(one) for one in judge.summaries(lines)]
    write_json(own / "judged.json", {"judge": about, "results": results})


def _show(lines: Sequence[dict], own: Path) -> None:
    rows = []
    for one in judge.summaries(lines):
        told = ["", ""]
        if one.score is not None:
            told = [f"{one.score:.3f}", f"{one.low:.3f}–{one.high:.3f}"]
        rows.append((one.task, one.scale, *told, str(one.n), str(one.unjudged)))
    numbers = ("score", "95% interval", "n", "unjudged")
    console.print(ScreenTable(("task", "scale"), numbers, rows))
    problems = [line["unjudged"] for line in lines if "unjudged" in line]
    if problems:
        note(f"{len(problems)} answers are unjudged; the first: {problems[0]}")
    say(f"written to {own / 'judged.json'}")


def _compare(lines: Sequence[dict], own: Path) -> None:
    """The agreement with every other judge of the same evaluation."""
    for path in sorted(own.parent.glob("*/judged.jsonl")):
        if path.parent == own:
            continue
        other = [line for _, line in json_text.lines(path.read_bytes(), path)]
        rows = []
        for one in judge.agreements(lines, other):
            kappa = "" if one.kappa is None else f"{one.kappa:.3f}"
            rows.append((one.task, one.scale, str(one.n), f"{one.exact:.3f}", kappa))
        both = f"{own.name} and {path.parent.name}"
        if not rows:
            note(f"{both} have no verdict on the same answer")
            continue
        note(f"{both} on the same answers:")
        console.print(ScreenTable(("task", "scale"), ("n", "equal", "kappa"), rows))
