"""Chat templates that render the same on every day."""

from __future__ import annotations

# Some templates print today's date (Llama and gpt-oss, in these two forms). With a fixed one a resumed run sees the
# tokens it saw before, and an answer the prompt it was given to. A macro, because transformers passes no callables on.
_FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ '2024-07-26' if form == '%Y-%m-%d' else '26 Jul 2024' }}{% endmacro %}\n"
)


def dated_alike(template: str) -> str:
    """The Jinja source with one date for all days, where it prints one."""
    return _FIXED_DATE + template if "strftime_now" in template else template
