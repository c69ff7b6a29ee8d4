"""Which of a model's parameters a name means that a person wrote."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

_TOLD = 8  # names in an error


def is_meant(pattern: str, name: str) -> bool:
    """Whether `pattern` is a parameter's name or the beginning of it up to a dot.

    `*`, `?` and `[0-9]` stand for characters between two dots.
    """
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def names_nothing(pattern: str, names: Collection[str]) -> str:
    """What to say of a pattern that means none of a model's parameters, which have `names`."""
    return f"{pattern} names no parameter; {_nearest(pattern, names)}"


def _nearest(pattern: str, names: Collection[str]) -> str:
    """What there is where `pattern` leads nowhere."""
    inside, _, _ = pattern.rpartition(".")
    depth = len(inside.split(".")) if inside else 0
    found = dict.fromkeys(
        name.split(".")[depth] for name in names if name.count(".") >= depth and (not inside or is_meant(inside, name))
    )
    if not found:
        return _nearest(inside, names)
    told = ", ".join(list(found)[:_TOLD]) + (", ..." if len(found) > _TOLD else "")
    return f"{inside or 'the model'} has {told}"
