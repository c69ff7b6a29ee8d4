"""Chat templates that render the same on every day, and with the settings that somebody gave them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jinja2 import TemplateError

from kdmesh.errors import ConfigError

TemplateSetting: TypeAlias = bool | int | float | str
"""What a variable of a chat template may be given."""

TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What rendering a chat may raise: a template is a program."""

# Some templates print today's date (Llama and gpt-oss, in these two forms). With a fixed one a resumed run sees the
# tokens it saw before, and an answer the prompt it was given to. A macro, because transformers passes no callables on.
_FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ '2024-07-26' if form == '%Y-%m-%d' else '26 Jul 2024' }}{% endmacro %}\n"
)

# Templates of LLaVA and SmolVLM look for parts in a message, and find none in a text.
_IN_PARTS = (
    "{% set in_parts = namespace(messages=[]) %}{% for message in messages %}"
    "{% set in_parts.messages = in_parts.messages + [dict(message, content=[{'type': 'text', 'text': message.content}])"
    " if message.content is string else message] %}{% endfor %}{% set messages = in_parts.messages %}\n"
)
_WORD = "Word"

# Whoever renders a chat gives these, so another value would never be seen.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def dated_alike(template: str) -> str:
    """The Jinja source with one date for all days, where it prints one."""
    return _FIXED_DATE + template if "strftime_now" in template else template


def with_texts(template: str, render: Callable[..., Any]) -> str:
    """The Jinja source with messages in parts, where it would leave out a message that is a text.

    Args:
        render: a tokenizer's apply_chat_template.
    """
    in_parts = f"{_IN_PARTS}{template}"
    is_needed = not _writes_word(template, render) and _writes_word(in_parts, render)
    return in_parts if is_needed else template


def _writes_word(template: str, render: Callable[..., Any]) -> bool:
    chat = [{"role": "user", "content": _WORD}]
    try:
        return _WORD in str(render(chat, chat_template=template, tokenize=False))
    except TEMPLATE_ERRORS:
        return False


def with_settings(template: str, settings: Mapping[str, TemplateSetting], *, key: str) -> str:
    """The Jinja source in which variables have these values, unless whoever renders it gives others.

    Args:
        settings: by the variable's name, `enable_thinking` for example.
        key: of the configuration, or a command's option, that names them.

    Raises:
        ConfigError: the template has no such variable, or it is one that every rendering gives.
    """
    for name in settings:
        if not name.isidentifier() or name in _GIVEN or name.endswith("_token"):
            raise ConfigError(f"{key}: {name!r} is no variable that can be set")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(f"{key}: the chat template has no variable {name!r}, so setting it would change nothing")
    given = "".join(
        # Jinja's texts have JSON's escapes. Beyond ASCII it takes characters as they are, and JSON's halves of one not.
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for name, value in settings.items()
    )
    # A line of its own: the newline behind a block is not rendered, where the template's own first one might be.
    return f"{given}\n{template}" if given else template
