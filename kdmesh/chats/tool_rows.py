"""What a row says of tools: which there are, which an assistant calls, and what they answered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kdmesh.errors import DataError

Tool = Mapping[str, Any]
"""As chat templates take it: {"type": "function", "function": {"name": ...}}, or what stands in `function` alone."""

TOOLS_COLUMN = "tools"

_ANSWER_KEYS = ("name", "tool_call_id")


def tools_of(row: Mapping[Any, Any], origin: str) -> tuple[Tool, ...]:
    """Those in the column `tools`, which may be JSON as a text. Raises DataError when they are none."""
    with _not_too_deep(f"{origin}: {TOOLS_COLUMN}"):
        tools = _functions(row.get(TOOLS_COLUMN), f"{origin}: {TOOLS_COLUMN}")
        _refuse_half_pairs(tools, f"{origin}: {TOOLS_COLUMN}")
        return tools


def calls_of(message: Mapping[Any, Any], role: str, origin: str) -> tuple[Tool, ...]:
    """The calls in a message's `tool_calls`, their arguments as an object where they are one as JSON.

    Raises:
        DataError: they are none, or not the assistant's.
    """
    with _not_too_deep(f"{origin}.tool_calls"):
        calls = _functions(message.get("tool_calls"), f"{origin}.tool_calls")
        if calls and role != "assistant":
            raise DataError(f"{origin}: 'tool_calls' at a turn of the {role}; only the assistant calls tools")
        read = tuple(_with_read_arguments(call) for call in calls)
        _refuse_half_pairs(read, f"{origin}.tool_calls")
        return read


def answer_keys(message: Mapping[Any, Any], role: str, origin: str) -> dict[str, str]:
    """What a tool's answer says of the call that it is to, beside its text. Raises DataError as tools_of."""
    if role != "tool":
        return {}
    said = {key: str(message[key]) for key in _ANSWER_KEYS if message.get(key) is not None}
    _refuse_half_pairs((said,), f"{origin}: {' or '.join(_ANSWER_KEYS)}")
    return said


def name_of(tool: Tool) -> str:
    """Of the function."""
    return str(_function(tool)["name"])


def are_written(functions: Sequence[Tool], text: str) -> bool:
    """Whether a text names these, tools and calls of them, as often as they are there."""
    times = Counter(name_of(function) for function in functions)
    return all(text.count(name) >= number for name, number in times.items())


@contextmanager
def _not_too_deep(origin: str) -> Iterator[None]:
    """Say of what is nested deeper than Python follows that it is: a DataError."""
    try:
        yield
    except RecursionError:
        raise DataError(f"{origin} is nested too deeply") from None


def _functions(value: object, origin: str) -> tuple[Tool, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin} is a text that is not JSON: {error}") from None
    if not value:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin} must be a list, not {type(value).__name__}")
    found = [_without_null(tool) for tool in value]
    for number, tool in enumerate(found):
        if not isinstance(tool, dict) or not isinstance(_function(tool).get("name"), str):
            raise DataError(f"{origin}[{number}] must be a function with a name, as OpenAI has it")
    return tuple(found)


def _refuse_half_pairs(tools: tuple[Tool, ...], origin: str) -> None:
    """Raises DataError where a text in them is one that no file can hold."""
    try:
        json.dumps(tools, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError(f"{origin} is not Unicode text: there is half a surrogate pair in it") from None


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _with_read_arguments(call: Tool) -> Tool:
    """OpenAI has arguments as JSON in a text, which templates would write as a text in a text."""
    arguments = _function(call).get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    if not isinstance(read, dict):
        return call
    function = {**_function(call), "arguments": read}
    return {**call, "function": function} if "function" in call else function


def _without_null(value: Any) -> Any:
    """Without keys that hold nothing: Parquet has every key of any row in each of them."""
    if isinstance(value, Mapping):
        return {str(key): _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list | tuple) else value
