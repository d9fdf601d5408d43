"""One turn of a row in the forms that people have: names of fields, content parts, tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.json_items import TwiceError, unique_keys
from medmoe_jax.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# Names of a turn's fields, the first of each being ours.
_NAMES = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "train_weight": ("train_weight", "weight", "train", "loss"),
    "tool_calls": ("tool_calls",),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
}
_CALL_KEYS = ("id", "type", "function", "name", "arguments")
TURN_KEYS = tuple(name for names in _NAMES.values() for name in names)


def read_turn(turn: Mapping[str, Any], where: str, ignore: str = "data.ignore") -> Turn:
    """A turn from fields of any of TURN_KEYS, none of them None. Raises UserError.

    Args:
      turn: the fields.
      where: what messages begin with.
      ignore: what they call the setting that leaves out keys.
    """
    fields = _renamed(turn, where)
    calls = _calls(fields.get("tool_calls"), where)
    role = fields.get("role")
    if role is None or ("content" not in fields and not calls):
        raise UserError(f"{where}: needs 'from' and 'value' (or 'role' and 'content')")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; use {quoted(ROLES)}")
    content = _content(fields.get("content", ""), where)
    if role == "function_call":
        calls, content = _calls(_json(content, f"{where}: content"), where), ""
    out: Turn = {"role": ROLES[role], "content": content}
    _add_extras(out, fields, calls, where, ignore)
    return out


def _renamed(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn's fields by our names."""
    out = {}
    for ours, names in _NAMES.items():
        found = [name for name in names if name in turn]
        if len(found) > 1:
            raise UserError(f"{where}: {quoted(found)} mean the same; remove all but one")
        if found:
            out[ours] = turn[found[0]]
    return out


def _add_extras(
    turn: Turn, fields: Mapping[str, Any], calls: list[dict], where: str, ignore: str
) -> None:
    """What a turn may hold beside role and content."""
    says = turn["role"] == "assistant"
    thought = text(fields.get("reasoning_content", ""), f"{where}: reasoning")
    for field, value in (("reasoning_content", thought), ("tool_calls", calls)):
        if value and not says:
            raise UserError(f"{where}: {field} in a turn of {turn['role']}; only answers have it")
    if thought:
        turn["reasoning_content"] = thought
    if calls:
        turn["tool_calls"] = calls
    for field in ("name", "tool_call_id"):
        value = text(fields.get(field, ""), f"{where}: {field}")
        if value and turn["role"] != "tool":
            raise UserError(
                f"{where}: {field!r} in a turn of {turn['role']}; only tools have it ({ignore} "
                "leaves it out)"
            )
        if value:
            turn[field] = value
    weight = fields.get("train_weight", 0 if not says else 1)
    if not isinstance(weight, bool | int | float) or weight not in (0, 1):
        raise UserError(f"{where}: the weight of a turn is 0 or 1 (or false, true), not {weight!r}")
    if weight and not says:
        raise UserError(
            f"{where}: a weight of 1 in a turn of {turn['role']}; only answers are learned"
        )
    if says and not weight:
        turn["train_weight"] = 0


def _content(value: Any, where: str) -> str:
    """Text, or the text of OpenAI's content parts."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return text(value, f"{where}: content")
    texts = []
    for part in value:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        part = part if isinstance(part, Mapping) else {"type": kind(part)}
        kept = {key: value for key, value in part.items() if value is not None}
        if set(kept) != {"type", "text"} or kept["type"] != "text":
            raise UserError(
                f"{where}: a part of the content is of type {kept.get('type')!r} with the keys "
                f"{quoted(kept)}; only text can be read"
            )
        texts.append(text(kept["text"], f"{where}: content"))
    return "".join(texts)


def _calls(value: Any, where: str) -> list[dict]:
    """Tool calls in the form that templates expect: arguments as an object."""
    value = decoded(value, f"{where}: 'tool_calls'") or []
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: 'tool_calls' must be a list, found {kind(value)}")
    calls = []
    for call in value:
        call = {k: v for k, v in call.items() if v is not None} if isinstance(call, Mapping) else {}
        function = call.get("function") or {k: call[k] for k in _CALL_KEYS[3:] if k in call}
        function = dict(function) if isinstance(function, Mapping) else {}
        strange = [k for k in call if k not in _CALL_KEYS]
        strange += [k for k in function if k not in _CALL_KEYS[3:]]
        strange += ["type"] * (call.get("type", "function") != "function")
        if strange or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: a tool call is {{'name', 'arguments'}} or {{'function': {{...}}}}; "
                f"found {quoted(strange or call) or 'nothing'}"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{where}: arguments of {function['name']!r}")
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}: the arguments of a tool call must be an object")
        named = {"name": function["name"], "arguments": dict(arguments)}
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def read_tools(value: Any, where: str) -> list[dict]:
    """Descriptions of functions: a list, or the JSON text of one. Raises UserError."""
    what = f"{where}: 'tools'"
    value = _json(value, what) if isinstance(value, str) and value else value or []
    tools = [value] if isinstance(value, Mapping) else value
    for tool in tools if isinstance(tools, Sequence) else [None]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{what} must be a list of functions, each with a name")
    return [dict(tool) for tool in tools]


def decoded(value: Any, where: str) -> Any:
    """A list or object that stands as JSON text in a table's cell. Raises UserError."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return _loads(value, where)
        except json.JSONDecodeError:
            return value
    return value


def _json(text: str, where: str) -> Any:
    try:
        return _loads(text, where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error.msg}): {text[:40]!r}") from error


def _loads(text: str, where: str) -> Any:
    try:
        return json_text.loads(text, unique_keys)
    except TwiceError as error:
        raise UserError(f"{where}: {error}") from None


def text(value: Any, where: str) -> str:
    """The value. Raises UserError for one that is no text."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, found {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, Mapping):
        return "an object"
    names: dict[type, str] = {list: "a list", tuple: "a list", str: "text", bool: "true/false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a value of the type {type(value).__name__}")


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, one after another."""
    return ", ".join(repr(name) for name in names)
