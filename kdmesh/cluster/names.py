"""What things may be called in a cluster, as Kubernetes has it.

https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/, looked up 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kdmesh.errors import ConfigError

_PART = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_LABEL_VALUE = re.compile(f"({_PART})?")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_VARIABLE = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]*")
_LONGEST_DOMAIN = 253


def is_object(text: str) -> bool:
    """A claim, a Secret, a ServiceAccount: they are called as DNS has it."""
    return len(text) <= _LONGEST_DOMAIN and _DOMAIN.fullmatch(text) is not None


def is_key(text: str) -> bool:
    """The key of a label or a taint, or the name of a resource: with a domain and a slash before it, or without."""
    domain, slash, name = text.rpartition("/")
    return (is_object(domain) or not slash) and re.fullmatch(_PART, name) is not None


def is_label_value(text: str) -> bool:
    """The value of a label or a taint."""
    return _LABEL_VALUE.fullmatch(text) is not None


def is_variable(text: str) -> bool:
    """An environment variable; clusters before 1.34 take no others."""
    return _VARIABLE.fullmatch(text) is not None


def require(is_fit: Callable[[str], bool], text: str | None, what: str) -> None:
    """Raises ConfigError when `text`, if there is any, is not fit to be `what`: one of the questions above."""
    if text is not None and not is_fit(text):
        raise ConfigError(f"{text!r} cannot be {what} in Kubernetes")
