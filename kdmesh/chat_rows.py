"""What a row of a file says of its chat beside the messages, whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdmesh.errors import DataError

UNSUPPORTED_COLUMNS = ("functions", "chat_template_kwargs")
"""They change what a template renders: a row that has one is refused."""

TOOLS_COLUMN = "tools"
"""Likewise, by who does not take it."""

_NOTHING = (None, "", [], {}, "[]", "{}", "null")  # a column may hold JSON as a text


def refuse_unsupported_columns(row: Mapping[Any, Any], origin: str, *, takes_tools: bool) -> None:
    """Raises DataError when one of UNSUPPORTED_COLUMNS, or what else is not taken, holds something."""
    for name in (*UNSUPPORTED_COLUMNS, *([] if takes_tools else [TOOLS_COLUMN])):
        value = row.get(name) or None
        # Of Parquet every row has all keys of a column that holds objects.
        if any(each not in _NOTHING for each in (value.values() if isinstance(value, Mapping) else [value])):
            raise DataError(f"{origin}: `{name}` is not supported; a chat is messages alone")


def unicode_text(text: str, origin: str) -> str:
    """The same text, which no file can hold otherwise. Raises DataError where it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin} is not Unicode text: half a surrogate pair at character {error.start}") from None
    return text


def system_text(row: Mapping[Any, Any], messages: Sequence[tuple[object, object]], origin: str) -> str:
    """The system turn to put before a row's messages: what its column `system` holds; empty: there is none to put.

    Args:
        messages: role and content of each.

    Raises:
        DataError: it is no text, or another one than that of a system turn among the messages.
    """
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise DataError(f"{origin}: system must be a string, not {type(text).__name__}")
    if not text or ("system", text) in messages[:1]:
        return ""
    if any(role in ("system", "developer") for role, _ in messages):
        raise DataError(f"{origin}: both `system` and the messages hold a system turn; a chat has one")
    return text
