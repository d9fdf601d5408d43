"""Verdicts that were given already: a file of JSON lines, kept as they come."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import fits


def key_of(place: str, body: Mapping[str, Any]) -> str:
    """What decides a verdict, as a hash: the endpoint and all of the request, model and prompt."""
    whole = json.dumps([place, body], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _verdict(where: str, line: Any) -> tuple[str, dict[str, Any]]:
    own = fits(line, dict[str, Any]) and line.keys() == {"key", "verdict"}
    if not own or not fits(line["key"], str) or not fits(line["verdict"], dict[str, Any]):
        raise UserError(f"{where}: not a verdict of medmoe judge; delete the line")
    return line["key"], line["verdict"]


class Verdicts:
    """Verdicts by key. A line that a crash has torn, the last one, is cut off."""

    def __init__(self, path: Path) -> None:
        """Read a file, where there is one. Raises UserError for a line that is none of its own."""
        self._path, self._lock = path, threading.Lock()
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._found = dict(_verdict(*line) for line in json_text.lines(whole, path))

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def add(self, key: str, verdict: dict[str, Any]) -> None:
        """Keep a verdict; several threads may at once."""
        line = json.dumps({"key": key, "verdict": verdict}) + "\n"
        with self._lock, self._path.open("ab", buffering=0) as file:
            file.write(line.encode())
            self._found[key] = verdict
