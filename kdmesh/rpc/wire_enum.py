"""Members of an enum <-> the numbers that stand for them on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from kdmesh.errors import InvalidRequest

E = TypeVar("E", bound=StrEnum)
N = TypeVar("N", bound=int)


class WireEnum(Generic[E, N]):
    """One enum.

    Args:
        what: a member is called, in messages.
        numbers: of every member.
    """

    def __init__(self, what: str, numbers: Mapping[E, N]) -> None:
        self._what = what
        self._numbers = numbers
        self._members: dict[int, E] = {number: member for member, number in numbers.items()}

    def to_wire(self, member: E) -> N:
        """Its number."""
        return self._numbers[member]

    def from_wire(self, number: int) -> E:
        """Raises InvalidRequest for a number that this version does not know."""
        if number not in self._members:
            raise InvalidRequest(f"unknown {self._what} {number}; known: {', '.join(self._numbers)}")
        return self._members[number]
