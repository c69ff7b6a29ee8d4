"""Bodies of OpenAI's chat completions: a prompt as a request, and a reply as turns.

Source: https://platform.openai.com/docs/api-reference/chat; `reasoning_content` (SGLang, DeepSeek) and `reasoning`
(vLLM, OpenRouter) are of others, and the first is what a dataset's turns have.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdmesh.chats.chat_rows import Message
from kdmesh.chats.tool_rows import Tool
from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.images import data_url

_REASONING_KEYS = ("reasoning_content", "reasoning")
# vLLM and SGLang say so of a request that they gave up.
_GIVEN_UP = ("abort", "error")
_SHOWN = 300  # characters of what a server says, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer."""

    text: str
    reasoning: str
    tool_calls: Sequence[Mapping[str, Any]]
    end: Literal["whole", "cut_off", "filtered", "refused"]

    @property
    def turn(self) -> dict[str, Any]:
        """As a dataset has it."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **reasoning, **calls}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """To one request."""

    choices: Sequence[Choice]  # at least one
    prompt_tokens: int  # as the server counts; 0 where it does not say
    completion_tokens: int


def request_messages(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns; a call without an id is given one, and answers without one are to the oldest call that has none yet.

    Raises:
        InvalidRequest: the file of an image has changed.
    """
    unanswered: deque[str] = deque()
    num_calls = 0
    messages = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": _content(turn), **turn.answer_to}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            # Mistral's servers take ids of nine letters and digits alone.
            calls = [_request_call(call, f"call{num_calls + i:05d}") for i, call in enumerate(turn.tool_calls)]
            num_calls += len(calls)
            unanswered.extend(call["id"] for call in calls)
            message["tool_calls"] = calls
        if turn.role == "tool" and unanswered:
            answered = message.setdefault("tool_call_id", unanswered[0])
            if answered in unanswered:
                unanswered.remove(answered)
        messages.append(message)
    return messages


def request_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """What a function is called alone, too, as one of a tool."""
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def read_reply(body: bytes) -> Reply:
    """What a server answered with status 200.

    Raises:
        Unavailable: it is no reply, as of something between here and the server, or says that it was given up.
        InvalidRequest: its answers are in a form that is not known here.
    """
    try:
        reply = json.loads(body)
        choices = tuple(_choice(choice) for choice in reply["choices"])
        usage = reply.get("usage") or {}
        read = Reply(
            choices=choices,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Unavailable(f"the reply is no chat completion: {shown(body)}") from None
    if not choices:
        raise Unavailable(f"the reply holds no choice: {shown(body)}")
    return read


def shown(body: bytes) -> str:
    """What a server says, for people: the message of its error, if it is one, in one line."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
        while isinstance(said, dict):
            said = next(said[key] for key in ("error", "message", "detail", "choices") if said.get(key))
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, StopIteration, RecursionError):
        pass
    line = " ".join(text.split()).rstrip(".")
    return f"{line[:_SHOWN]}..." if len(line) > _SHOWN else line or "nothing"


def error_code(body: bytes) -> str:
    """The `code` of the error that a server answers; empty where there is none."""
    try:
        return str(json.loads(body)["error"]["code"] or "")
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _content(turn: Message) -> str | list[dict[str, Any]] | None:
    if turn.parts:
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in turn.parts
        ]
    return None if turn.tool_calls and not turn.content else turn.content


def _request_call(call: Tool, otherwise: str) -> dict[str, Any]:
    """With its arguments as JSON in a text, and with an id, `otherwise` if it has none."""
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    called = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id") or otherwise), "type": "function", "function": called}


def _choice(choice: Mapping[str, Any]) -> Choice:
    message, reason = choice["message"], choice.get("finish_reason")
    if reason in _GIVEN_UP:
        raise Unavailable(f"the server has given the request up (finish_reason {reason})")
    text = message.get("content") or ""
    if not isinstance(text, str):
        raise InvalidRequest(f"the content of an answer is a {type(text).__name__}; it must be a text")
    if message.get("refusal"):
        end: Literal["whole", "cut_off", "filtered", "refused"] = "refused"
    else:
        end = "cut_off" if reason == "length" else "filtered" if reason == "content_filter" else "whole"
    return Choice(
        text=text,
        reasoning=next((str(message[key]) for key in _REASONING_KEYS if message.get(key)), ""),
        tool_calls=tuple(_answered_call(call) for call in message.get("tool_calls") or ()),
        end=end,
    )


def _answered_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """What of it a dataset needs."""
    return {key: call[key] for key in ("id", "type", "function") if call.get(key) is not None}
